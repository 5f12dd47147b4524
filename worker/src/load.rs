//! How busy this worker is: asks the loop and the broker every few seconds, and sets the gauges that an operator and an
//! autoscaler read.
use crate::admin::Vitals;
use crate::metrics::{self, names};
use crate::pipeline::Order as Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use warren_publisher::log;
use warren_publisher::publish::Health;
use warren_shared::load::{Count, Load, Window};
use warren_shared::topology::Topology;

/// How often the broker is asked for depths.
const LOOK: u32 = 5;
/// How long it may take.
const ANSWER: Duration = Duration::from_secs(10);

/// What is looked at.
pub(crate) struct Gauges {
    vitals: Vitals,
    orders: mpsc::UnboundedSender<Command>,
    /// The dead and the unrouted queue.
    nets: [String; 2],
    window: Window,
    /// Log lines whose loss is counted.
    lost: u64,
}

impl Gauges {
    pub(crate) fn new(
        vitals: Vitals,
        orders: mpsc::UnboundedSender<Command>,
        topology: &Topology,
        capacity: usize,
        work_off: Duration,
    ) -> Self {
        metrics::set(names::CAPACITY, capacity as f64);
        let window = Window::new(capacity, work_off.as_secs_f64());
        Self { vitals, orders, nets: [topology.dead(), topology.unrouted()], window, lost: 0 }
    }

    /// Until the loop has ended.
    pub(crate) async fn watch(mut self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut served, mut turn) = (Arc::default(), 0_u32);
        loop {
            tick.tick().await;
            self.look();
            turn += 1;
            if !turn.is_multiple_of(LOOK) {
                continue;
            }
            let owned = self.vitals.seats.owned();
            // Their backlog is no arrival.
            if std::mem::replace(&mut served, owned.clone()) != owned {
                self.window.restart();
            }
            let Ok(depths) = tokio::time::timeout(ANSWER, self.depths(&owned)).await else { continue };
            let Some(ready) = depths else { continue };
            let (tell, told) = oneshot::channel();
            let _ = self.orders.send(Command::Count(tell));
            let Ok(count) = told.await else { return };
            set(&self.window.count(Count { backlog: count.backlog + ready, ..count }));
        }
    }

    /// What the process knows by itself.
    fn look(&mut self) {
        let Vitals { subscriptions, publisher, draining, .. } = &self.vitals;
        metrics::count(names::BLOCKED, u64::from(*publisher.borrow() != Health::Open));
        metrics::set(names::DRAINING, f64::from(u8::from(draining.load(Ordering::Relaxed))));
        let lost = log::dropped();
        metrics::count(names::LOG_DROPPED, lost - std::mem::replace(&mut self.lost, lost));
        metrics::set(names::PROVED, subscriptions.proved() as f64 / 1000.0);
    }

    /// What is ready in the queues that this worker serves. Those that several serve are shared out among their consumers.
    async fn depths(&self, owned: &[String]) -> Option<u64> {
        let subscriptions = &self.vitals.subscriptions;
        // Apart from each other: one that may not be looked at costs a question for each.
        let asked = (subscriptions.depths(owned).await, subscriptions.depths(&self.nets).await);
        let (depths, nets) = match asked {
            (Ok(depths), Ok(nets)) => (depths, nets),
            (Err(error), _) | (_, Err(error)) => {
                tracing::debug!(%error, "the queues' depths cannot be had now");
                return None;
            }
        };
        for (name, net) in [names::DEAD_LETTERS, names::UNROUTED].into_iter().zip(nets) {
            // What this worker may not see, it does not tell.
            if let Some(net) = net {
                metrics::set(name, f64::from(net.ready));
            }
        }
        let depth = |n: usize| depths.get(n).copied().flatten().unwrap_or_default();
        let shares = if self.vitals.seats.are_shared() { |consumers: u32| consumers.max(1) } else { |_| 1 };
        Some((0..owned.len()).map(|n| u64::from(depth(n).ready / shares(depth(n).consumers))).sum())
    }
}

fn set(load: &Load) {
    let Load { arrivals, departures: _, service, rate, stay, inside, utilization, backlog, work, wanted } = *load;
    metrics::set(names::BACKLOG, backlog);
    metrics::set(names::ARRIVALS, arrivals);
    metrics::set(names::RATE, rate);
    metrics::set(names::SERVICE, service);
    metrics::set(names::STAY, stay);
    metrics::set(names::INSIDE, inside);
    metrics::set(names::UTILIZATION, utilization);
    metrics::set(names::WORK, work);
    metrics::set(names::WANTED, wanted);
}
