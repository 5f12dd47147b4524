//! The broker's management interface, as far as `check` asks it: what AMQP does not show, bindings and policies. It only reads.
use futures_util::future::try_join;
use reqwest::{Client, StatusCode, Url};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use warren_shared::env::Secret;
use warren_shared::topology::{Argument, DELIVERY_LIMIT, Declaration, Topology};

/// How long it may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// What it shows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Bindings that are not there, each as `source -> destination (key)`.
    pub(crate) missing: Vec<String>,
    /// Policies that take the pool's promises back, each a sentence.
    pub(crate) harmful: Vec<String>,
    /// Queues of which the interface does not tell yet what holds for them: it gathers that every few seconds.
    pub(crate) untold: usize,
}

/// A queue, as far as it is asked for.
#[derive(Deserialize)]
struct Queue {
    name: String,
    policy: Option<String>,
    operator_policy: Option<String>,
    /// An object, or an empty list where there is none; nothing before it was gathered.
    effective_policy_definition: Option<Value>,
}

#[derive(Deserialize)]
struct Binding {
    source: String,
    destination: String,
    routing_key: String,
    #[serde(default)]
    arguments: Value,
}

/// Looks at the pool's bindings and policies.
///
/// # Errors
/// Why they cannot be seen, to be read after "cannot be seen: "; nothing of the URL is part of it.
pub(crate) async fn look(url: &Secret, vhost: &str, topology: &Topology) -> Result<Seen, String> {
    let base = Url::parse(url.reveal()).ok().filter(|url| ["http", "https"].contains(&url.scheme()));
    let base = base.ok_or("it is not a URL of the form http://user:password@host:15672")?;
    let client = client(base.scheme() == "https")?;
    let queues = get::<Vec<Queue>>(&client, &base, "queues", vhost);
    let bindings = get::<Vec<Binding>>(&client, &base, "bindings", vhost);
    let (queues, bindings) = try_join(queues, bindings).await?;
    let prefix = format!("{}.", topology.door());
    let own: Vec<Queue> = queues.into_iter().filter(|queue| queue.name.starts_with(&prefix)).collect();
    let untold = own.iter().filter(|queue| queue.effective_policy_definition.is_none()).count();
    Ok(Seen { missing: missing(topology, bindings), harmful: harmful(topology, &own), untold })
}

fn client(tls: bool) -> Result<Client, String> {
    let mut roots = RootCertStore::empty();
    if tls {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let tls = tls.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let tls = tls.with_root_certificates(roots).with_no_client_auth();
    let client = Client::builder().tls_backend_preconfigured(tls).no_proxy().timeout(ANSWER);
    // The password belongs to this host and to no other.
    client.redirect(reqwest::redirect::Policy::none()).build().map_err(|error| error.to_string())
}

async fn get<T: DeserializeOwned>(client: &Client, base: &Url, what: &str, vhost: &str) -> Result<T, String> {
    let mut url = base.clone();
    url.path_segments_mut().map_err(|()| "it cannot be a base")?.pop_if_empty().extend(["api", what, vhost]);
    // The client writes user and password into a header, and its errors would hold the URL.
    let answer = client.get(url).send().await.map_err(|error| plain(&error))?;
    match answer.status() {
        StatusCode::OK => {}
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            return Err(format!(
                "it answers {status}: the user needs the tag 'management' and a permission for this vhost"
            ));
        }
        status => return Err(format!("it answers {status}")),
    }
    let body = answer.bytes().await.map_err(|error| plain(&error))?;
    serde_json::from_slice(&body).map_err(|_| "its answer is not that of a RabbitMQ".into())
}

fn plain(error: &reqwest::Error) -> String {
    let mut causes = Vec::new();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        causes.push(next.to_string());
        cause = next.source();
    }
    causes
        .pop()
        .unwrap_or_else(|| if error.is_timeout() { "it does not answer".into() } else { "it cannot be asked".into() })
}

type Known = (String, String, String, BTreeMap<String, String>);

fn missing(topology: &Topology, bindings: Vec<Binding>) -> Vec<String> {
    let text = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let there: HashSet<Known> = bindings
        .into_iter()
        .map(|Binding { source, destination, routing_key, arguments }| {
            let arguments = if let Value::Object(all) = arguments { all } else { Map::new() };
            (source, destination, routing_key, arguments.into_iter().map(|(name, value)| (name, text(value))).collect())
        })
        .collect();
    let wanted = topology.declarations().into_iter().filter_map(|declaration| {
        let Declaration::Binding { source, destination, key, arguments } = declaration else { return None };
        let named = |(name, value): (&str, Argument)| (name.to_owned(), value.to_string());
        Some((source, destination.name().to_owned(), key, arguments.into_iter().map(named).collect()))
    });
    let lost = wanted.filter(|binding: &Known| !there.contains(binding));
    lost.map(|(source, destination, key, _)| format!("{source} -> {destination} ({key})")).collect()
}

/// What of a policy is to be looked at, and what it does.
fn harm(key: &str, value: &Value, partition: bool) -> Option<String> {
    let number = value.as_i64();
    let what = match key {
        "delivery-limit" if partition && number.is_some_and(|limit| (0..DELIVERY_LIMIT).contains(&limit)) => {
            "every lost connection and every restart counts, so events die that never failed"
        }
        "delivery-limit" if !partition && number.is_some_and(|limit| limit >= 0) => {
            "a look at the letters counts as a return, so looking at them drops them"
        }
        "message-ttl" => "events die, or come back, before their time",
        "expires" => "the queue is deleted with all that it holds when nobody uses it",
        "max-length" | "max-length-bytes" => "what does not fit is refused, and waits at its publisher",
        "dead-letter-routing-key" => "what the broker lets die loses its own routing key",
        "consumer-timeout" => "it has to be what WARREN_CONSUMER_TIMEOUT says",
        _ => return None,
    };
    Some(format!("{key} {value}: {what}"))
}

/// One sentence for all queues of which the same is true.
fn harmful(topology: &Topology, queues: &[Queue]) -> Vec<String> {
    let partitions: HashSet<String> = topology.queues().into_iter().collect();
    let mut all: Vec<(String, usize, String)> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for queue in queues {
        let Some(Value::Object(effective)) = &queue.effective_policy_definition else { continue };
        let names: Vec<&str> =
            [&queue.policy, &queue.operator_policy].into_iter().flatten().map(String::as_str).collect();
        for (key, value) in effective {
            let Some(what) = harm(key, value, partitions.contains(&queue.name)) else { continue };
            let what = format!("the policy '{}' sets {what}", names.join("' and '"));
            let place = *places.entry(what.clone()).or_insert(all.len());
            match all.get_mut(place) {
                Some((_, more, _)) => *more += 1,
                None => all.push((queue.name.clone(), 0, what)),
            }
        }
    }
    let sentence = |(first, more, what): (String, usize, String)| match more {
        0 => format!("{first}: {what}"),
        more => format!("{first} and {more} more: {what}"),
    };
    all.into_iter().map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use warren_shared::env::Settings;

    fn topology() -> Topology {
        let pairs = [("WARREN_POOL", "orders"), ("WARREN_PARTITIONS", "2"), ("WARREN_LANES", "normal:1")];
        let map = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        crate::config::topology(&Settings::read(&map).expect("valid"), &crate::config::Routes::default())
    }

    #[test]
    fn a_policy_that_kills_innocents_is_named_with_the_queues_that_it_holds_for() {
        let queue = |name: &str, policy: &str, definition: Value| json!({"name": name, "policy": policy, "operator_policy": null, "effective_policy_definition": definition});
        let all = json!([
            queue("warren.orders.normal.p00", "all", json!({"delivery-limit": 5})),
            queue("warren.orders.normal.p01", "all", json!({"delivery-limit": 5})),
            queue("warren.orders.dead", "all", json!({"delivery-limit": 5})),
            queue("warren.orders.delay.1s", "roomy", json!({"queue-leader-locator": "balanced"})),
            {"name": "warren.orders.unrouted", "effective_policy_definition": []},
        ]);
        let said = harmful(&topology(), &serde_json::from_value::<Vec<Queue>>(all).expect("queues"));
        assert_eq!(said.len(), 2, "{said:#?}");
        let wanted = "warren.orders.normal.p00 and 1 more: the policy 'all' sets delivery-limit 5: every lost";
        assert!(said[0].starts_with(wanted), "{said:#?}");
        assert!(said[1].starts_with("warren.orders.dead: the policy 'all' sets delivery-limit 5: a look"), "{said:#?}");
        assert_eq!(harm("delivery-limit", &json!(DELIVERY_LIMIT), true), None);
        assert_eq!(harm("delivery-limit", &json!(-1), true), None);
    }

    #[test]
    fn a_binding_that_is_gone_is_named() {
        let mut all: Vec<Value> = Vec::new();
        for declaration in topology().declarations() {
            let Declaration::Binding { source, destination, key, arguments } = declaration else { continue };
            let arguments: Map<String, Value> =
                arguments.into_iter().map(|(name, value)| (name.to_owned(), json!(value.to_string()))).collect();
            all.push(json!({"source": source, "destination": destination.name(), "routing_key": key, "arguments": arguments}));
        }
        let read = |all: &[Value]| serde_json::from_value::<Vec<Binding>>(json!(all)).expect("bindings");
        assert_eq!(missing(&topology(), read(&all)), Vec::<String>::new());
        let lost = all.iter().position(|b| b["destination"] == "warren.orders.normal.p01").expect("bound");
        all.remove(lost);
        assert_eq!(missing(&topology(), read(&all)), ["warren.orders.normal -> warren.orders.normal.p01 (1)"]);
    }
}
