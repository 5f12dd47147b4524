//! The topology as values. The same value declares, checks and draws.
use crate::lane::{Lane, Lanes, NORMAL};
use crate::pattern::Pattern;
use crate::retry::{LADDER, Step};
use crate::wire::{LANE, Message};

/// The bus: one topic exchange for all pools. Routing key = event type.
pub const BUS: &str = "warren.events";

/// How the partitions' queues are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueType {
    /// Replicated; the default.
    Quorum,
    /// With `x-max-priority`, for upstream systems that set AMQP's own priority.
    Classic,
}

/// Which order is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Events of one key in broker order: one active consumer a partition.
    Key,
    /// None: all workers compete on all partitions.
    None,
}

/// Where a pool's events come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// The exchange; [`BUS`] or an upstream team's own topic exchange.
    pub exchange: String,
    /// Which routing keys.
    pub pattern: Pattern,
    /// The type of its messages that bring none: neither a `type` nor a routing key, as from a fanout exchange.
    pub kind: Option<String>,
}

/// Gives a plain message that brings neither a type nor a routing key the type that its exchange's subscription names.
pub fn give_type(subscriptions: &[Subscription], message: &mut Message) {
    if !message.routing_key.is_empty() || message.kind.as_ref().is_some_and(|kind| !kind.is_empty()) {
        return;
    }
    let of = |subscription: &&Subscription| subscription.exchange == message.exchange && subscription.kind.is_some();
    if let Some(subscription) = subscriptions.iter().find(of) {
        message.kind.clone_from(&subscription.kind);
    }
}

/// The broker's side of one pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The pool's name.
    pub pool: String,
    /// Its lanes.
    pub lanes: Lanes,
    /// Partitions a lane, fixed for the pool's life.
    pub partitions: u16,
    /// How partitions are kept.
    pub queue_type: QueueType,
    /// Which order is kept.
    pub order: Order,
    /// Where its events come from.
    pub subscriptions: Vec<Subscription>,
}

/// An argument of a declaration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A string.
    Text(String),
    /// A number.
    Int(i64),
    /// A flag.
    Flag(bool),
}

impl std::fmt::Display for Argument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Int(i) => write!(f, "{i}"),
            Self::Flag(flag) => write!(f, "{flag}"),
        }
    }
}

/// Arguments by name.
pub type Arguments = Vec<(&'static str, Argument)>;

/// An exchange's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By pattern of the routing key.
    Topic,
    /// By headers.
    Headers,
    /// To all.
    Fanout,
    /// By hash of the key.
    ConsistentHash,
}

impl Kind {
    /// As AMQP names it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Topic => "topic",
            Self::Headers => "headers",
            Self::Fanout => "fanout",
            Self::ConsistentHash => "x-consistent-hash",
        }
    }
}

/// One thing to declare. All are durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Declaration {
    /// An exchange of ours.
    Exchange {
        /// Its name.
        name: String,
        /// Its kind.
        kind: Kind,
        /// Its arguments.
        arguments: Arguments,
    },
    /// An exchange of somebody else: it must exist, and is left as it is.
    Foreign {
        /// Its name.
        name: String,
    },
    /// A queue.
    Queue {
        /// Its name.
        name: String,
        /// Its arguments.
        arguments: Arguments,
    },
    /// A binding.
    Binding {
        /// From this exchange.
        source: String,
        /// To this exchange or queue.
        destination: Destination,
        /// By this routing key.
        key: String,
        /// By these headers.
        arguments: Arguments,
    },
}

/// Where a binding leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An exchange.
    Exchange(String),
    /// A queue.
    Queue(String),
}

impl Destination {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Exchange(name) | Self::Queue(name) => name,
        }
    }
}

/// A net, not a policy: it counts every return, also those of a broker's restart (BROKER: until 4.2).
pub const DELIVERY_LIMIT: i64 = 200;
/// Where letters are only looked at, no number of looks may drop one.
const NEVER: i64 = 1_000_000_000;
/// How long a partition waits for a consumer whose broker node is gone before the next in line is served, in ms. RabbitMQ 4.3
/// waits a minute if nobody says otherwise; earlier ones do not wait at all, and do not know the argument.
const DISCONNECTED: i64 = 2_000;

impl Topology {
    /// The pool's door: a headers exchange that sorts events into lanes.
    #[must_use]
    pub fn door(&self) -> String {
        format!("warren.{}", self.pool)
    }

    /// The exchange that partitions a lane; its queues add `.p00` and so on.
    #[must_use]
    pub fn lane(&self, lane: &str) -> String {
        format!("warren.{}.{lane}", self.pool)
    }

    /// A partition's queue. Zero-padded: the ring is rebuilt in the order of names.
    #[must_use]
    pub fn partition(&self, lane: &str, partition: u16) -> String {
        format!("warren.{}.{lane}.p{partition:02}", self.pool)
    }

    /// A delay's exchange, which has the name of its queue.
    #[must_use]
    pub fn delay(&self, step: Step) -> String {
        format!("warren.{}.delay.{}", self.pool, step.name)
    }

    /// Where dead letters go, exchange and queue.
    #[must_use]
    pub fn dead(&self) -> String {
        format!("warren.{}.dead", self.pool)
    }

    /// The safety net, exchange and queue: must stay empty.
    #[must_use]
    pub fn unrouted(&self) -> String {
        format!("warren.{}.unrouted", self.pool)
    }

    /// Where the workers of the pool speak to each other.
    #[must_use]
    pub fn fleet(&self) -> String {
        format!("warren.{}.fleet", self.pool)
    }

    /// Where workers find out whether their node still has the cluster behind it, exchange and queue. It keeps one message.
    #[must_use]
    pub fn probe(&self) -> String {
        format!("warren.{}.probe", self.pool)
    }

    /// All partitions' queues, lane by lane.
    #[must_use]
    pub fn queues(&self) -> Vec<String> {
        let lane = |lane: &Lane| (0..self.partitions).map(|p| self.partition(&lane.name, p)).collect::<Vec<_>>();
        self.lanes.iter().flat_map(lane).collect()
    }

    /// The bus alone: what a publisher needs.
    #[must_use]
    pub fn bus() -> Vec<Declaration> {
        vec![exchange(BUS, Kind::Topic, vec![])]
    }

    /// Everything, in the order in which it must be declared.
    #[must_use]
    pub fn declarations(&self) -> Vec<Declaration> {
        let mut all = Vec::new();
        let net = |arguments: &mut Arguments, to: String| arguments.push(("alternate-exchange", Argument::Text(to)));

        // First: only these need a plugin, and a broker without it is to be left as it was.
        for lane in self.lanes.iter() {
            let mut arguments = vec![("hash-property", Argument::Text("correlation_id".into()))];
            net(&mut arguments, self.unrouted());
            all.push(exchange(&self.lane(&lane.name), Kind::ConsistentHash, arguments));
        }
        all.extend(Self::bus());
        // Each worker binds a queue of its own to it.
        all.push(exchange(&self.fleet(), Kind::Fanout, vec![]));
        all.extend(sink(&self.unrouted(), vec![]));
        all.extend(sink(&self.dead(), vec![]));
        all.extend(sink(&self.probe(), vec![("x-max-length", Argument::Int(1))]));
        let mut arguments = vec![];
        net(&mut arguments, self.lane(NORMAL));
        all.push(exchange(&self.door(), Kind::Headers, arguments));

        for lane in self.lanes.iter() {
            for partition in 0..self.partitions {
                let name = self.partition(&lane.name, partition);
                all.push(Declaration::Queue { name, arguments: self.partition_arguments() });
            }
        }
        for step in LADDER {
            let name = self.delay(step);
            let ttl = i64::try_from(step.ttl.as_millis()).unwrap_or(i64::MAX);
            let mut arguments = quorum(NEVER);
            arguments.push(("x-message-ttl", Argument::Int(ttl)));
            arguments.extend(dead_letter_to(&self.door()));
            all.push(exchange(&name, Kind::Fanout, vec![]));
            all.push(Declaration::Queue { name: name.clone(), arguments });
            all.push(bind(&name, Destination::Queue(name.clone()), "", vec![]));
        }

        for lane in self.lanes.iter() {
            // In ascending order and each once: the ring must be rebuilt alike after a restart.
            for partition in 0..self.partitions {
                let queue = self.partition(&lane.name, partition);
                all.push(bind(&self.lane(&lane.name), Destination::Queue(queue), "1", vec![]));
            }
            let headers = vec![("x-match", Argument::Text("all".into())), (LANE, Argument::Text(lane.name.clone()))];
            all.push(bind(&self.door(), Destination::Exchange(self.lane(&lane.name)), "", headers));
        }
        let foreign = self.subscriptions.iter().filter(|subscription| subscription.exchange != BUS);
        all.extend(foreign.map(|subscription| Declaration::Foreign { name: subscription.exchange.clone() }));
        // Last: events flow in only when all that catches them is there.
        all.extend(self.inflow());
        all
    }

    /// The bindings by which events flow into the pool.
    fn inflow(&self) -> impl Iterator<Item = Declaration> {
        let bound = |Subscription { exchange, pattern, .. }: &Subscription| {
            bind(exchange, Destination::Exchange(self.door()), pattern.as_str(), vec![])
        };
        self.subscriptions.iter().map(bound)
    }

    /// Everything but the bindings by which events flow in.
    #[must_use]
    pub fn declarations_but_inflow(&self) -> Vec<Declaration> {
        let mut all = self.declarations();
        all.truncate(all.len() - self.subscriptions.len());
        all
    }

    /// What somebody should know who takes events of other teams' exchanges.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let theirs = || self.subscriptions.iter().filter(|subscription| subscription.exchange != BUS);
        for Subscription { exchange, .. } in theirs().filter(|theirs| theirs.pattern.as_str() == "#") {
            if !theirs().any(|other| other.exchange == *exchange && other.kind.is_some()) {
                notes.push(format!(
                    "a message of '{exchange}' without type and routing key, as fanout exchanges bring them, is dead-lettered: \
                     write {exchange}:#=order.placed to name its type"
                ));
            }
        }
        if theirs().next().is_some() && self.order == Order::Key && self.queue_type == QueueType::Quorum {
            notes.push(
                "RabbitMQ 4 lets messages with a higher AMQP priority overtake others of their key: have upstream set none, or the \
                 same for all of a key"
                    .into(),
            );
        }
        notes
    }

    fn partition_arguments(&self) -> Arguments {
        let mut arguments = match self.queue_type {
            QueueType::Quorum => {
                let mut arguments = quorum(DELIVERY_LIMIT);
                arguments.extend(dead_letter_to(&self.dead()));
                arguments.push(("x-consumer-disconnected-timeout", Argument::Int(DISCONNECTED)));
                arguments
            }
            QueueType::Classic => vec![
                ("x-queue-type", Argument::Text("classic".into())),
                ("x-max-priority", Argument::Int(10)),
                ("x-dead-letter-exchange", Argument::Text(self.dead())),
            ],
        };
        if self.order == Order::Key {
            arguments.push(("x-single-active-consumer", Argument::Flag(true)));
        }
        arguments
    }
}

/// An exchange and the queue behind it, of one name.
fn sink(name: &str, more: Arguments) -> [Declaration; 3] {
    [
        exchange(name, Kind::Fanout, vec![]),
        Declaration::Queue { name: name.into(), arguments: [quorum(NEVER), more].concat() },
        bind(name, Destination::Queue(name.into()), "", vec![]),
    ]
}

fn exchange(name: &str, kind: Kind, arguments: Arguments) -> Declaration {
    Declaration::Exchange { name: name.into(), kind, arguments }
}

fn bind(source: &str, destination: Destination, key: &str, arguments: Arguments) -> Declaration {
    Declaration::Binding { source: source.into(), destination, key: key.into(), arguments }
}

fn quorum(limit: i64) -> Arguments {
    vec![("x-queue-type", Argument::Text("quorum".into())), ("x-delivery-limit", Argument::Int(limit))]
}

/// At least once, which needs `reject-publish`. No routing key: the event keeps its own.
fn dead_letter_to(exchange: &str) -> Arguments {
    vec![
        ("x-dead-letter-exchange", Argument::Text(exchange.into())),
        ("x-dead-letter-strategy", Argument::Text("at-least-once".into())),
        ("x-overflow", Argument::Text("reject-publish".into())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn topology() -> Topology {
        Topology {
            pool: "orders".into(),
            lanes: Lanes::parse("high:6,normal:3,low:1").expect("valid"),
            partitions: 12,
            queue_type: QueueType::Quorum,
            order: Order::Key,
            subscriptions: vec![Subscription {
                exchange: "theirs".into(),
                pattern: Pattern::parse("order.#").expect("valid"),
                kind: None,
            }],
        }
    }

    #[test]
    fn whatever_is_named_was_declared_before() {
        let (mut known, mut alternates) = (HashSet::new(), HashSet::new());
        for declaration in topology().declarations() {
            match declaration {
                Declaration::Exchange { name, arguments, .. } => {
                    alternates.extend(arguments.into_iter().filter_map(|(_, value)| match value {
                        Argument::Text(text) if text.starts_with("warren.") => Some(text),
                        _ => None,
                    }));
                    assert!(known.insert(name));
                }
                Declaration::Foreign { name } => assert!(known.insert(name)),
                Declaration::Queue { name, arguments } => {
                    let dlx = arguments.iter().find(|(n, _)| *n == "x-dead-letter-exchange");
                    if let Some((_, Argument::Text(exchange))) = dlx {
                        assert!(known.contains(exchange), "{name} dead-letters into {exchange}");
                    }
                    assert!(arguments.iter().any(|(n, _)| *n == "x-queue-type"));
                    assert!(!arguments.iter().any(|(n, _)| *n == "x-dead-letter-routing-key"));
                    known.insert(name);
                }
                Declaration::Binding { source, destination, .. } => {
                    // No binding leads in while anything that catches what falls through is not there.
                    assert!(known.contains(&source) && known.contains(destination.name()));
                    assert!(alternates.is_subset(&known) || !known.contains(&topology().door()), "{source}");
                }
            }
        }
    }

    #[test]
    fn no_lane_can_take_the_name_of_another_part_of_the_pool() {
        let topology = topology();
        let own = |name: &str| name.strip_prefix(&format!("{}.", topology.door())).map(str::to_owned);
        for declaration in topology.declarations() {
            let (Declaration::Exchange { name, .. } | Declaration::Queue { name, .. }) = declaration else { continue };
            let Some(rest) = own(&name) else { continue };
            let word = rest.split('.').next().unwrap_or_default();
            let is_lane = topology.lanes.position(word).is_some();
            assert!(is_lane || Lanes::parse(&format!("normal:1,{word}:1")).is_err(), "a lane could be called '{word}'");
        }
    }

    #[test]
    fn a_message_without_a_type_gets_that_of_its_exchange_and_no_other_does() {
        let subscription = |exchange: &str, kind: Option<&str>| Subscription {
            exchange: exchange.into(),
            pattern: Pattern::parse("#").expect("valid"),
            kind: kind.map(str::to_owned),
        };
        let all = [subscription("a", None), subscription("a", Some("order.placed")), subscription("b", None)];
        let kind = |exchange: &str, key: &str, kind: Option<&str>| {
            let (exchange, routing_key, kind) = (exchange.into(), key.into(), kind.map(str::to_owned));
            let mut message = Message { exchange, routing_key, kind, ..Message::default() };
            give_type(&all, &mut message);
            message.kind
        };
        assert_eq!(kind("a", "", None).as_deref(), Some("order.placed"));
        assert_eq!(kind("a", "", Some("")).as_deref(), Some("order.placed"));
        assert_eq!(kind("a", "", Some("own")).as_deref(), Some("own"));
        assert_eq!((kind("a", "key", None), kind("b", "", None), kind("c", "", None)), (None, None, None));
    }

    #[test]
    fn partitions_are_bound_once_each_in_ascending_order() {
        let queues: Vec<String> = topology()
            .declarations()
            .into_iter()
            .filter_map(|d| match d {
                Declaration::Binding { source, destination: Destination::Queue(queue), key, .. }
                    if source == "warren.orders.low" =>
                {
                    assert_eq!(key, "1");
                    Some(queue)
                }
                _ => None,
            })
            .collect();
        let mut sorted = queues.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!((queues.len(), &queues), (12, &sorted));
    }
}
