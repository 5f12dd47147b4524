//! Spans of handlers, for who builds with `--features otlp` and names a collector. Without that a trace is only carried: what a
//! handler emits takes the `traceparent` of its event.
#[cfg(feature = "otlp")]
pub(crate) use with::{Span, begin, start, stop};
#[cfg(not(feature = "otlp"))]
pub(crate) use without::{Span, begin, start, stop};

#[cfg(not(feature = "otlp"))]
mod without {
    use crate::handler::{Context, Outcome};
    use warren_shared::Event;

    pub(crate) struct Span;

    impl Span {
        pub(crate) fn end(&mut self, _: &Outcome) {}
    }

    pub(crate) fn begin(event: Event, _: &Context) -> (Event, Span) {
        (event, Span)
    }

    pub(crate) fn start(_: &str) -> Result<(), String> {
        Ok(())
    }

    pub(crate) async fn stop() {}
}

#[cfg(feature = "otlp")]
mod with {
    use crate::handler::{Context, Outcome};
    use opentelemetry::trace::{
        Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
        TracerProvider,
    };
    use opentelemetry::{Context as Parents, KeyValue};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span as SdkSpan};
    use std::sync::OnceLock;
    use std::time::Duration;
    use warren_shared::{Event, Value};

    static EXPORT: OnceLock<(SdkTracerProvider, SdkTracer)> = OnceLock::new();

    /// A handler at work on an event.
    pub(crate) struct Span(Option<SdkSpan>);

    impl Span {
        pub(crate) fn end(&mut self, outcome: &Outcome) {
            let Some(mut span) = self.0.take() else { return };
            // What went wrong may quote an event's data: the log, which the operator guards, says it.
            match outcome {
                Outcome::Retry { .. } | Outcome::NotNow { .. } => {
                    span.set_status(Status::error("it failed, and is tried again"))
                }
                Outcome::Dead { .. } | Outcome::Unclear { .. } => span.set_status(Status::error("it failed for good")),
                Outcome::Interrupted => span.set_attribute(KeyValue::new("warren.interrupted", true)),
                Outcome::Done(_) | Outcome::Recorded { .. } | Outcome::Needs(_) => {}
            }
            span.end();
        }
    }

    /// Begins a span, child of the event's trace if it has one; what the handler emits will be a child of the span.
    pub(crate) fn begin(event: Event, context: &Context) -> (Event, Span) {
        let Some((_, tracer)) = EXPORT.get() else { return (event, Span(None)) };
        let parent = event.extension("traceparent").and_then(|trace| parse(&trace.to_string()));
        let parents = parent.map_or_else(Parents::new, |parent| Parents::new().with_remote_span_context(parent));
        let span = tracer
            .span_builder(format!("process {}", event.kind()))
            .with_kind(SpanKind::Consumer)
            .with_attributes([
                KeyValue::new("messaging.system", "rabbitmq"),
                KeyValue::new("messaging.operation.type", "process"),
                KeyValue::new("messaging.destination.name", context.partition.to_string()),
                KeyValue::new("messaging.message.id", event.id().to_owned()),
                KeyValue::new("cloudevents.event_type", event.kind().to_owned()),
                KeyValue::new("cloudevents.event_source", event.source().to_owned()),
                KeyValue::new("warren.key", event.key().into_owned()),
                KeyValue::new("warren.attempt", i64::from(context.attempt)),
            ])
            .start_with_context(tracer, &parents);
        let of = span.span_context();
        let trace = format!("00-{}-{}-{:02x}", of.trace_id(), of.span_id(), of.trace_flags().to_u8());
        let traced = event.clone().with("traceparent", Value::Text(trace));
        (traced.unwrap_or(event), Span(Some(span)))
    }

    /// `00-<trace>-<parent>-<flags>`; anything else is no trace.
    fn parse(trace: &str) -> Option<SpanContext> {
        let mut parts = trace.split('-');
        let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if version.len() != 2 || version == "ff" || trace.len() != 32 || parent.len() != 16 || flags.len() != 2 {
            return None;
        }
        let (trace, parent) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(parent).ok()?);
        let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
        Some(SpanContext::new(trace, parent, flags, true, TraceState::NONE)).filter(SpanContext::is_valid)
    }

    /// Exports from now on, where the environment names a collector (`OTEL_EXPORTER_OTLP_ENDPOINT` and its kin).
    pub(crate) fn start(worker: &str) -> Result<(), String> {
        let named = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
        if !named.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty())) {
            return Ok(());
        }
        // The exporter's HTTP client asks for the process' own; whoever set one before is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().build();
        let exporter = exporter.map_err(|error| format!("{}: {error}", named[0]))?;
        let resource = Resource::builder().with_attribute(KeyValue::new("service.instance.id", worker.to_owned()));
        let resource = match std::env::var("OTEL_SERVICE_NAME") {
            Ok(_) => resource,
            Err(_) => resource.with_service_name("warren-worker"),
        };
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
        let tracer = provider.tracer("warren");
        // A second worker in one process shares the first's.
        let _ = EXPORT.set((provider, tracer));
        tracing::info!("exporting spans by OTLP");
        Ok(())
    }

    /// Sends what is left.
    pub(crate) async fn stop() {
        let Some((provider, _)) = EXPORT.get() else { return };
        let flushed = tokio::task::spawn_blocking(|| provider.force_flush());
        // A collector that is away holds no drain up.
        if !matches!(tokio::time::timeout(Duration::from_secs(3), flushed).await, Ok(Ok(Ok(())))) {
            tracing::warn!("the last spans could not be exported");
        }
    }
}
