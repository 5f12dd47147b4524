//! Planted secrets, and everything that a process says on good ways and bad: none of them is in it.
use anyhow::{Context, ensure};
use serde_json::json;
use std::path::Path;
use std::time::Duration;
use warren_tests::raw::free_port;
use warren_tests::{Lab, Postgres, event, until};

const PATIENCE: Duration = Duration::from_secs(90);
/// Every planted secret holds it, and nothing else does.
const PLANTED: &str = "Pl4nted";
/// As loud as a log can be told to be.
const LOUD: &str =
    "trace,lapin::io_loop=trace,lapin::channels=trace,tokio_postgres::query=trace,rustls=trace,[io_loop]=trace";

fn unseen(what: &str, text: &str) -> anyhow::Result<()> {
    let found: Vec<&str> = text.lines().filter(|line| line.contains(PLANTED)).collect();
    ensure!(found.is_empty(), "{what} shows a secret:\n{}", found.join("\n"));
    Ok(())
}

/// A payload key of 32 bytes with the mark in it.
fn payload_key() -> String {
    format!("k1:{}xyA=", format!("{PLANTED}Key").repeat(4))
}

/// A pool whose broker's user, database's user and payload key are planted; the parts are given by value, which is worst.
fn planted(name: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::new(name)?.with_store(Postgres::shared(name)?);
    let user = json!({"password": format!("{PLANTED}-br0ker"), "tags": ""});
    lab.rabbit.api("PUT", &format!("users/{name}"), Some(user))?;
    let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
    lab.rabbit.api("PUT", &format!("permissions/{name}/{name}"), Some(all))?;
    let database = lab.postgres.as_ref().context("a database")?;
    let (_, place) = database.url().rsplit_once('@').context("a login")?;
    let url = format!("postgres://{name}:{PLANTED}-datab4se@{place}");
    database.superuser(&format!(
        "DROP ROLE IF EXISTS \"{name}\"; CREATE ROLE \"{name}\" LOGIN PASSWORD '{PLANTED}-datab4se' IN ROLE warren; \
         ALTER ROLE \"{name}\" SET role = 'warren'"
    ))?;
    let amqp = lab.url().replace("guest:guest@", "");
    for (variable, value) in [
        ("AMQP_URL", amqp.as_str()),
        ("AMQP_USER", name),
        ("AMQP_PASSWORD", &format!("{PLANTED}-br0ker")),
        ("DATABASE_URL", &url),
        ("WARREN_PAYLOAD_KEYS", &payload_key()),
        ("RUST_LOG", LOUD),
        ("WARREN_CONNECT_TIMEOUT", "1s"),
    ] {
        lab.set(variable, value);
    }
    Ok(lab)
}

/// The end of what is shared with other tests.
fn forget(lab: &Lab) -> anyhow::Result<()> {
    lab.rabbit.api("DELETE", &format!("users/{}", lab.name), None)?;
    lab.postgres.as_ref().context("a database")?.superuser(&format!("DROP ROLE \"{}\"", lab.name))
}

/// What is wrong, by which variables, and the exit code.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], i32);

#[tokio::test]
async fn no_refusal_shows_a_secret() -> anyhow::Result<()> {
    let lab = planted("secrets-refusals")?;
    let plain = lab.url();
    let database = |from: &str, to: &str| {
        let url = lab.environment.iter().find(|(name, _)| name == "DATABASE_URL").map(|(_, url)| url.replace(from, to));
        url.unwrap_or_default()
    };
    let nobody = free_port()?.to_string();
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{PLANTED}\n-----END PRIVATE KEY-----\n");
    let in_tls = plain.replace("amqp://", "amqps://");
    let broken = format!("amqp://me:{PLANTED}@host:{PLANTED}/v?{PLANTED}");
    let other = format!("mysql://me:{PLANTED}@host/db");
    let wrong = database("datab4se", "wr0ng");
    let odd = format!("{wrong}?sslmode={PLANTED}");
    let cases: [Case; 11] = [
        ("wrong password", &[("AMQP_PASSWORD", "Pl4nted-wr0ng")], 69),
        ("unknown vhost", &[("AMQP_VHOST", "nowhere")], 69),
        ("unreachable", &[("AMQP_PORT", &nobody)], 69),
        ("broken URL", &[("AMQP_URL", &broken)], 64),
        ("no TLS there", &[("AMQP_URL", &in_tls)], 69),
        ("bad CA", &[("AMQP_URL", &in_tls), ("AMQP_CA", &pem)], 64),
        ("bad pair", &[("AMQP_URL", &in_tls), ("AMQP_CERT", &pem), ("AMQP_KEY", &pem)], 64),
        ("database refuses", &[("DATABASE_URL", &wrong)], 69),
        ("odd database", &[("DATABASE_URL", &odd)], 64),
        ("other database", &[("DATABASE_URL", &other)], 64),
        ("bad payload key", &[("WARREN_PAYLOAD_KEYS", "k:Pl4ntedPl4nted")], 64),
    ];
    for (what, more, code) in cases {
        for format in ["text", "json"] {
            for arguments in [&["run"][..], &["check"]] {
                let mut command = warren_tests::process::command("warren-worker", &lab.environment);
                command.args(arguments).env("WARREN_LOG_FORMAT", format).envs(more.iter().copied());
                let output = warren_tests::process::output(command, Vec::new()).await?;
                let said =
                    [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
                unseen(what, &said)?;
                ensure!(output.status.code() == Some(code), "{what}, {arguments:?}: {}\n{said}", output.status);
            }
        }
        let mut command = warren_tests::process::command("warren-publisher", &lab.environment);
        command.args(["relay", "--once"]).envs(more.iter().copied());
        let output = warren_tests::process::output(command, Vec::new()).await?;
        unseen(what, &(String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr)))?;
    }
    forget(&lab)
}

#[tokio::test]
async fn neither_logs_nor_metrics_nor_arguments_show_a_secret_while_events_live_and_die() -> anyhow::Result<()> {
    let mut lab = planted("secrets-work")?;
    let address = format!("127.0.0.1:{}", free_port()?);
    lab.set("WARREN_ADMIN_ADDR", &address);
    lab.set("WARREN_CONNECT_TIMEOUT", "10s");
    let retry = ", retry: {attempts: 2, backoff: 1s}";
    lab.set("WARREN_ROUTES", &lab.ledger_route(retry));
    lab.declare().await?;
    for format in ["text", "json"] {
        lab.set("WARREN_LOG_FORMAT", format);
        let mut worker = lab.worker()?;
        until("it takes events", PATIENCE, || worker.log().contains("takes events"))
            .await
            .with_context(|| worker.log())?;
        let secret = format!("{PLANTED}-payl0ad");
        let event = |id: &str, kind: &str, data: serde_json::Value| {
            let mut data = data;
            data["card"] = json!(secret);
            event(&format!("{id}-{format}"), kind, "k", data)
        };
        let all = [
            event("done", "order.placed", json!({})),
            event("retried", "order.placed", json!({"fail": 1})),
            event("exhausted", "order.placed", json!({"fail": 9})),
            event("dead", "order.placed", json!({"dead": true})),
            event("exits", "order.placed", json!({"exit": true})),
        ];
        let mut lines: String = all.iter().map(|event| format!("{event}\n")).collect();
        lines.push_str(&format!("{{\"specversion\": \"1.0\", {secret}\n"));
        let (account, stderr) = lab.send_raw(lines.into_bytes(), &[]).await?;
        ensure!(account["confirmed"] == 5 && account["refused"] == 1, "{account}\n{stderr}");
        unseen("the publisher's log", &stderr)?;
        // What another system sent in plain, and cannot be read.
        let broken = warren_tests::Raw::new("order.placed", format!("{{\"card\": \"{secret}"));
        lab.publish(&[broken.content_type("application/json").id(&format!("broken-{format}"))]).await?;
        let dead = if format == "text" { 4 } else { 8 };
        lab.dead_letters(dead, PATIENCE).await?;
        for page in ["/metrics", "/readyz", "/livez"] {
            unseen(page, &lab.page(&address, page)?.1)?;
        }
        let pid = worker.pid().context("it runs")?;
        unseen("/proc", &std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?)?;
        for arguments in [
            &["--help"][..],
            &["check"],
            &["status"],
            &["status", "--json"],
            &["topology"],
            &["dead", "list"],
            &["dead", "list", "--json"],
            &["dead", "show", &format!("dead-{format}")],
            &["dead", "replay", "--id", &format!("dead-{format}")],
        ] {
            let output = lab.run(arguments).await?;
            let said =
                [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
            // Dead letters need a person: `status` says so by its exit code.
            ensure!(matches!(output.status.code(), Some(0 | 1)), "{arguments:?}: {said}");
            unseen(&arguments.join(" "), &said)?;
        }
        lab.dead_letters(dead, PATIENCE).await?;
        // The connections end, and are made again.
        let connections = || lab.connections("warren-worker").unwrap_or_default();
        until("they are listed", PATIENCE, || !connections().is_empty()).await?;
        lab.close(&connections())?;
        lab.postgres
            .as_ref()
            .context("a database")?
            .superuser("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'secrets-work'")?;
        lab.send(&[event("after", "order.placed", json!({}))]).await?;
        until("it is handled", PATIENCE, || lab.calls().iter().any(|call| call[1] == format!("after-{format}")))
            .await?;
        ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
        ensure!(worker.log().contains("DEBUG"), "it was loud:\n{}", worker.log());
        unseen("the worker's log", &worker.log())?;
    }
    forget(&lab)
}

#[tokio::test]
async fn a_program_is_given_none_of_the_workers_secrets() -> anyhow::Result<()> {
    let mut lab = planted("secrets-program")?;
    lab.set("WARREN_CONNECT_TIMEOUT", "10s");
    let (program, seen) = (lab.path("show.py"), lab.path("seen"));
    let text = "import json, os, sys\n\
                for line in sys.stdin:\n\
                \x20   event = json.loads(line)['event']\n\
                \x20   with open(sys.argv[1], 'w') as seen:\n\
                \x20       json.dump([dict(os.environ), sys.argv, open('/proc/self/cmdline').read()], seen)\n\
                \x20   print(json.dumps({'id': event['id'], 'source': event['source'], 'status': 'done'}), flush=True)\n";
    std::fs::write(&program, text)?;
    let route = |path: &Path| path.display().to_string();
    let routes = format!("routes: [{{on: 'order.#', exec: [python3, '{}', '{}']}}]", route(&program), route(&seen));
    lab.set("WARREN_ROUTES", &routes);
    // Files of secrets that it could read are not named to it, either.
    let password = lab.path("password");
    std::fs::write(&password, format!("{PLANTED}-br0ker"))?;
    lab.environment.retain(|(name, _)| name != "AMQP_PASSWORD");
    lab.set("AMQP_PASSWORD_FILE", &route(&password));
    lab.set("HANDLERS_OWN", "is kept");
    let mut worker = lab.worker()?;
    lab.declare().await?;
    lab.send(&[event("e", "order.placed", "k", json!({}))]).await?;
    until("it is handled", PATIENCE, || std::fs::read_to_string(&seen).is_ok_and(|text| text.ends_with(']')))
        .await
        .with_context(|| lab.logs())?;
    let text = std::fs::read_to_string(&seen)?;
    unseen("a program's environment", &text)?;
    let environment: serde_json::Value = serde_json::from_str(&text)?;
    for name in environment[0].as_object().context("an environment")?.keys() {
        let ours = ["WARREN_", "AMQP_", "DATABASE_", "OTEL_"].iter().any(|prefix| name.starts_with(prefix));
        ensure!(!ours, "{name} is there");
    }
    ensure!(environment[0]["HANDLERS_OWN"] == "is kept", "{environment}");
    ensure!(worker.terminate(PATIENCE).await?.success(), "{}", worker.log());
    forget(&lab)
}
