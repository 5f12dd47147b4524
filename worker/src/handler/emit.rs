//! `emit: <type>`: events of that type, with the data that the route's transform makes of the event, or with the event's own.
use super::filtered::run;
use super::{Call, Handler, Outcome, Reply};
use crate::jq::Jq;
use futures_util::future::BoxFuture;
use serde_json::value::RawValue;
use std::collections::BTreeMap;

pub(super) struct Emit {
    pub(super) kind: String,
    /// Each of its outputs is the data of one event.
    pub(super) transform: Option<Jq>,
}

/// The members of an event that are its data.
const DATA: [&str; 3] = ["datacontenttype", "data", "data_base64"];

impl Handler for Emit {
    fn handle(&self, call: Call) -> BoxFuture<'static, Outcome> {
        let (kind, transform) = (serde_json::Value::from(self.kind.as_str()).to_string(), self.transform.clone());
        Box::pin(async move {
            let bodies = match transform {
                Some(transform) => match run(transform, "transform", &call).await {
                    Ok(outputs) => outputs.iter().map(|json| body(&kind, &[("data", json)])).collect(),
                    Err(outcome) => return outcome,
                },
                None => vec![own(&kind, &call)],
            };
            let mut reply = Reply::done();
            for (i, body) in bodies.iter().enumerate() {
                match call.emitted(i, body) {
                    Ok(event) => reply = reply.emit(event),
                    Err(error) => return Outcome::Dead { error: format!("emit: event {} is wrong: {error}", i + 1) },
                }
            }
            Outcome::Done(reply)
        })
    }
}

/// The event with the data as it came.
fn own(kind: &str, call: &Call) -> Vec<u8> {
    let text = call.event.to_json();
    // Raw, so that numbers stay as they are written.
    let members: BTreeMap<&str, &RawValue> = serde_json::from_str(&text).unwrap_or_default();
    let data = DATA.iter().filter_map(|name| Some((*name, members.get(name)?.get().as_bytes())));
    body(kind, &data.collect::<Vec<_>>())
}

fn body(kind: &str, members: &[(&str, impl AsRef<[u8]>)]) -> Vec<u8> {
    let mut out = format!("{{\"type\":{kind}").into_bytes();
    for (name, json) in members {
        out.extend_from_slice(format!(",\"{name}\":").as_bytes());
        out.extend_from_slice(json.as_ref());
    }
    out.push(b'}');
    out
}
