//! Publishing at the client's best: chunks of `basic_publish` joined from one task, confirms behind them in a window.
use crate::events::{Wire, short};
use anyhow::{Context, ensure};
use futures_util::future::join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Connection, ConnectionProperties, PublisherConfirm};
use std::collections::VecDeque;
use warren_shared::topology::BUS;

/// Unconfirmed messages at most, and how many are written at once.
const WINDOW: usize = 1000;
const CHUNK: usize = 256;

/// A channel that publishes to the bus.
pub(crate) struct Loader {
    connection: Connection,
    channel: Channel,
    waiting: VecDeque<PublisherConfirm>,
    kind: lapin::types::ShortString,
}

impl Loader {
    /// Connects.
    pub(crate) async fn connect(url: &str, kind: &str) -> anyhow::Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.context("cannot connect")?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { connection, channel, waiting: VecDeque::with_capacity(WINDOW), kind: short(kind) })
    }

    /// Publishes all of them, and is back when the last is written.
    pub(crate) async fn publish(&mut self, mut messages: impl Iterator<Item = Wire>) -> anyhow::Result<()> {
        loop {
            let chunk: Vec<Wire> = messages.by_ref().take(CHUNK).collect();
            if chunk.is_empty() {
                return Ok(());
            }
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let (channel, exchange) = (&self.channel, short(BUS));
            let publishes = chunk.iter().map(|(properties, body)| {
                channel.basic_publish(exchange.clone(), self.kind.clone(), options, body, properties.clone())
            });
            for confirm in join_all(publishes).await {
                self.waiting.push_back(confirm?);
            }
            self.settle(WINDOW - CHUNK).await?;
        }
    }

    /// Waits until so many confirms at most are missing.
    pub(crate) async fn settle(&mut self, most: usize) -> anyhow::Result<()> {
        while self.waiting.len() > most {
            let Some(confirm) = self.waiting.pop_front() else { break };
            let confirmed = confirm.await?;
            ensure!(confirmed.is_ack(), "the broker refuses a message");
            ensure!(confirmed.take_message().is_none(), "nobody subscribes to the events");
        }
        Ok(())
    }

    /// Waits for the last confirm and disconnects.
    pub(crate) async fn finish(mut self) -> anyhow::Result<()> {
        self.settle(0).await?;
        Ok(self.connection.close(200, short("done")).await?)
    }
}

/// Publishes so many events of a series.
pub(crate) async fn load(url: &str, series: u64, count: u64) -> anyhow::Result<()> {
    let mut loader = Loader::connect(url, crate::events::KIND).await?;
    loader.publish((0..count).map(|n| crate::events::wire(series, n, 0))).await?;
    loader.finish().await
}
