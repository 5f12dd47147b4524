//! What cannot be read is dead-lettered with its reason, exactly once, and disturbs nobody.
use anyhow::{Context, ensure};
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;
use warren_tests::frames::{self, Frames, Property};
use warren_tests::raw::Letter;
use warren_tests::{Lab, Process, Raw, event};

const PATIENCE: Duration = Duration::from_secs(90);

const STRUCTURED: &str = "application/cloudevents+json";

/// A message that cannot be read, the word for it, and what the sentence must hold.
struct Case {
    name: &'static str,
    message: Raw,
    reason: &'static str,
    error: &'static str,
}

fn case(name: &'static str, message: Raw, reason: &'static str, error: &'static str) -> Case {
    // All in one partition: what blocks it would block the good events, too.
    let id = if message.properties.message_id().is_some() { message } else { message.id(name) };
    Case { name, message: id.key("k"), reason, error }
}

fn json_body(body: impl Into<Vec<u8>>) -> Raw {
    Raw::new("order.placed", body).content_type("application/json")
}

fn structured(change: impl FnOnce(&mut serde_json::Value)) -> Raw {
    let mut event = event("e", "order.placed", "k", json!({}));
    change(&mut event);
    Raw::new("order.placed", event.to_string()).content_type(STRUCTURED)
}

fn structured_without(name: &str) -> Raw {
    structured(|event| {
        event.as_object_mut().map(|members| members.remove(name));
    })
}

const ATTRIBUTES: [(&str, &str); 4] =
    [("specversion", "1.0"), ("id", "e"), ("source", "/tests"), ("type", "order.placed")];

fn binary(change: impl FnOnce(&mut BTreeMap<&'static str, &'static str>)) -> Raw {
    let mut attributes = BTreeMap::from(ATTRIBUTES);
    change(&mut attributes);
    let attributes: Vec<_> = attributes.into_iter().collect();
    json_body("{}").attributes("cloudEvents_", &attributes)
}

fn binary_without(name: &str) -> Raw {
    binary(|attributes| {
        attributes.remove(name);
    })
}

/// A worker between two good events, and what must be true at the end.
struct Scene {
    lab: Lab,
    worker: Process,
    pid: Option<u32>,
    good: usize,
    /// Events whose death is recorded in the store, beside the good ones.
    dead: usize,
}

impl Scene {
    async fn open(name: &str, more: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut lab = Lab::new(name)?;
        for (variable, value) in more {
            lab.set(variable, value);
        }
        lab.declare().await?;
        let worker = lab.worker()?;
        Ok(Self { pid: worker.pid(), worker, lab, good: 0, dead: 0 })
    }

    /// A good event in the partition of the bad ones.
    async fn good(&mut self) -> anyhow::Result<()> {
        self.good += 1;
        self.lab.send(&[event(&format!("good{}", self.good), "order.placed", "k", json!({}))]).await.map(|_| ())
    }

    async fn close(mut self, letters: usize) -> anyhow::Result<Vec<Letter>> {
        self.good().await?;
        self.lab.settled(self.good + self.dead, PATIENCE).await?;
        let found = self.lab.dead_letters(letters, PATIENCE).await?;
        ensure!(self.worker.is_running() && self.worker.pid() == self.pid, "the worker died: {}", self.worker.log());
        let calls = self.lab.calls();
        let good = calls.iter().filter(|call| call[1].starts_with("good")).count();
        ensure!(good == self.good, "each good event is handled once: {calls:?}");
        ensure!(self.worker.terminate(PATIENCE).await?.success(), "{}", self.worker.log());
        let again = self.lab.letters().await?;
        ensure!(again.len() == letters, "{} letters after the drain, {letters} before", again.len());
        Ok(found)
    }
}

fn judge(cases: &[Case], letters: &[Letter]) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    for Case { name, message, reason, error } in cases {
        let ours: Vec<&Letter> = letters.iter().filter(|letter| letter.id == *name).collect();
        let [letter] = ours[..] else {
            wrong.push(format!("{name}: {} letters", ours.len()));
            continue;
        };
        let (found, said) = (letter.reason(), letter.header("warren-dead-error"));
        if found != *reason || !said.contains(error) {
            wrong.push(format!("{name}: '{found}' ({said}), wanted '{reason}' ({error})"));
        }
        if letter.body != message.body || letter.routing_key != message.routing_key {
            wrong.push(format!("{name}: the letter is not the message that came"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

async fn each_is_dead_lettered(name: &str, cases: Vec<Case>) -> anyhow::Result<()> {
    let mut scene = Scene::open(name, &[]).await?;
    for case in &cases {
        scene.good().await?;
        let published = scene.lab.publish(std::slice::from_ref(&case.message)).await;
        published.with_context(|| format!("publishing {}", case.name))?;
    }
    let letters = scene.close(cases.len()).await?;
    judge(&cases, &letters)
}

#[tokio::test]
async fn bodies_that_cannot_be_read_are_dead_lettered_with_the_reason() -> anyhow::Result<()> {
    let deep = "[".repeat(100_000);
    let cases = vec![
        case("broken", json_body("{\"a\":"), "bad-json", "not valid JSON at line 1, column 5"),
        case("nan", json_body("{\"a\":NaN}"), "bad-json", "line 1, column"),
        case("twice", json_body("{\"a\":1,\"a\":2}"), "duplicate-key", "names a member twice"),
        case("deep", json_body(deep), "too-deep", "nested deeper than 64 levels"),
        case("bytes", json_body(b"{\"a\":\"\xff\"}".to_vec()), "bad-utf8", "invalid byte at offset 6"),
        case(
            "text",
            Raw::new("order.placed", b"caf\xe9".to_vec()).content_type("text/plain"),
            "bad-utf8",
            "invalid byte at offset 3",
        ),
        case("untyped", Raw::new("order.placed", "{\"a\":"), "bad-json", "not valid JSON"),
    ];
    each_is_dead_lettered("malformed-bodies", cases).await
}

#[tokio::test]
async fn structured_events_that_are_none_are_dead_lettered_with_the_reason() -> anyhow::Result<()> {
    let raw = |body: &str| Raw::new("order.placed", body).content_type(STRUCTURED);
    let cases = vec![
        case("half", raw("{\"specversion\":\"1.0\","), "bad-json", "not valid JSON"),
        case("list", raw("[]"), "bad-attribute", "not a JSON object"),
        case("no-id", structured_without("id"), "missing-attribute", "'id' is missing"),
        case("no-type", structured_without("type"), "missing-attribute", "'type' is missing"),
        case("no-source", structured_without("source"), "missing-attribute", "'source' is missing"),
        case("no-version", structured_without("specversion"), "missing-attribute", "'specversion' is missing"),
        case("version", structured(|e| e["specversion"] = json!("2.0")), "bad-specversion", "'2.0'"),
        case(
            "key",
            structured(|e| e["partitionkey"] = json!("x".repeat(300))),
            "bad-attribute",
            "'partitionkey' has 300 bytes, the limit is 255",
        ),
        case("number", structured(|e| e["id"] = json!(7)), "bad-attribute", "'id' is not a string"),
        case("time", structured(|e| e["time"] = json!("yesterday")), "bad-attribute", "'time' is not an RFC 3339 time"),
        case(
            "batch",
            Raw::new("order.placed", "[]").content_type("application/cloudevents-batch+json"),
            "bad-form",
            "cloudevents-batch",
        ),
    ];
    each_is_dead_lettered("malformed-structured", cases).await
}

#[tokio::test]
async fn binary_events_that_are_none_are_dead_lettered_with_the_reason() -> anyhow::Result<()> {
    let big: &'static str = Box::leak("x".repeat(3000).into_boxed_str());
    let mut heavy = binary(|_| ());
    for n in 0..30 {
        heavy = heavy.header(&format!("cloudEvents_x{n}"), big);
    }
    let cases = vec![
        case("no-id", binary_without("id"), "missing-attribute", "'id' is missing"),
        case("no-type", binary_without("type"), "missing-attribute", "'type' is missing"),
        case("no-source", binary_without("source"), "missing-attribute", "'source' is missing"),
        case("no-version", binary_without("specversion"), "missing-attribute", "'specversion' is missing"),
        case(
            "version",
            binary(|a| {
                a.insert("specversion", "0.3");
            }),
            "bad-specversion",
            "'0.3'",
        ),
        case(
            "empty-id",
            binary(|a| {
                a.insert("id", "");
            }),
            "bad-attribute",
            "'id' is empty",
        ),
        case("heavy", heavy, "bad-attribute", "bytes together, the limit is 65536"),
    ];
    each_is_dead_lettered("malformed-binary", cases).await
}

#[tokio::test]
async fn ninety_kilobytes_of_foreign_headers_do_not_stop_an_event() -> anyhow::Result<()> {
    let mut scene = Scene::open("malformed-heavy", &[]).await?;
    let mut heavy = json_body("{}").id("good-heavy").key("k");
    for n in 0..30 {
        heavy = heavy.header(&format!("x-team-{n}"), &"x".repeat(3000));
    }
    scene.good().await?;
    scene.lab.publish(&[heavy]).await?;
    scene.good += 1;
    scene.close(0).await.map(|_| ())
}

#[tokio::test]
async fn headers_of_many_levels_and_texts_that_are_no_text_kill_nobody() -> anyhow::Result<()> {
    let mut scene = Scene::open("malformed-frames", &[]).await?;
    let nested = |levels| frames::table(&[frames::nested(b"deep", levels)]);
    let plain = |name: &str, more: Vec<(Property, Vec<u8>)>| {
        let own =
            [(Property::MessageId, frames::short(name.as_bytes())), (Property::CorrelationId, frames::short(b"k"))];
        [own.to_vec(), more].concat()
    };
    let attributes = ATTRIBUTES.map(|(name, value)| {
        let value: &[u8] = if name == "source" { b"/caf\xe9" } else { value.as_bytes() };
        frames::text(format!("cloudEvents_{name}").as_bytes(), value)
    });
    let messages = [
        ("nested-65", vec![(Property::Headers, nested(66))], "bad-header"),
        ("nested-1200", vec![(Property::Headers, nested(1200))], "bad-header"),
        ("nested-26000", vec![(Property::Headers, nested(26_000))], "bad-header"),
        ("source", vec![(Property::Headers, frames::table(&attributes))], "bad-header"),
    ];
    for (name, properties, _) in &messages {
        scene.good().await?;
        let mut frames = Frames::connect(&scene.lab.url())?;
        frames.publish("warren.events", b"order.placed", &plain(name, properties.clone()), b"{}")?;
    }
    let letters = scene.close(messages.len()).await?;
    for (name, _, reason) in messages {
        let letter = letters.iter().find(|letter| letter.id == name).with_context(|| format!("no letter of {name}"))?;
        ensure!(letter.reason() == reason, "{name}: {letter:?}");
        ensure!(letter.header("warren-dead-error").contains("header '"), "{name}: {letter:?}");
    }
    Ok(())
}

#[tokio::test]
async fn properties_that_are_no_utf8_are_dead_lettered_and_block_no_partition() -> anyhow::Result<()> {
    let mut scene = Scene::open("malformed-properties", &[]).await?;
    let latin = || frames::short(b"caf\xe9");
    let key = || (Property::CorrelationId, frames::short(b"k"));
    let messages = [
        (vec![(Property::MessageId, latin()), key()], b"order.placed".to_vec(), "'id'"),
        (vec![(Property::Type, latin()), key()], b"order.placed".to_vec(), "'type'"),
        (vec![(Property::AppId, latin()), key()], b"order.placed".to_vec(), "'source'"),
        (vec![(Property::ContentType, latin()), key()], b"order.placed".to_vec(), "'datacontenttype'"),
        (vec![key()], b"order.caf\xe9".to_vec(), "'type'"),
        (vec![(Property::CorrelationId, latin())], b"order.placed".to_vec(), "'partitionkey'"),
    ];
    for (properties, routing_key, _) in &messages {
        scene.good().await?;
        Frames::connect(&scene.lab.url())?.publish("warren.events", routing_key, properties, b"{}")?;
    }
    // Nobody asked for such a header: it stays behind.
    let header = frames::table(&[frames::text(b"caf\xe9", b"x")]);
    let harmless = [(Property::Headers, header), (Property::MessageId, frames::short(b"good-header")), key()];
    Frames::connect(&scene.lab.url())?.publish("warren.events", b"order.placed", &harmless, b"{}")?;
    scene.good += 1;
    let letters = scene.close(messages.len()).await?;
    for letter in &letters {
        let error = letter.header("warren-dead-error");
        ensure!(letter.reason() == "bad-attribute" && error.contains("not UTF-8"), "{letter:?}");
    }
    for (_, _, name) in messages {
        let named = letters.iter().any(|letter| letter.header("warren-dead-error").contains(name));
        ensure!(named, "no letter names {name}: {letters:?}");
    }
    Ok(())
}

/// A body in an encoding that is not read, with every property and headers of every type: on the broker, and not only in the codec.
#[tokio::test]
async fn a_letter_keeps_every_property_as_it_came_and_shows_what_can_be_seen() -> anyhow::Result<()> {
    let mut scene = Scene::open("malformed-as-they-came", &[]).await?;
    let mut table = FieldTable::default();
    let mut list = FieldArray::default();
    list.push(AMQPValue::Double(1.5));
    for (name, value) in [
        ("X-Text", AMQPValue::LongString("schön".into())),
        ("latin", AMQPValue::LongString(LongString::from(b"caf\xe9".as_slice()))),
        ("float", AMQPValue::Double(12345678.9)),
        ("time", AMQPValue::Timestamp(1_700_000_000)),
        ("void", AMQPValue::Void),
        ("list", AMQPValue::FieldArray(list)),
    ] {
        table.insert(name.into(), value);
    }
    let came = json_body(b"\x0b\x02\x80".to_vec()).id("packed").key("k").with(|properties| {
        let properties = properties.with_content_encoding("br".into()).with_reply_to("answers".into());
        let properties = properties.with_app_id("shop".into()).with_timestamp(1_700_000_000).with_priority(3);
        properties.with_expiration("3600000".into()).with_headers(table)
    });
    // Neither has a message id: who it is stands in the body.
    let broken = r#"{"specversion":"1.0","id":"seen","source":"/shop","type":"order.placed","data":NaN}"#;
    let broken = Raw::new("order.placed", broken).content_type(STRUCTURED).key("k");
    scene.good().await?;
    scene.lab.publish(&[came.clone(), broken]).await?;
    let letters = scene.lab.dead_letters(2, PATIENCE).await?;
    let dead = scene.lab.dead().await?;
    let wanted =
        [("packed", "bad-encoding"), ("seen", "bad-json")].map(|(id, reason)| (id.to_owned(), reason.to_owned()));
    ensure!(dead == wanted, "{dead:?}");

    let letter = letters.iter().find(|letter| letter.id == "packed").context("a letter")?;
    ensure!(letter.header("warren-dead-expiration") == "3600000", "{letter:?}");
    let mut found = letter.properties.headers().clone().unwrap_or_default().inner().clone();
    found.retain(|name, _| !name.as_str().starts_with("warren-"));
    let wanted = came.properties.headers().clone().unwrap_or_default();
    ensure!(&found == wanted.inner(), "{found:?}");
    let mut bare = letter.properties.clone().with_headers(wanted);
    // Less the one that would take the letter away in an hour.
    bare = bare.with_expiration("3600000".into());
    ensure!(bare == came.properties, "{:?}", letter.properties);
    ensure!(letter.body == came.body, "{letter:?}");
    scene.close(2).await.map(|_| ())
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_dead_lettered_or_refused_by_the_broker() -> anyhow::Result<()> {
    let mut scene = Scene::open("malformed-large", &[]).await?;
    scene.good().await?;
    let body = vec![b' '; 20 << 20];
    let large = json_body(body).id("large").key("k");
    // From RabbitMQ 4.0 on the broker itself takes 16 MiB at most.
    let taken = scene.lab.publish(&[large]).await.is_ok();
    let letters = scene.close(usize::from(taken)).await?;
    if taken {
        ensure!(letters[0].reason() == "too-large" && letters[0].body.len() == 20 << 20, "{}", letters[0].reason());
        let said = letters[0].header("warren-dead-error");
        ensure!(said.contains("20971520 bytes, the limit is 16777216"), "{said}");
    }
    Ok(())
}

#[tokio::test]
async fn the_body_limit_can_be_set() -> anyhow::Result<()> {
    let mut scene = Scene::open("malformed-limit", &[("WARREN_BODY_LIMIT", "1000")]).await?;
    let large = |name, size| json_body(format!("\"{}\"", "x".repeat(size))).id(name).key("k");
    scene.good().await?;
    scene.lab.publish(&[large("good-fits", 998), large("large", 999)]).await?;
    scene.good += 1;
    let lines = format!("{}\n", event("sent", "order.placed", "k", json!("x".repeat(2000))));
    let (account, stderr) = scene.lab.send_raw(lines.into_bytes(), &[]).await?;
    ensure!(account["refused"] == 1 && stderr.contains("the limit is 1000"), "{account} {stderr}");
    let letters = scene.close(1).await?;
    ensure!(letters[0].id == "large" && letters[0].reason() == "too-large", "{letters:?}");
    Ok(())
}

#[tokio::test]
async fn an_event_without_a_route_is_dead_lettered_with_its_type() -> anyhow::Result<()> {
    let mut scene = Scene::open("malformed-route", &[("WARREN_SUBSCRIBE", "strange.#")]).await?;
    scene.good().await?;
    scene.lab.send(&[event("lost", "strange.thing", "k", json!({"a": 1}))]).await?;
    // It is an event, so its death is recorded.
    scene.dead += 1;
    let letters = scene.close(1).await?;
    ensure!(letters[0].id == "lost" && letters[0].reason() == "no-route", "{letters:?}");
    ensure!(letters[0].header("warren-dead-error").contains("'strange.thing'"), "{letters:?}");
    ensure!(letters[0].body == b"{\"a\":1}", "{letters:?}");
    Ok(())
}

#[tokio::test]
async fn send_refuses_lines_that_are_no_events_and_accounts_for_each() -> anyhow::Result<()> {
    let lab = Lab::new("malformed-send")?;
    lab.declare().await?;
    let good = event("good", "order.placed", "k", json!({}));
    let with = |name: &str, value: serde_json::Value| {
        let mut event = good.clone();
        event[name] = value;
        event.to_string().into_bytes()
    };
    let without = |name: &str| {
        let mut event = good.clone();
        event.as_object_mut().map(|members| members.remove(name));
        event.to_string().into_bytes()
    };
    let deep = format!("{{\"data\":{}", "[".repeat(100_000)).into_bytes();
    let refused: Vec<(&str, Vec<u8>)> = vec![
        ("bad-json", b"{\"specversion\":".to_vec()),
        ("bad-json", good.to_string().replace("{}", "{\"a\":NaN}").into_bytes()),
        ("bad-utf8", b"{\"id\":\"\xff\"}".to_vec()),
        ("duplicate-key", b"{\"id\":\"a\",\"id\":\"b\"}".to_vec()),
        ("too-deep", deep),
        ("too-large", format!("\"{}\"", "x".repeat(20 << 20)).into_bytes()),
        ("missing-attribute", without("id")),
        ("missing-attribute", without("type")),
        ("missing-attribute", without("source")),
        ("missing-attribute", without("specversion")),
        ("bad-specversion", with("specversion", json!("2.0"))),
        ("bad-attribute", with("partitionkey", json!("x".repeat(300)))),
        ("returned", with("type", json!("nobody.listens"))),
    ];
    let mut input = good.to_string().into_bytes();
    for (_, line) in &refused {
        input.push(b'\n');
        input.extend(line);
    }
    let rejects = lab.path("rejects");
    let (account, stderr) = lab.send_raw(input, &["--rejects", rejects.to_str().context("UTF-8")?]).await?;
    let all = refused.len() + 1;
    let of = |name: &str| account[name].as_u64().unwrap_or_default();
    ensure!(of("read") == all as u64 && of("confirmed") == 1 && of("unknown") == 0, "{account}\n{stderr}");
    ensure!(of("refused") == refused.len() as u64, "{account}\n{stderr}");
    ensure!(stderr.contains("line 2: the body is not valid JSON at line 2, column"), "{stderr}");
    ensure!(stderr.contains("(--rejects FILE") || stderr.contains("more lines are refused"), "{stderr}");

    let text = std::fs::read_to_string(rejects)?;
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let record: serde_json::Value = serde_json::from_str(line)?;
        let place = record["line"].as_u64().context("a line number")?;
        found.insert(place, record["reason"].as_str().unwrap_or_default().to_owned());
    }
    let wanted = (2..).zip(refused.iter().map(|(reason, _)| (*reason).to_owned())).collect::<BTreeMap<u64, _>>();
    ensure!(found == wanted, "{found:?}");
    Ok(())
}
