//! Declarations on a real broker: compared first, made second, so that a mismatch changes nothing.
use crate::broker::{BrokerError, Link, describe};
use crate::codec::arguments;
use futures_util::future::join_all;
use lapin::options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Error, ErrorKind, ExchangeKind};
use warren_shared::topology::{Declaration, Destination};

/// What the broker has of a declaration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The same.
    Same,
    /// Nothing of that name.
    Missing,
    /// The name, with something else behind it.
    Different(String),
    /// A binding: AMQP cannot ask for it, and making it twice is harmless.
    Unknown,
}

/// Why the topology is not as declared.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeclareError {
    /// Names that are taken by something else. Nothing was changed.
    #[error("{}", mismatches(.0))]
    Mismatch(Vec<String>),
    /// Names that are missing where they must not be made.
    #[error("missing on the broker: {}: declare them with 'warren-worker topology --apply', or set WARREN_DECLARE=auto", .0.join(", "))]
    Missing(Vec<String>),
    /// An upstream team's exchange is not there.
    #[error("the exchange '{0}' of WARREN_SUBSCRIBE does not exist: its owner must declare it, or correct the name")]
    Foreign(String),
    /// The user may not do it.
    #[error(
        "the broker denies it ({0}): grant the user configure, write and read on '^warren\\..+$', or declare with another user and set WARREN_DECLARE=never"
    )]
    Denied(String),
    /// An exchange type is not there.
    #[error(
        "the broker has no exchange type 'x-consistent-hash': run 'rabbitmq-plugins enable rabbitmq_consistent_hash_exchange'"
    )]
    Plugin,
    /// The broker does not make it, for a reason of its own: a limit, an argument that it does not know, a queue that does not
    /// answer.
    #[error("the broker refuses {what} ({said}); {}", left(.made))]
    Refused {
        /// What was asked for.
        what: String,
        /// What it said.
        said: String,
        /// How many exchanges and queues had been made by then.
        made: usize,
    },
    /// The connection failed.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

fn left(made: &usize) -> String {
    match made {
        0 => "nothing was changed: remove the cause, then try again".into(),
        made => format!("{made} exchanges and queues were made before and stay: remove the cause, then try again"),
    }
}

fn mismatches(all: &[String]) -> String {
    let list = all.join("\n  ");
    format!(
        "the broker holds something else under these names:\n  {list}\nnothing was changed: delete what is in the way \
         once it is empty, or choose another WARREN_POOL, or set the variables back"
    )
}

/// Compares every declaration with what the broker has, and changes nothing.
///
/// # Errors
/// The connection failed, or the user may not look.
pub async fn inspect(link: &Link, declarations: &[Declaration]) -> Result<Vec<Found>, DeclareError> {
    let mut scout = Scout { link, channel: None };
    let mut found = Vec::with_capacity(declarations.len());
    for declaration in declarations {
        found.push(scout.look(declaration).await?);
    }
    Ok(found)
}

/// Declares everything, or nothing where something is in the way.
///
/// # Errors
/// What is in the way, or why the broker refuses.
pub async fn apply(link: &Link, declarations: &[Declaration]) -> Result<(), DeclareError> {
    let (bindings, names): (Vec<_>, Vec<_>) = declarations.iter().partition(|d| name(d).is_none());
    // The usual start: all of it is there, as it should be. Nothing is made before that is known.
    if agrees(link, &names, Mode::Passive).await?
        && agrees(link, &names, Mode::Active).await?
        && agrees(link, &bindings, Mode::Active).await?
    {
        return Ok(());
    }
    let found = inspect(link, declarations).await?;
    refuse_different(&found)?;
    for (declaration, found) in declarations.iter().zip(&found) {
        if let (Declaration::Foreign { name }, Found::Missing) = (declaration, found) {
            return Err(DeclareError::Foreign(name.clone()));
        }
    }
    let (mut scout, mut made) = (Scout { link, channel: None }, 0);
    for (declaration, found) in declarations.iter().zip(&found) {
        if *found != Found::Same {
            scout.make(declaration, made).await?;
            made += usize::from(*found == Found::Missing);
        }
    }
    Ok(())
}

/// Makes the bindings among them again, in one go. False where the broker objects to any: something that they lead from or to
/// is gone.
///
/// # Errors
/// The connection failed.
pub async fn bind(link: &Link, declarations: &[Declaration]) -> Result<bool, DeclareError> {
    let bindings: Vec<_> = declarations.iter().filter(|declaration| name(declaration).is_none()).collect();
    agrees(link, &bindings, Mode::Active).await
}

/// Checks that everything is there, and changes nothing.
///
/// # Errors
/// What is missing or different.
pub async fn check(link: &Link, declarations: &[Declaration]) -> Result<(), DeclareError> {
    if agrees(link, &declarations.iter().collect::<Vec<_>>(), Mode::Passive).await? {
        return Ok(());
    }
    let mut scout = Scout { link, channel: None };
    let mut missing = Vec::new();
    for declaration in declarations {
        // Comparing arguments needs the right to configure, which such a worker does not have: it looks for the name.
        let Some(name) = name(declaration) else { continue };
        match scout.exists(declaration).await {
            // 4.3 lets nobody look at what he has no right to at all. A worker has some to whatever it uses itself.
            Err(DeclareError::Denied(_)) => {}
            found => {
                if found? == Found::Missing {
                    missing.push(name.to_owned());
                }
            }
        }
    }
    if missing.is_empty() { Ok(()) } else { Err(DeclareError::Missing(missing)) }
}

/// What a queue holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Messages that wait.
    pub ready: u32,
    /// Who consumes, active or in line.
    pub consumers: u32,
}

/// What queues hold, in their order; none for one that is not there, or that this user may not look at (4.3).
///
/// # Errors
/// The connection failed, or the user may not look.
pub async fn depths(link: &Link, queues: &[String]) -> Result<Vec<Option<Depth>>, DeclareError> {
    let options = QueueDeclareOptions { passive: true, ..Default::default() };
    let look = async |channel: &Channel, queue: &String| {
        let found = channel.queue_declare(short(queue), options, FieldTable::default()).await?;
        Ok::<_, Error>(Depth { ready: found.message_count(), consumers: found.consumer_count() })
    };
    let channel = async || link.connection().create_channel().await.map_err(|e| BrokerError::lost(&e));
    let all = channel().await?;
    let found = join_all(queues.iter().map(|queue| look(&all, queue))).await;
    if found.iter().all(Result::is_ok) {
        // Whoever asks every few seconds must not pile channels up.
        let _ = all.close(200, "done".into()).await;
        return Ok(found.into_iter().map(Result::ok).collect());
    }
    // One that is missing closed the channel: each has to be asked alone.
    let mut depths = Vec::with_capacity(queues.len());
    for queue in queues {
        depths.push(match look(&channel().await?, queue).await {
            Ok(depth) => Some(depth),
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(amqp) => match amqp.kind() {
                    AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND | AMQPSoftError::ACCESSREFUSED) => None,
                    _ => {
                        let what = format!("to look at the queue {queue}");
                        return Err(DeclareError::Refused { what, said: describe(&error), made: 0 });
                    }
                },
                _ => return Err(BrokerError::lost(&error).into()),
            },
        });
    }
    Ok(depths)
}

/// Asks for all in one go. False where the broker objects to any of them; asking one by one tells to which.
async fn agrees(link: &Link, declarations: &[&Declaration], mode: Mode) -> Result<bool, DeclareError> {
    let channel = link.connection().create_channel().await.map_err(|e| BrokerError::lost(&e))?;
    let answers = join_all(declarations.iter().map(|declaration| ask(&channel, declaration, mode))).await;
    let agrees = answers.iter().all(Result::is_ok);
    if agrees {
        let _ = channel.close(200, "done".into()).await;
    }
    Ok(agrees)
}

fn refuse_different(found: &[Found]) -> Result<(), DeclareError> {
    let different: Vec<String> = found
        .iter()
        .filter_map(|found| match found {
            Found::Different(how) => Some(how.clone()),
            _ => None,
        })
        .collect();
    if different.is_empty() { Ok(()) } else { Err(DeclareError::Mismatch(different)) }
}

/// The name that a declaration claims; a binding claims none.
#[must_use]
pub fn name(declaration: &Declaration) -> Option<&str> {
    match declaration {
        Declaration::Exchange { name, .. } | Declaration::Foreign { name } | Declaration::Queue { name, .. } => {
            Some(name)
        }
        Declaration::Binding { .. } => None,
    }
}

/// What a declaration is, for a person.
fn title(declaration: &Declaration) -> String {
    match declaration {
        Declaration::Exchange { name, .. } | Declaration::Foreign { name } => format!("the exchange {name}"),
        Declaration::Queue { name, .. } => format!("the queue {name}"),
        Declaration::Binding { source, destination, .. } => format!("the binding {source} -> {}", destination.name()),
    }
}

/// A channel that is replaced whenever the broker's answer closed it.
struct Scout<'a> {
    link: &'a Link,
    channel: Option<Channel>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Does the name exist?
    Passive,
    /// Declare; where the name exists, this compares.
    Active,
}

impl Scout<'_> {
    async fn look(&mut self, declaration: &Declaration) -> Result<Found, DeclareError> {
        match self.exists(declaration).await? {
            // Declaring what exists changes nothing and compares everything.
            Found::Same => self.attempt(declaration, Mode::Active).await,
            other => Ok(other),
        }
    }

    async fn exists(&mut self, declaration: &Declaration) -> Result<Found, DeclareError> {
        self.attempt(declaration, Mode::Passive).await
    }

    async fn make(&mut self, declaration: &Declaration, made: usize) -> Result<(), DeclareError> {
        match self.attempt(declaration, Mode::Active).await {
            Ok(Found::Same | Found::Unknown) => Ok(()),
            // It was not there a moment ago: somebody else declares as well.
            Ok(Found::Different(said)) => Err(DeclareError::Refused { what: title(declaration), said, made }),
            Ok(Found::Missing) => {
                let said = "what it leads from or to is gone".into();
                Err(DeclareError::Refused { what: title(declaration), said, made })
            }
            Err(DeclareError::Refused { what, said, .. }) => Err(DeclareError::Refused { what, said, made }),
            Err(other) => Err(other),
        }
    }

    async fn attempt(&mut self, declaration: &Declaration, mode: Mode) -> Result<Found, DeclareError> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => self.link.connection().create_channel().await.map_err(|e| BrokerError::lost(&e))?,
        };
        let asked = ask(&channel, declaration, mode).await;
        let Err(error) = asked else {
            self.channel = Some(channel);
            let binding = matches!(declaration, Declaration::Binding { .. }) && mode == Mode::Passive;
            return Ok(if binding { Found::Unknown } else { Found::Same });
        };
        let said = describe(&error);
        let ErrorKind::ProtocolError(amqp) = error.kind() else {
            return Err(BrokerError::lost(&error).into());
        };
        match amqp.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Ok(Found::Missing),
            // Until 4.2 it is a command that is invalid, since 4.3 a precondition.
            AMQPErrorKind::Hard(AMQPHardError::COMMANDINVALID)
            | AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED)
                if said.contains("exchange type") =>
            {
                Err(DeclareError::Plugin)
            }
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) if said.contains("inequivalent arg") => {
                Ok(Found::Different(mismatch(name(declaration).unwrap_or_default(), &said)))
            }
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => Err(DeclareError::Denied(said)),
            AMQPErrorKind::Soft(_) => Err(DeclareError::Refused { what: title(declaration), said, made: 0 }),
            AMQPErrorKind::Hard(_) => Err(BrokerError::lost(&error).into()),
        }
    }
}

/// The broker's sentence, turned into what a person compares: argument, found, wanted.
fn mismatch(name: &str, said: &str) -> String {
    let quoted: Vec<&str> = said.split('\'').skip(1).step_by(2).collect();
    let between = |from: &str, to: &str| {
        let start = said.find(from)? + from.len();
        let rest = &said[start..];
        Some(rest[..rest.find(to).unwrap_or(rest.len())].replace("the value ", "").replace('\'', ""))
    };
    match (quoted.first(), between("received ", " but current is "), between("but current is ", " of type")) {
        (Some(argument), Some(wanted), Some(found)) => {
            let wanted = wanted.split(" of type").next().unwrap_or_default().to_owned();
            format!("{name}: {argument} is {found}, wanted {wanted}")
        }
        _ => format!("{name}: {said}"),
    }
}

async fn ask(channel: &Channel, declaration: &Declaration, mode: Mode) -> Result<(), Error> {
    let passive = mode == Mode::Passive;
    match declaration {
        Declaration::Exchange { name, kind, arguments: args } => {
            let options = ExchangeDeclareOptions { passive, durable: true, ..Default::default() };
            let kind = ExchangeKind::Custom(kind.as_str().into());
            channel.exchange_declare(short(name), kind, options, arguments(args)).await
        }
        Declaration::Foreign { name } => {
            let options = ExchangeDeclareOptions { passive: true, ..Default::default() };
            channel.exchange_declare(short(name), ExchangeKind::Topic, options, FieldTable::default()).await
        }
        Declaration::Queue { name, arguments: args } => {
            let options = QueueDeclareOptions { passive, durable: true, ..Default::default() };
            channel.queue_declare(short(name), options, arguments(args)).await.map(|_| ())
        }
        Declaration::Binding { .. } if passive => Ok(()),
        Declaration::Binding { source, destination, key, arguments: args } => match destination {
            Destination::Exchange(name) => {
                let options = ExchangeBindOptions::default();
                channel.exchange_bind(short(name), short(source), short(key), options, arguments(args)).await
            }
            Destination::Queue(name) => {
                let options = QueueBindOptions::default();
                channel.queue_bind(short(name), short(source), short(key), options, arguments(args)).await
            }
        },
    }
}

/// Names are checked where they enter (pool, lane, exchange, pattern): none is longer than a short string.
fn short(name: &str) -> ShortString {
    ShortString::try_new(name).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mismatch_names_argument_found_and_wanted() {
        let said = "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q' in vhost '/': received the \
                    value '200' of type 'signedint' but current is the value '5' of type 'signedint'";
        assert_eq!(mismatch("q", said), "q: x-delivery-limit is 5, wanted 200");
        let said = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received \
                    'quorum' but current is 'classic'";
        assert_eq!(mismatch("q", said), "q: x-queue-type is classic, wanted quorum");
        assert_eq!(mismatch("q", "something new"), "q: something new");
    }
}
