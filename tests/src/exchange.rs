//! An exchange and queues for tests that need no pool.
use crate::Lab;
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use warren_shared::Message;

/// A topic exchange with a queue for each pattern, of a type, holding at most so many messages (0 = no limit).
///
/// # Errors
/// The broker refuses.
pub async fn exchange(lab: &Lab, name: &str, queues: &[(&str, &str, i64)]) -> anyhow::Result<()> {
    let (_connection, channel) = lab.channel().await?;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(name.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    for (pattern, kind, most) in queues {
        let queue = format!("{name}.{}", pattern.split('.').next().unwrap_or_default());
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString((*kind).into()));
        if *most > 0 {
            arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(*most));
            arguments.insert("x-overflow".into(), AMQPValue::LongString("drop-head".into()));
        }
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.as_str().into(), durable, arguments).await?;
        let options = QueueBindOptions::default();
        channel.queue_bind(queue.into(), name.into(), (*pattern).into(), options, FieldTable::default()).await?;
    }
    Ok(())
}

/// The messages' ids, in order.
#[must_use]
pub fn ids(messages: &[Message]) -> Vec<String> {
    messages.iter().filter_map(|message| message.message_id.clone()).collect()
}
