//! Spans of handlers reach a collector (OTLP over HTTP), and what a handler emits belongs to its span.
//! This crate builds the worker with `otlp`; `make lint` checks it without.
use anyhow::{Context, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use warren_tests::{Fleet, Lab, event};

const PATIENCE: Duration = Duration::from_secs(60);

/// A collector that keeps what it is sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

impl Collector {
    async fn start() -> anyhow::Result<(Self, String)> {
        let (collector, listener) = (Self::default(), TcpListener::bind("127.0.0.1:0").await?);
        let url = format!("http://{}", listener.local_addr()?);
        let keeper = collector.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(keeper.clone().serve(stream));
            }
        });
        Ok((collector, url))
    }

    async fn serve(self, stream: TcpStream) -> anyhow::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let (mut line, mut length, mut first) = (String::new(), 0, String::new());
            while stream.read_line(&mut line).await? > 0 && line != "\r\n" {
                if first.is_empty() {
                    first.clone_from(&line);
                }
                if let Some(found) = line.to_lowercase().strip_prefix("content-length:") {
                    length = found.trim().parse()?;
                }
                line.clear();
            }
            ensure!(first.starts_with("POST /v1/traces "), "{first}");
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await?;
            let request = ExportTraceServiceRequest::decode(body.as_slice())?;
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(request);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
        }
    }

    fn spans(&self) -> Vec<Span> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let scopes = all.iter().flat_map(|request| &request.resource_spans).flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn of<'a>(spans: &'a [Span], id: &str) -> Vec<&'a Span> {
    let names = |span: &Span| {
        let id = span.attributes.iter().find(|a| a.key == "messaging.message.id").and_then(|a| a.value.clone());
        format!("{:?}", id.and_then(|id| id.value))
    };
    spans.iter().filter(|span| names(span).contains(&format!("{id:?}"))).collect()
}

#[tokio::test]
async fn a_trace_goes_from_the_publisher_through_the_handler_to_what_it_emits() -> anyhow::Result<()> {
    let (collector, url) = Collector::start().await?;
    let mut lab = Lab::new("traces")?;
    lab.set("WARREN_ROUTES", "");
    lab.set("WARREN_SUBSCRIBE", "order.#");
    lab.set("WARREN_LOG_FORMAT", "json");
    lab.set("OTEL_EXPORTER_OTLP_ENDPOINT", &url);
    lab.set("OTEL_SERVICE_NAME", "orders");
    lab.declare().await?;
    lab.gather().await?;
    let trace = |n: usize| format!("{:032x}", 0xabc_0000 + n);
    let of_trace = |id: &str, n: usize, data: Value| {
        let mut event = event(id, "order.placed", id, data);
        event["traceparent"] = json!(format!("00-{}-00f067aa0ba902b7-01", trace(n)));
        event
    };
    let all = [
        of_trace("quick", 1, json!({})),
        of_trace("slow", 2, json!({"sleep": 1})),
        of_trace("fails", 3, json!({"fail": 1})),
        event("untraced", "order.placed", "untraced", json!({})),
    ];
    let ids = lab.send(&all).await?;
    let mut fleet = Fleet::default();
    let name = fleet.start(&lab)?;
    lab.settled(ids.len(), PATIENCE).await?;
    let log = fleet.workers.get(&name).context("it runs")?.log();
    fleet.stop(&lab).await?;

    // The drain sent the last ones.
    let spans = collector.spans();
    for (id, trace) in [("quick", trace(1)), ("slow", trace(2))] {
        let [span] = of(&spans, id)[..] else { anyhow::bail!("one span of {id}: {spans:?}") };
        ensure!(hex(&span.trace_id) == trace && hex(&span.parent_span_id) == "00f067aa0ba902b7", "{span:?}");
        ensure!(span.kind == SpanKind::Consumer as i32 && span.name == "process order.placed", "{span:?}");
        let took = Duration::from_nanos(span.end_time_unix_nano - span.start_time_unix_nano);
        ensure!((took > Duration::from_millis(990)) == (id == "slow"), "{id} took {took:?}");
    }
    let failed = of(&spans, "fails");
    ensure!(failed.len() == 2 && failed.iter().all(|span| hex(&span.trace_id) == trace(3)), "{failed:?}");
    let status = |span: &&Span| span.status.as_ref().is_some_and(|status| status.code == StatusCode::Error as i32);
    ensure!(failed.iter().filter(|span| !status(span)).count() == 1, "all but the last failed: {failed:?}");

    let emitted = lab.take_all("effects").await?;
    ensure!(emitted.len() == ids.len(), "{} events came out", emitted.len());
    for message in emitted {
        let event = message.read(Default::default(), String::new).map_err(|e| anyhow::anyhow!("{e}"))?.event;
        let key = event.key().into_owned();
        let parent = event.extension("traceparent").map(ToString::to_string).context("it has a trace")?;
        let spans = of(&spans, &key);
        let last = spans.iter().find(|span| !status(span)).context("a span that went well")?;
        let expected = format!("00-{}-{}-01", hex(&last.trace_id), hex(&last.span_id));
        ensure!(parent == expected, "{key}: {parent}, not {expected}");
    }

    // One line of the log, one object; the failure names its event in every way that one may look for it.
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let line = lines.iter().find(|line| line["id"] == "fails").with_context(|| log.clone())?;
    ensure!(line["trace_id"] == trace(3) && line["type"] == "order.placed" && line["key"] == "fails", "{line}");
    ensure!(line["attempt"] == 1 && line["partition"].as_str().is_some_and(|p| p.contains(".p")), "{line}");
    Ok(())
}
