//! `warren-publisher send`: an account of every line, in every way a run can end.
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use warren_tests::process::{command, expect_exit};
use warren_tests::{Lab, Process, event, events, exchange, ids, until};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn send_needs_little_memory_for_many_lines() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-memory")?;
    let peak = memory_of_send(&lab, 200_000, 850).await?;
    ensure!(peak < 150 << 20, "{} MB of memory", peak >> 20);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn send_needs_little_memory_for_long_lines() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-memory-long")?;
    let peak = memory_of_send(&lab, 120, 4 << 20).await?;
    // What is in flight (64 MiB) exists as line, as message and as frames.
    ensure!(peak < 200 << 20, "{} MB of memory", peak >> 20);
    Ok(())
}

/// Sends a file of so many lines with so much text; returns the sender's peak of memory.
async fn memory_of_send(lab: &Lab, lines: usize, text: usize) -> anyhow::Result<u64> {
    // Messages are not kept: the test is not about the broker's disk.
    exchange(lab, "sink", &[("big.#", "classic", 10)]).await?;
    let file = lab.path("large.jsonl");
    {
        use std::io::Write;
        let mut out = std::io::BufWriter::new(std::fs::File::create(&file)?);
        let text = "x".repeat(text);
        for i in 0..lines {
            let start = r#"{"specversion":"1.0","source":"/tests","type":"big.event","data":{"text":""#;
            writeln!(out, r#"{start}{text}"}},"id":"b{i}","partitionkey":"k{}"}}"#, i % 100)?;
        }
        out.flush()?;
    }
    let size = std::fs::metadata(&file)?.len();
    let mut command = command("warren-publisher", &lab.environment);
    command.args(["send", "--exchange", "sink"]).arg(&file);
    let mut sender = Process::start(command, &lab.path("send.log"))?;
    let (mut peak, since) = (0, Instant::now());
    while sender.is_running() {
        peak = sender.pid().and_then(peak_memory).unwrap_or(peak).max(peak);
        ensure!(since.elapsed() < Duration::from_secs(240), "it still runs: {}", sender.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::remove_file(&file)?;
    let account = sender.account()?;
    ensure!(account["confirmed"] == json!(lines), "{account} {}", sender.log());
    println!("{} MB sent in {} s, at most {} MB of memory", size >> 20, account["seconds"], peak >> 20);
    ensure!(peak > 0, "its memory was never seen");
    Ok(peak)
}

/// The most physical memory that a process ever had, in bytes.
fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

// ---- send

#[tokio::test]
async fn the_account_of_send_adds_up_and_the_rejects_name_their_lines() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-account")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let mut input = String::new();
    let (mut bad, mut number) = (Vec::new(), 0_u64);
    let mut line = |text: &str, reason: Option<&str>| {
        number += 1;
        input.push_str(text);
        input.push('\n');
        if let Some(reason) = reason {
            bad.push((number, reason.to_owned(), text.to_owned()));
        }
    };
    let good = |i: usize| event(&format!("g{i}"), "good.a", &format!("k{}", i % 5), json!({"n": i})).to_string();
    for i in 0..400 {
        line(&good(i), None);
        match i {
            20 => line("{not json", Some("malformed")),
            60 => line("", None),
            61 => line("   ", None),
            100 => line("[]", Some("malformed")),
            140 => line(r#"{"specversion":"1.0","id":"x","source":"/s"}"#, Some("attribute")),
            180 => line(r#"{"specversion":"1.0","id":"","source":"/s","type":"good.a"}"#, Some("attribute")),
            220 => line(&event("nobody", "bad.a", "k", json!({})).to_string(), Some("returned")),
            260 => line(&event(&"i".repeat(300), "good.a", "k", json!({})).to_string(), Some("")),
            300 => line(r#"{"id":"1","id":"2","specversion":"1.0","source":"/s","type":"good.a"}"#, Some("")),
            _ => {}
        }
    }
    let rejects = lab.path("rejects.jsonl");
    let arguments = ["--exchange", "there", "--rejects", rejects.to_str().context("UTF-8")?];
    let (account, stderr) = lab.send_raw(input.clone().into_bytes(), &arguments).await?;
    let (confirmed, refused) = (400, bad.len());
    ensure!(account["read"] == json!(confirmed + refused), "{account} {stderr}");
    ensure!(account["confirmed"] == json!(confirmed) && account["refused"] == json!(refused), "{account} {stderr}");
    ensure!(account["unknown"] == json!(0), "{account}");
    let mut records: Vec<Value> =
        std::fs::read_to_string(&rejects)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    records.sort_by_key(|record| record["line"].as_u64());
    let found: Vec<(u64, String)> = records
        .iter()
        .map(|r| (r["line"].as_u64().unwrap_or(0), r["input"].as_str().unwrap_or_default().to_owned()))
        .collect();
    let wanted: Vec<(u64, String)> = bad.iter().map(|(line, _, text)| (*line, text.clone())).collect();
    ensure!(found == wanted, "{found:?} instead of {wanted:?}");
    for (record, (line, reason, _)) in records.iter().zip(&bad) {
        println!("{line}: {} - {}", record["reason"], record["error"]);
        ensure!(record["error"].as_str().is_some_and(|e| !e.is_empty()), "{record}");
        ensure!(stderr.contains(&format!("line {line}: ")), "stderr does not name line {line}: {stderr}");
        ensure!(reason != "returned" || record["reason"] == json!("returned"), "{record}");
    }
    let stored = ids(&lab.take_all("there.good").await?);
    ensure!(stored.len() == confirmed, "{} are stored", stored.len());
    let output = send(&lab, &arguments, input.into_bytes()).await?;
    expect_exit(&output, 1)?;
    Ok(())
}

async fn send(lab: &Lab, arguments: &[&str], input: Vec<u8>) -> anyhow::Result<std::process::Output> {
    let mut command = command("warren-publisher", &lab.environment);
    command.arg("send").args(arguments);
    warren_tests::process::output(command, input).await
}

#[tokio::test]
async fn any_json_becomes_events_by_type_id_key_and_lane() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-pointers")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let input = "{\"no\":17,\"customer\":{\"name\":\"ada\"}}\n{\"no\":\"x\",\"customer\":{\"name\":\"bob\"}}\n";
    let arguments = ["--exchange", "there", "--type", "good.order", "--source", "/shop", "--id", "/no"];
    let more = ["--key", "/customer/name", "--lane", "high"];
    let (account, stderr) = lab.send_raw(input.into(), &[&arguments[..], &more[..]].concat()).await?;
    ensure!(account["confirmed"] == json!(2), "{account} {stderr}");
    let stored = lab.take_all("there.good").await?;
    for (message, (id, key, body)) in stored.iter().zip([("17", "ada", 0), ("x", "bob", 1)]) {
        let incoming = message.read(warren_shared::Limits::default(), String::new)?;
        let event = incoming.event;
        ensure!((event.id(), event.source(), event.kind()) == (id, "/shop", "good.order"), "{event:?}");
        ensure!(event.key() == key && message.correlation_id.as_deref() == Some(key), "{event:?}");
        ensure!(message.routing_key == "good.order", "{}", message.routing_key);
        ensure!(message.header("warren-lane").map(ToString::to_string).as_deref() == Some("high"), "{message:?}");
        let (data, line) =
            (event.json::<Value>()?, serde_json::from_str::<Value>(input.lines().nth(body).unwrap_or(""))?);
        ensure!(data == line, "{data}");
    }
    ensure!(stored.len() == 2, "{} are stored", stored.len());
    // A line without the pointer's value is refused, and only it.
    let (account, stderr) = lab.send_raw(b"{\"no\":1}\n{\"nr\":2}\n".to_vec(), &arguments).await?;
    ensure!(account["confirmed"] == json!(1) && account["refused"] == json!(1), "{account}");
    ensure!(stderr.contains("line 2: ") && stderr.contains("/no"), "{stderr}");
    Ok(())
}

/// What reads them as `f64` sees one: four of the five would be taken for repeats of the first.
#[tokio::test]
async fn five_lines_whose_ids_have_twenty_digits_are_five_events() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-digits")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let ids: Vec<String> = (0..5).map(|n| format!("8949020000123456789{n}")).collect();
    let mut input: String = ids.iter().map(|id| format!("{{\"iccid\":{id}}}\n")).collect();
    input.insert(0, '\u{feff}');
    let arguments = ["--exchange", "there", "--type", "good.sim", "--source", "/sims", "--id", "/iccid"];
    let (account, stderr) = lab.send_raw(input.into_bytes(), &arguments).await?;
    ensure!(account["confirmed"] == json!(5), "{account} {stderr}");
    let stored = lab.take_all("there.good").await?;
    let found: Vec<_> = stored.iter().map(|message| message.message_id.clone().unwrap_or_default()).collect();
    ensure!(found == ids, "{found:?}");
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_sent_again_has_the_same_ids() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-again")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let file = lab.path("orders.jsonl");
    std::fs::write(&file, "{\"a\":1}\n{\"a\":1}\n\n{\"a\":2}\n")?;
    let mut rounds = Vec::new();
    for _ in 0..2 {
        let path = file.to_str().context("UTF-8")?;
        let output = send(&lab, &["--exchange", "there", "--type", "good.order", path], Vec::new()).await?;
        expect_exit(&output, 0)?;
        rounds.push(ids(&lab.take_all("there.good").await?));
    }
    ensure!(rounds[0] == rounds[1] && rounds[0].len() == 3, "{rounds:?}");
    ensure!(rounds[0].iter().collect::<HashSet<_>>().len() == 3, "equal lines have one id: {rounds:?}");
    Ok(())
}

#[tokio::test]
async fn a_rate_is_kept() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-rate")?;
    exchange(&lab, "there", &[("order.#", "classic", 0)]).await?;
    for (rate, count) in [(200, 2000), (5, 50)] {
        let rate_text = rate.to_string();
        let mut sender = lab.sender(&events(count, 10), &["--exchange", "there", "--rate", &rate_text])?;
        ensure!(sender.wait(PATIENCE).await?.success(), "{}", sender.log());
        let account = sender.account()?;
        let seconds = account["seconds"].as_f64().context("seconds")?;
        let measured = count as f64 / seconds;
        println!("{measured:.1}/s of {rate}/s");
        ensure!((measured / f64::from(rate) - 1.0).abs() < 0.2, "{measured:.1}/s instead of {rate}/s: {account}");
    }
    Ok(())
}

#[tokio::test]
async fn the_exit_code_says_what_kind_of_failure_it_was() -> anyhow::Result<()> {
    let mut lab = Lab::new("publishing-exit")?;
    exchange(&lab, "there", &[("good.#", "quorum", 0)]).await?;
    let good = format!("{}\n", event("g", "good.a", "k", json!({}))).into_bytes();
    let there = ["--exchange", "there"];
    expect_exit(&send(&lab, &there, good.clone()).await?, 0)?;
    expect_exit(&send(&lab, &there, Vec::new()).await?, 0)?;
    let nobody = format!("{}\n", event("n", "bad.a", "k", json!({}))).into_bytes();
    expect_exit(&send(&lab, &there, nobody).await?, 1)?;
    expect_exit(&send(&lab, &["--exchange", "missing"], good.clone()).await?, 1)?;
    expect_exit(&send(&lab, &["--colour"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["--rate", "0"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["--window", "5000"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["--key", "/k"], good.clone()).await?, 64)?;
    expect_exit(&send(&lab, &["/not/a/file"], good.clone()).await?, 64)?;
    let url = lab.url();
    lab.set("WARREN_CONNECT_TIMEOUT", "1s");
    // Nothing listens there, and no other test is given this port meanwhile.
    let closed = "127.0.0.1:1";
    lab.set("AMQP_URL", &format!("amqp://guest:guest@{closed}/x"));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains(closed) && stderr.contains("AMQP_URL"), "{stderr}");
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    lab.set("AMQP_URL", &format!("amqp://guest:guest@{}/x", silent.local_addr()?));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains("does not answer"), "{stderr}");
    lab.set("AMQP_URL", &url.replace("guest:guest@", "guest:wrong@"));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains("user 'guest'") && !stderr.contains("wrong"), "{stderr}");
    lab.set("AMQP_URL", &format!("{url}-not-there"));
    let (_, stderr) = expect_exit(&send(&lab, &there, good.clone()).await?, 69)?;
    ensure!(stderr.contains("vhost"), "{stderr}");
    lab.set("AMQP_URL", "not a url");
    expect_exit(&send(&lab, &there, good.clone()).await?, 64)?;
    lab.set("AMQP_URL", &url);
    lab.set("WARREN_PUBLISH_TIMEOUT", "soon");
    let (_, stderr) = expect_exit(&send(&lab, &there, good).await?, 64)?;
    ensure!(stderr.contains("WARREN_PUBLISH_TIMEOUT"), "{stderr}");
    Ok(())
}

#[tokio::test]
async fn an_interrupt_prints_the_account_of_what_was_sent() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-interrupt")?;
    exchange(&lab, "there", &[("order.#", "classic", 0)]).await?;
    let mut sender = lab.sender(&events(50_000, 10), &["--exchange", "there", "--rate", "500"])?;
    let since = Instant::now();
    while lab.depth("there.order").await?.is_none_or(|(ready, _)| ready < 300) {
        ensure!(since.elapsed() < PATIENCE, "nothing is sent: {}", sender.log());
    }
    sender.signal(rustix::process::Signal::INT)?;
    let status = sender.wait(Duration::from_secs(20)).await?;
    ensure!(status.code() == Some(1), "what was not read is not sent: {status}: {}", sender.log());
    let account = sender.account()?;
    let number = |name: &str| account[name].as_u64().unwrap_or(u64::MAX);
    ensure!(number("read") == number("confirmed") + number("refused") + number("unknown"), "{account}");
    ensure!(number("read") < 50_000 && number("refused") == 0, "{account}");
    let stored = ids(&lab.take_all("there.order").await?);
    let stored_count = stored.len() as u64;
    ensure!(number("confirmed") <= stored_count, "{account}, {stored_count} are stored");
    ensure!(stored_count <= number("confirmed") + number("unknown"), "{account}, {stored_count} are stored");
    ensure!(stored.iter().enumerate().all(|(i, id)| *id == format!("e{i}")), "not a prefix of the input");
    ensure!(sender.log().contains("interrupted"), "{}", sender.log());
    Ok(())
}

#[tokio::test]
async fn an_interrupt_before_the_first_line_ends_it_too() -> anyhow::Result<()> {
    use rustix::process::Signal;
    // A terminal that goes is no other matter.
    for (name, signal) in [("publishing-interrupt-idle", Signal::INT), ("publishing-hangup-idle", Signal::HUP)] {
        let lab = Lab::new(name)?;
        exchange(&lab, "there", &[("order.#", "classic", 0)]).await?;
        let mut child = streaming(&lab, &["--exchange", "there"])?;
        let stdin = child.stdin.take();
        let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())).context("it runs")?;
        until("it is connected", PATIENCE, || lab.connections("send").is_ok_and(|names| !names.is_empty())).await?;
        rustix::process::kill_process(pid, signal)?;
        let output = tokio::time::timeout(Duration::from_secs(20), child.wait_with_output())
            .await
            .context("it still runs")??;
        drop(stdin);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let account: Value = serde_json::from_str(stdout.lines().last().with_context(|| stderr.clone().into_owned())?)?;
        ensure!(account["read"] == json!(0), "{account} {stderr}");
    }
    Ok(())
}

fn streaming(lab: &Lab, arguments: &[&str]) -> anyhow::Result<tokio::process::Child> {
    let mut command = command("warren-publisher", &lab.environment);
    command.arg("send").args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(tokio::process::Command::from(command).kill_on_drop(true).spawn()?)
}

#[tokio::test]
async fn a_line_on_stdin_is_published_at_once() -> anyhow::Result<()> {
    let lab = Lab::new("publishing-stream")?;
    exchange(&lab, "there", &[("order.#", "quorum", 0)]).await?;
    let mut child = streaming(&lab, &["--exchange", "there", "-"])?;
    let mut stdin = child.stdin.take().context("piped")?;
    for (i, line) in events(5, 1).iter().enumerate() {
        stdin.write_all(format!("{line}\n").as_bytes()).await?;
        stdin.flush().await?;
        let since = Instant::now();
        while lab.depth("there.order").await? != Some((u32::try_from(i + 1)?, 0)) {
            ensure!(since.elapsed() < Duration::from_secs(20), "line {i} waits for more input");
        }
        println!("line {i} is stored after {:?}", since.elapsed());
    }
    // The last line of a stream may lack its newline.
    stdin.write_all(event("last", "order.placed", "k", json!({})).to_string().as_bytes()).await?;
    drop(stdin);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await??;
    let (stdout, _) = expect_exit(&output, 0)?;
    let account: Value = serde_json::from_str(stdout.lines().last().context("an account")?)?;
    ensure!(account["read"] == json!(6) && account["confirmed"] == json!(6), "{account}");
    Ok(())
}
