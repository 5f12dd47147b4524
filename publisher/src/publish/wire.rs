//! One channel and what is in flight on it: chunks out, confirms and returns in, each message with its own outcome.
use super::{Confirmed, Entry, Outcome, Refused};
use crate::broker::Link;
use crate::codec;
use crate::seal::Seal;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, Error, PublisherConfirm};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use warren_shared::Message;

/// How long the confirms of a channel that ended may take to say so.
const ENDING: Duration = Duration::from_secs(1);

/// The broker's answer to come, for a message.
pub(super) struct Confirm(u64, PublisherConfirm);

impl Future for Confirm {
    type Output = (u64, lapin::Result<Confirmation>);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let sequence = self.0;
        Pin::new(&mut self.1).poll(context).map(|answer| (sequence, answer))
    }
}

/// A message between its publish and its outcome.
pub(super) struct Flight {
    pub(super) entry: Entry,
    since: Instant,
    confirmed: Option<Outcome>,
    returned: Option<Refused>,
}

/// A message as it is written.
pub(super) struct Ready {
    sequence: u64,
    message: Arc<Message>,
    properties: BasicProperties,
    address: (ShortString, ShortString),
}

/// One channel and what is in flight on it.
pub(super) struct Wire {
    channel: Channel,
    pub(super) blocked: watch::Receiver<Option<String>>,
    pub(super) confirms: FuturesUnordered<Confirm>,
    /// What has no outcome yet, by number: in order of publishing. Queues answer at their own pace.
    pub(super) flying: BTreeMap<u64, Flight>,
    /// Those of them that the broker has answered.
    answered: Vec<u64>,
    /// When it answered last.
    heard: Instant,
    /// The number of the next message.
    next: u64,
    pub(super) failure: Option<Error>,
    /// Bytes of headers that a frame of this connection can hold.
    room: usize,
}

impl Wire {
    pub(super) async fn open(link: &Link) -> Result<Self, Error> {
        let channel = link.connection().create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self {
            channel,
            blocked: link.blocked(),
            confirms: FuturesUnordered::new(),
            flying: BTreeMap::new(),
            answered: Vec::new(),
            heard: Instant::now(),
            next: 0,
            failure: None,
            room: codec::header_room(link.connection().configuration().frame_max()),
        })
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.blocked.borrow().is_some()
    }

    /// Takes messages in flight, as they will be written; returns also what AMQP cannot carry.
    pub(super) fn take_on(
        &mut self,
        entries: impl Iterator<Item = Entry>,
        seal: &Seal,
    ) -> (Vec<Ready>, Vec<(Entry, Refused)>) {
        let (mut ready, mut refused) = (Vec::new(), Vec::new());
        let since = Instant::now();
        for entry in entries {
            let written = seal.close(&entry.message).and_then(|message| {
                let (properties, address) = (codec::write(&message, self.room)?, codec::address(&message)?);
                Ok((message, properties, address))
            });
            match written {
                Ok((message, properties, address)) => {
                    let sequence = self.next;
                    ready.push(Ready { sequence, message, properties, address });
                    self.flying.insert(sequence, Flight { entry, since, confirmed: None, returned: None });
                    self.next += 1;
                }
                Err(error) => refused.push((entry, error.into())),
            }
        }
        (ready, refused)
    }

    /// Publishes a chunk that is in flight already: whatever becomes of the writing, it is repeated or settled.
    pub(super) async fn send(&mut self, ready: Vec<Ready>) {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let publishes = ready.into_iter().map(|Ready { sequence, message, properties, address: (exchange, key) }| {
            let channel = &self.channel;
            async move { (sequence, channel.basic_publish(exchange, key, options, &message.body, properties).await) }
        });
        for (sequence, published) in join_all(publishes).await {
            match published {
                Ok(confirm) => self.confirms.push(Confirm(sequence, confirm)),
                Err(error) => self.fail(error),
            }
        }
    }

    /// Why the channel ended, if it did. A write that meets the closed channel does not know: the confirms do, and all
    /// of them end with the channel.
    pub(super) async fn verdict(&mut self) -> Option<Error> {
        if self.failure.as_ref()?.is_amqp_error() {
            return self.failure.take();
        }
        let ending = async {
            while let Some(confirm) = self.confirms.next().await {
                self.note(confirm);
            }
        };
        let _ = tokio::time::timeout(ENDING, ending).await;
        self.failure.take()
    }

    fn fail(&mut self, error: Error) {
        // The first error is the broker's; those after it only say that the channel is closed.
        if self.failure.as_ref().is_none_or(|first| !first.is_amqp_error()) {
            self.failure = Some(error);
        }
    }

    pub(super) fn note(&mut self, (sequence, confirm): (u64, lapin::Result<Confirmation>)) {
        let (outcome, returned) = match confirm {
            Ok(Confirmation::Ack(returned)) => (Ok(Confirmed(())), returned),
            Ok(Confirmation::Nack(returned)) => (Err(Refused::Rejected), returned),
            Ok(Confirmation::NotRequested) => (Err(Refused::Unknown), None),
            Err(error) => return self.fail(error),
        };
        if let Some(flight) = self.flying.get_mut(&sequence)
            && flight.confirmed.replace(outcome).is_none()
        {
            self.answered.push(sequence);
        }
        let Some(message) = returned else { return };
        let id = message.properties.message_id().as_ref().map(|id| id.as_str());
        let (exchange, key) = (message.exchange.as_str(), message.routing_key.as_str());
        // Copies of one address and id share one fate: whichever the broker meant, all were returned.
        for flight in self.flying.values_mut() {
            let m = &flight.entry.message;
            if m.message_id.as_deref() == id && m.exchange == exchange && m.routing_key == key {
                flight.returned = Some(Refused::Returned {
                    exchange: exchange.to_owned(),
                    routing_key: key.to_owned(),
                    reply: message.reply_text.to_string(),
                });
            }
        }
    }

    /// Looks at every confirm that is resolved, then takes the outcomes that are certain: each by its own confirm, whatever the
    /// broker says of those before it.
    ///
    /// A return precedes its own ack, and the library hands each return to the next confirm that it resolves. So once
    /// a message's own confirm is resolved, its return sits in a confirm resolved no later than by the same answer of
    /// the broker. That answer is applied under the library's lock: taking the lock once (`wait_for_confirms` does so
    /// before its first wait) makes sure that it is applied whole, and draining the ready confirms finds the return.
    pub(super) fn barrier(&mut self) -> Vec<(Entry, Outcome)> {
        use futures_util::FutureExt;
        let mut outcomes = Vec::new();
        self.drain();
        // Draining may resolve more of them: again, until nothing is resolved.
        while self.failure.is_none() && !self.answered.is_empty() {
            self.heard = Instant::now();
            let certain = std::mem::take(&mut self.answered);
            let _ = self.channel.wait_for_confirms().now_or_never();
            self.drain();
            for flight in certain.iter().filter_map(|sequence| self.flying.remove(sequence)) {
                let confirmed = flight.confirmed.unwrap_or(Err(Refused::Unknown));
                outcomes.push((flight.entry, flight.returned.map_or(confirmed, Err)));
            }
        }
        outcomes
    }

    fn drain(&mut self) {
        for confirm in ready(&mut self.confirms) {
            self.note(confirm);
        }
    }

    /// When the oldest message in flight has waited too long. While the broker blocks, nothing is on its way.
    pub(super) fn deadline(&self, timeout: Duration) -> Instant {
        let now = Instant::now();
        let oldest = self.flying.first_key_value().map_or(now, |(_, flight)| flight.since);
        if self.is_blocked() { now + Duration::from_secs(3600) } else { oldest + timeout }
    }

    /// Whether the broker confirmed anything since the oldest message in flight was published.
    pub(super) fn answers_others(&self) -> bool {
        self.flying.first_key_value().is_some_and(|(_, oldest)| self.heard > oldest.since)
    }

    /// Starts the wait anew for what is in flight: the broker did not look at it while it blocked.
    pub(super) fn touch(&mut self) {
        let now = Instant::now();
        self.flying.values_mut().for_each(|flight| flight.since = now);
    }
}

/// Everything that is ready in a set of futures. A set gives way now and then although more of it is ready, and then
/// wakes its task: `now_or_never` alone would take that for the end.
fn ready<F: Future>(futures: &mut FuturesUnordered<F>) -> Vec<F::Output> {
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Release);
        }
    }
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(woken.clone());
    let mut ready = Vec::new();
    loop {
        match futures.poll_next_unpin(&mut Context::from_waker(&waker)) {
            Poll::Ready(Some(output)) => ready.push(output),
            Poll::Ready(None) => return ready,
            Poll::Pending if woken.0.swap(false, Ordering::AcqRel) => {}
            Poll::Pending => return ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_is_found_behind_futures_that_give_way() {
        let futures = FuturesUnordered::new();
        for i in 0..10 {
            // Woken while polled, as by the library's thread.
            let mut polls = 0;
            futures.push(std::future::poll_fn(move |context| {
                polls += 1;
                if i < 9 && polls < 3 {
                    context.waker().wake_by_ref();
                }
                if i == 9 { Poll::Ready(i) } else { Poll::Pending }
            }));
        }
        let mut futures = futures;
        assert_eq!(ready(&mut futures), [9]);
    }
}
