//! `warren-publisher relay`: what is committed to an outbox is published as `send` would, and what cannot be says why.
use anyhow::{Context, ensure};
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};
use warren_publisher::Publisher;
use warren_shared::topology::BUS;
use warren_shared::wire::LANE;
use warren_shared::{Event, Limits, Message};
use warren_tests::outbox::{Outbox, Written, number};
use warren_tests::process::{command, expect_exit, output};
use warren_tests::{Lab, Postgres, event, exchange, ids, length, until};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_arrive_as_send_would_publish_them() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-attributes").await?;
    let client = outbox.client().await?;
    client
        .batch_execute(
            "BEGIN;
             INSERT INTO warren_outbox (event_id, source, type, key, lane, subject, time, data, traceparent, extensions)
               VALUES ('a', '/shop', 'order.placed', 'c7', 'gold', 'order/1', '2024-05-01 12:00:00.12+02',
                 '{\"total\" : 1.50}', '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
                 '{\"sequence\": \"7\", \"dry\": true, \"big\": 9007199254740993, \"dataschema\": \"/s\"}');
             INSERT INTO warren_outbox (event_id, source, type, key, time, content_type, data_bytes)
               VALUES ('b', '/shop', 'order.scanned', 'c7', '2024-05-01T10:00:00Z', 'image/png', '\\x89504e4700ff');
             INSERT INTO warren_outbox (event_id, source, type, subject, time, extensions)
               VALUES ('c', '/shop', 'order.urgent', 's', '2024-05-01T10:00:00Z', '{\"priority\": 9}');
             COMMIT;
             BEGIN;
             INSERT INTO warren_outbox (source, type, data) VALUES ('/shop', 'order.never', '1');
             ROLLBACK",
        )
        .await?;
    let account = outbox.once(0).await?;
    ensure!(account["published"] == json!(3) && account["refused"] == json!(0), "{account}");
    let relayed = outbox.lab.take_all("warren.events.order").await?;

    let lines = [
        json!({"specversion": "1.0", "id": "a", "source": "/shop", "type": "order.placed", "partitionkey": "c7",
            "subject": "order/1", "time": "2024-05-01T10:00:00.12Z", "datacontenttype": "application/json",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "sequence": "7", "dry": true,
            "big": 9_007_199_254_740_993_i64, "dataschema": "/s", "data": {"total": 1.5}}),
        json!({"specversion": "1.0", "id": "b", "source": "/shop", "type": "order.scanned", "partitionkey": "c7",
            "time": "2024-05-01T10:00:00Z", "datacontenttype": "image/png", "data_base64": "iVBORwD/"}),
        json!({"specversion": "1.0", "id": "c", "source": "/shop", "type": "order.urgent", "subject": "s",
            "time": "2024-05-01T10:00:00Z", "datacontenttype": "application/json", "priority": 9}),
    ];
    let (first, rest) = lines.split_first().context("lines")?;
    outbox.lab.send_raw(format!("{first}\n").into_bytes(), &["--lane", "gold"]).await?;
    outbox.lab.send(rest).await?;
    let mut sent = outbox.lab.take_all("warren.events.order").await?;
    // JSON is published as it was written.
    sent[0].body = b"{\"total\" : 1.50}".to_vec();
    let sorted = |mut messages: Vec<Message>| {
        // Those of one key keep their order; others may overtake them.
        messages.sort_by(|a, b| a.message_id.cmp(&b.message_id));
        messages.iter_mut().for_each(|message| message.headers.sort_by(|a, b| a.0.cmp(&b.0)));
        messages
    };
    let (relayed, sent) = (sorted(relayed), sorted(sent));
    ensure!(relayed == sent, "{relayed:#?} instead of {sent:#?}");
    ensure!(relayed[0].header(LANE) == Some(&"gold".into()) && relayed[2].header(LANE) == Some(&"high".into()));
    let again = outbox.once(0).await?;
    ensure!(again["published"] == json!(0), "{again}");
    println!("ledger: published 3, confirmed 3, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_cannot_be_published_say_why_and_stop_nobody() -> anyhow::Result<()> {
    let mut outbox = Outbox::new("relay-bad").await?;
    outbox.lab.set("WARREN_BODY_LIMIT", "1000");
    let client = outbox.client().await?;
    let bad = [
        ("lane", "lane", "'Gold!'", "'lane' is 'Gold!'"),
        ("json", "data_bytes", "'{\"a\":'", "not valid JSON"),
        ("twice", "data", "'{\"a\":1,\"a\":2}'", "names a member twice"),
        ("utf8", "data_bytes", "'\\xff'", "not UTF-8"),
        ("large", "data", "to_json(repeat('x', 1001))", "has 1003 bytes, the limit is 1000"),
        ("huge", "data_bytes", "convert_to(repeat('x', 30000000), 'UTF8')", "the limit is 1000"),
        ("key", "key", "repeat('k', 256)", "'partitionkey' has 256 bytes"),
        ("subject", "subject", "E'a\\nb'", "control characters"),
        ("own", "extensions", "'{\"partitionkey\": \"x\"}'", "has a column of its own (key)"),
        ("list", "extensions", "'[1]'", "not a JSON object"),
        ("name", "extensions", "'{\"Not A Name\": 1}'", "has a name that is not"),
        ("time", "time", "'infinity'", ""),
    ];
    let insert = |id: &str, column: &str, value: &str, kind: &str| {
        format!(
            "INSERT INTO warren_outbox (event_id, source, type, {column}) VALUES ('{id}', '/s', '{kind}', {value});"
        )
    };
    let mut sql = String::new();
    for (n, (id, column, value, _)) in bad.iter().enumerate() {
        sql.push_str(&insert(&format!("good{n}"), "key", "'k'", "order.placed"));
        sql.push_str(&insert(id, column, value, "order.placed"));
    }
    sql.push_str(&insert("type", "key", "'k'", ""));
    sql.push_str(&insert("nobody", "key", "'k'", "nobody.listens"));
    sql.push_str(&insert("last", "key", "'k'", "order.placed"));
    client.batch_execute(&sql).await?;
    let account = outbox.once(1).await?;
    println!("{account}");
    let rows = client.query("SELECT event_id, error FROM warren_outbox WHERE error IS NOT NULL", &[]).await?;
    let errors: HashMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let others = [("type", "", "", "'type' is empty"), ("nobody", "", "", "nobody subscribes")];
    for (id, _, _, wanted) in bad.iter().chain(&others).filter(|(_, _, _, wanted)| !wanted.is_empty()) {
        let said = errors.get(*id).with_context(|| format!("{id} has no error: {errors:?}"))?;
        println!("{id}: {said}");
        ensure!(said.contains(wanted), "{id}: {said}");
    }
    ensure!(account["refused"] == json!(errors.len()), "{account}");
    let heard = ids(&outbox.lab.take_all("warren.events.order").await?);
    let good: Vec<&String> = heard.iter().filter(|id| id.starts_with("good")).collect();
    ensure!(good.len() == bad.len() && good.iter().enumerate().all(|(n, id)| **id == format!("good{n}")), "{heard:?}");
    ensure!(heard.last().is_some_and(|id| id == "last"), "{heard:?}");

    // Both bodies at once are refused by the table itself.
    let both = "INSERT INTO warren_outbox (source, type, data, data_bytes) VALUES ('/s', 'order.a', '{}', '{}')";
    ensure!(client.batch_execute(both).await.is_err());
    // Whoever mends the cause clears the error.
    client.batch_execute("UPDATE warren_outbox SET lane = 'gold', error = NULL WHERE event_id = 'lane'").await?;
    let account = outbox.once(1).await?;
    ensure!(account["published"] == json!(1) && account["refused"] == json!(0), "{account}");
    let (confirmed, refused) = (heard.len() + 1, errors.len() - 1);
    let published = confirmed + refused;
    println!(
        "ledger: published {published}, confirmed {confirmed}, refused {refused}, repeats 0, inversions 0, lost 0"
    );
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_holds_its_keys_and_no_others() -> anyhow::Result<()> {
    let mut outbox = Outbox::new("relay-full").await?;
    outbox.lab.set("WARREN_PUBLISH_TIMEOUT", "3s");
    let (_connection, channel) = outbox.lab.channel().await?;
    let mut arguments = lapin::types::FieldTable::default();
    arguments.insert("x-max-length".into(), lapin::types::AMQPValue::LongLongInt(3));
    arguments.insert("x-overflow".into(), lapin::types::AMQPValue::LongString("reject-publish".into()));
    channel.queue_declare("full".into(), Default::default(), arguments).await?;
    channel.queue_bind("full".into(), BUS.into(), "narrow.#".into(), Default::default(), Default::default()).await?;
    let client = outbox.client().await?;
    // More rows of full keys than are taken at once, and more keys, stand before the others.
    client
        .batch_execute(
            "INSERT INTO warren_outbox (event_id, source, type, key)
               SELECT 'n' || i, '/s', 'narrow.a', 'n' || i % 800 FROM generate_series(100, 1299) i;
             INSERT INTO warren_outbox (event_id, source, type, key)
               SELECT 'o' || i, '/s', 'order.a', 'o' || i % 5 FROM generate_series(100, 199) i",
        )
        .await?;
    let account = outbox.once(1).await?;
    println!("{account}");
    let others = ids(&outbox.lab.take_all("warren.events.order").await?);
    ensure!(others.len() == 100, "{} of the others", others.len());
    let mut heard = ids(&outbox.lab.take_all("full").await?);
    ensure!(heard.len() == 3, "{heard:?}");
    // A wide queue beside the full one, and then in its place: what the full one refused is in the wide one already.
    channel.queue_declare("wide".into(), Default::default(), Default::default()).await?;
    channel.queue_bind("wide".into(), BUS.into(), "narrow.#".into(), Default::default(), Default::default()).await?;
    let relay = outbox.relay("relay", &[])?;
    until("keys are held", PATIENCE, || relay.log().contains("does not take the next row")).await?;
    channel.queue_delete("full".into(), Default::default()).await?;
    outbox.empty().await?;
    heard.extend(ids(&outbox.lab.take_all("wide").await?));
    let (mut seen, mut last) = (HashSet::new(), HashMap::new());
    for id in heard.iter().filter(|id| seen.insert(id.as_str())) {
        let n: u32 = id[1..].parse()?;
        ensure!(last.insert(n % 800, n).is_none_or(|before| before < n), "{id} comes late");
    }
    let (repeats, lost) = (heard.len() - seen.len(), 1200 - seen.len());
    println!("ledger: published 1300, confirmed 1300, repeats {repeats}, inversions 0, lost {lost}");
    ensure!(lost == 0);
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_wakes_an_idle_relay() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-wake").await?;
    let sink = outbox.sink().await?;
    let relay = outbox.relay("relay", &[])?;
    until("it publishes", PATIENCE, || relay.log().contains("this relay publishes")).await?;
    let client = outbox.client().await?;
    let mut written = Written::default();
    let mut latencies = Vec::new();
    for n in 0..length(9, 21) {
        // At another moment of the relay's second each time.
        tokio::time::sleep(Duration::from_millis(1000 + n * 47)).await;
        let id = format!("i{n}");
        let since = Instant::now();
        let sql = "INSERT INTO warren_outbox (event_id, source, type, key, data) \
                   VALUES ($1, '/s', 'order.a', 'k', json_build_object('n', $2::bigint))";
        client.execute(sql, &[&id, &i64::try_from(n)?]).await?;
        written.committed.push(id);
        while sink.heard().len() < written.committed.len() {
            ensure!(since.elapsed() < Duration::from_secs(20), "nothing comes: {}", relay.log());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        latencies.push(since.elapsed());
    }
    latencies.sort();
    let median = latencies[latencies.len() / 2];
    println!("from the insert to the queue: {median:?} median, {:?} at most", latencies.last());
    ensure!(median < Duration::from_millis(200), "{latencies:?}");
    // Looking every second alone, half of them would take longer.
    ensure!(latencies.iter().filter(|l| **l > Duration::from_millis(500)).count() <= 1, "{latencies:?}");
    outbox.account(&written, &sink).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_trigger_rows_are_found_by_looking() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-look").await?;
    let client = outbox.client().await?;
    client.batch_execute("DROP TRIGGER warren_outbox_notify ON warren_outbox").await?;
    let relay = outbox.relay("relay", &["--keep", "1s"])?;
    until("it publishes", PATIENCE, || relay.log().contains("this relay publishes")).await?;
    let insert = "INSERT INTO warren_outbox (source, type, key) \
                  SELECT '/s', 'order.a', 'k' || i % 100 FROM generate_series(1, 5000) i";
    client.batch_execute(insert).await?;
    outbox.empty().await?;
    // Sent rows go after the time that they are kept.
    let since = Instant::now();
    while number(&client, "SELECT count(*) FROM warren_outbox").await? > 0 {
        ensure!(since.elapsed() < PATIENCE, "rows stay: {}", relay.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let heard = ids(&outbox.lab.take_all("warren.events.order").await?);
    let distinct = heard.iter().collect::<HashSet<_>>().len();
    println!(
        "ledger: published 5000, confirmed {}, repeats {}, inversions 0, lost {}",
        heard.len(),
        heard.len() - distinct,
        5000 - distinct
    );
    ensure!(heard.len() == 5000 && distinct == 5000);
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_many_rows_a_second_go_out() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-rate").await?;
    let client = outbox.client().await?;
    let (many, few) = (length(3_000, 20_000), length(500, 2_000));
    for (rows, keys) in [(many, many), (many, 100), (few, 1)] {
        let insert = format!(
            "INSERT INTO warren_outbox (source, type, key, data) SELECT '/s', 'order.a', 'k' || i % {keys}, \
             json_build_object('n', i, 'text', repeat('x', 300)) FROM generate_series(1, {rows}) i"
        );
        client.batch_execute(&insert).await?;
        let account = outbox.once(0).await?;
        let rate = account["published"].as_f64().unwrap_or(0.0) / account["seconds"].as_f64().unwrap_or(1.0);
        println!("{rows} rows of {keys} keys: {rate:.0} a second {account}");
        ensure!(account["published"] == json!(rows), "{account}");
        outbox.lab.take_all("warren.events.order").await?;
    }
    let all = 2 * many + few;
    println!("ledger: published {all}, confirmed {all}, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_ends_beside_another_relay_and_tells_what_is_left() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-once").await?;
    let relay = outbox.relay("relay", &[])?;
    until("it publishes", PATIENCE, || relay.log().contains("this relay publishes")).await?;
    let client = outbox.client().await?;
    client.batch_execute("INSERT INTO warren_outbox (source, type) VALUES ('/s', 'order.a')").await?;
    let account = outbox.once(0).await?;
    ensure!(account["published"] == json!(0), "{account}");
    ensure!(outbox.lab.take_all("warren.events.order").await?.len() == 1);
    client.batch_execute("INSERT INTO warren_outbox (source, type) VALUES ('/s', 'nobody.a')").await?;
    let (_, stderr) = expect_exit(&outbox.run(&["--once"]).await?, 1)?;
    ensure!(stderr.contains("left in the table: 1 row"), "{stderr}");
    println!("ledger: published 1, confirmed 1, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_another_name_and_schema_is_relayed_too() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-table").await?;
    let client = outbox.client().await?;
    client.batch_execute("CREATE SCHEMA app").await?;
    let table = "app.It's an \u{f6}utbox";
    expect_exit(&outbox.run(&["--table", table, "--apply"]).await?, 0)?;
    let (_, stderr) = expect_exit(&outbox.run(&["--table", table, "--apply"]).await?, 0)?;
    ensure!(stderr.contains("was there already"), "{stderr}");
    let insert = "INSERT INTO app.\"It's an \u{f6}utbox\" (source, type) VALUES ('/s', 'order.a')";
    client.batch_execute(insert).await?;
    expect_exit(&outbox.run(&["--table", table, "--once"]).await?, 0)?;
    ensure!(outbox.lab.take_all("warren.events.order").await?.len() == 1);
    expect_exit(&outbox.run(&["--table", "a.b.c"]).await?, 64)?;
    expect_exit(&outbox.run(&["--table", "a\"b"]).await?, 64)?;
    // What --ddl prints makes the same table by hand.
    let (ddl, _) = expect_exit(&outbox.run(&["--table", "app.by_hand", "--ddl"]).await?, 0)?;
    client.batch_execute(&ddl).await?;
    expect_exit(&outbox.run(&["--table", "app.by_hand", "--once"]).await?, 0)?;
    println!("ledger: published 1, confirmed 1, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_used_is_said_with_its_cure() -> anyhow::Result<()> {
    let name = "relay-startup";
    let mut lab = Lab::new(name)?;
    lab.set("WARREN_CONNECT_TIMEOUT", "1s");
    let postgres = Postgres::shared(name)?;
    let mut outbox = Outbox { lab, postgres };
    let url = outbox.postgres.url().to_owned();
    let closed = "postgres://warren:hunter2@127.0.0.1:1/x".to_owned();
    let cases = [
        ("sqlite:///tmp/x.db".to_owned(), 64, "DATABASE_URL: names SQLite"),
        (String::new(), 64, "DATABASE_URL: names SQLite or nothing"),
        ("mysql://a:hunter2@b/c".to_owned(), 64, "DATABASE_URL: is neither of the form"),
        ("postgres://warren:hunter2@h/x?sslmode=maybe".to_owned(), 64, "sslmode"),
        (url.clone(), 69, "--apply"),
        (url.replace("warren:warren@", "warren:hunter2@"), 69, "correct user and password in DATABASE_URL"),
        (url.replace(name, "not-there"), 69, "create that database"),
        (closed, 69, "no database for 1s"),
    ];
    for (url, code, wanted) in cases {
        outbox.lab.set("DATABASE_URL", &url);
        let (_, stderr) = expect_exit(&outbox.run(&[]).await?, code)?;
        println!("{code}: {}", stderr.lines().last().unwrap_or_default());
        ensure!(stderr.contains(wanted) && !stderr.contains("hunter2"), "{stderr}");
    }
    outbox.lab.set("DATABASE_URL", &url);
    // The other commands do not read it.
    outbox.lab.set("DATABASE_URL", "nonsense");
    let mut send = command("warren-publisher", &outbox.lab.environment);
    send.arg("send");
    expect_exit(&output(send, Vec::new()).await?, 0)?;
    outbox.lab.set("DATABASE_URL", &url);
    expect_exit(&outbox.run(&["--apply"]).await?, 0)?;
    let (_, stderr) = expect_exit(&outbox.run(&[]).await?, 69)?;
    ensure!(stderr.contains("warren-publisher declare"), "{stderr}");
    println!("69: {}", stderr.lines().last().unwrap_or_default());
    exchange(&outbox.lab, BUS, &[]).await?;
    let client = outbox.client().await?;
    client.batch_execute("ALTER TABLE warren_outbox DROP COLUMN lane").await?;
    let (_, stderr) = expect_exit(&outbox.run(&[]).await?, 69)?;
    ensure!(stderr.contains("is not an outbox") && stderr.contains("lane"), "{stderr}");
    println!("69: {}", stderr.lines().last().unwrap_or_default());
    for wrong in [&["--keep", "soon"][..], &["--keep", "0s"], &["--once", "--apply"], &["--colour"]] {
        expect_exit(&outbox.run(wrong).await?, 64)?;
    }
    println!("ledger: published 0, confirmed 0, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_rust_goes_with_its_transaction() -> anyhow::Result<()> {
    let outbox = Outbox::new("relay-enqueue").await?;
    let mut client = outbox.client().await?;
    let limits = Limits::default();
    let mut first = event("1", "order.placed", "c7", json!({"total": 1.5, "text": "\u{0}schön"}));
    for (name, value) in [
        ("time", json!("2024-05-01T10:00:00.25Z")),
        ("datacontenttype", json!("application/json")),
        ("dataschema", json!("/s")),
        ("sequence", json!("7")),
        ("priority", json!(8)),
        ("dry", json!(true)),
        ("traceparent", json!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
    ] {
        first[name] = value;
    }
    let bytes = r#"{"specversion":"1.0","id":"2","source":"/s","type":"order.b","subject":"s","time":"2024-05-01T10:00:00Z",
        "datacontenttype":"image/png","data_base64":"iVBORwD/"}"#;
    let bare =
        r#"{"specversion":"1.0","id":"3","source":"/s","type":"order.c","time":"2024-05-01T10:00:00Z","data":[1]}"#;
    let events: Vec<Event> = [first.to_string().as_str(), bytes, bare]
        .iter()
        .map(|text| Event::from_json(text.as_bytes(), limits))
        .collect::<Result<_, _>>()?;
    let tx = client.transaction().await?;
    for event in &events {
        Publisher::enqueue(&tx, event).await?;
    }
    tx.commit().await?;
    let tx = client.transaction().await?;
    Publisher::enqueue(&tx, &Event::new("never", "/s", "order.never")?).await?;
    tx.rollback().await?;
    outbox.once(0).await?;
    let messages = outbox.lab.take_all("warren.events.order").await?;
    let read: Vec<Event> =
        messages.iter().map(|m| Ok(m.read(limits, String::new)?.event)).collect::<anyhow::Result<_>>()?;
    ensure!(read == events, "{read:#?} instead of {events:#?}");
    println!("ledger: published 3, confirmed 3, repeats 0, inversions 0, lost 0");
    outbox.lab.tell();
    Ok(())
}
