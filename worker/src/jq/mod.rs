//! jq: programs that say whether an event is handled, and what becomes of its data.
//!
//! The only rooms that know jaq. A program is compiled once and can look at nothing but its input: no environment, no clock,
//! no files, no log. A run ends, whatever the program does, without taking the process along:
//!
//! | limit | of | where |
//! |---|---|---|
//! | [`Limits::time`] | a run; checked at every 64th evaluation and operator. One call of a function of jaq's (`sort`, a regular expression) is not interrupted, but what it compares is | `meter.rs` |
//! | 1 MiB | stack | `meter.rs` |
//! | 64 MiB + 32 × input | one value, written out; 1 GiB more for all of a run together | `value.rs` |
//! | 128 levels | depth of a value | `value.rs` |
//! | 1,000 digits | a number | `natives.rs`, `math.rs` |
//! | 1,000 outputs, [`Limits::output`] bytes | what comes out | here |
//! | 64 KiB | a program's text | here |
//!
//! What jaq keeps for itself (iterators that wait) is not counted in bytes: stack and time bound it. A dozen programs that
//! never end were measured to stay under 100 MB within three seconds, where they do not make values of their own.
mod math;
mod meter;
mod natives;
mod navigate;
mod nesting;
#[cfg(test)]
mod tests;
mod value;

use jaq_core::data::DataT;
use jaq_core::load::{self, Arena, File, Loader};
use jaq_core::{Compiler, Ctx, Filter, Lut, Vars};
use jaq_json::Val;
use meter::Stop;
use std::sync::Arc;
use std::time::Duration;
use value::V;

/// A compiled program. Clones share it.
#[derive(Clone)]
pub(crate) struct Jq(Arc<Filter<Program>>);

/// How long a run may take, and how many bytes it may write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// From start to end.
    pub(crate) time: Duration,
    /// All outputs together.
    pub(crate) output: usize,
}

/// How long a run may take where nothing else is said.
pub(crate) const TIME: Duration = Duration::from_secs(1);
/// So many outputs a run may have.
const OUTPUTS: usize = 1_000;
/// Bytes of a program.
const TEXT: usize = 64 << 10;

/// Why a run came to nothing. Never quotes the input.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JqError {
    /// The program failed.
    #[error("{0}")]
    Failed(String),
    /// It took too long.
    #[error("it took longer than {0:?}")]
    Late(Duration),
    /// It calls itself too often.
    #[error("it calls itself too often, or nests values too deep")]
    Deep,
    /// It makes too much.
    #[error("it makes values larger than it may")]
    Large,
    /// It returns too much.
    #[error("it returns more than {OUTPUTS} values")]
    Many,
    /// It writes too much.
    #[error("it returns more than {0} bytes")]
    Long(usize),
}

impl Jq {
    /// Compiles a program.
    ///
    /// # Errors
    /// What is wrong, and where in the text.
    pub(crate) fn compile(text: &str) -> Result<Self, String> {
        if text.len() > TEXT {
            return Err(format!("the program has {} bytes, the limit is {TEXT}", text.len()));
        }
        let arena = Arena::default();
        let modules = Loader::new(natives::defs()).load(&arena, File { code: text, path: () });
        let modules = modules.map_err(|errors| unread(text, errors))?;
        let compiled = Compiler::default().with_funs(natives::funs()).compile(modules);
        let filter = compiled.map_err(|errors| undefined(text, errors))?;
        match load::parse(text, |p| p.term()).as_ref().and_then(nesting::endless) {
            None => Ok(Self(Arc::new(filter))),
            Some(name) => {
                Err(format!("'{name}' calls itself and takes a filter: let it take values (def {name}($x): …)"))
            }
        }
    }

    /// Runs it with a JSON value and returns what comes out, each value as JSON; it is not said to be JSON where it holds
    /// what JSON cannot (`nan`). Takes up to [`Limits::time`] and a bit: not for a thread that others wait for.
    ///
    /// # Errors
    /// The first error that nothing in the program catches, or the limit that was exceeded.
    pub(crate) fn run(&self, input: &[u8], limits: Limits) -> Result<Vec<Vec<u8>>, JqError> {
        meter::bounded(limits.time, input.len(), || self.outputs(input, limits)).unwrap_or_else(|stop| {
            Err(match stop {
                Some(Stop::Late) => JqError::Late(limits.time),
                Some(Stop::Deep) => JqError::Deep,
                Some(Stop::Large) => JqError::Large,
                None => JqError::Failed("jq failed at something that it takes for impossible".into()),
            })
        })
    }

    fn outputs(&self, input: &[u8], limits: Limits) -> Result<Vec<Vec<u8>>, JqError> {
        let input = V::new(natives::parse(input).map_err(JqError::Failed)?);
        let context = Ctx::<Program>::new(Data(&self.0.lut), Vars::new([]));
        let (mut outputs, mut left) = (Vec::new(), limits.output);
        for output in self.0.id.run((context, input)) {
            let output = output.map_err(|thrown| match thrown.get_err() {
                Ok(error) => failed(&error.into_val()),
                Err(_) => JqError::Failed("it broke out of what it was not in".into()),
            })?;
            let json = output.json();
            left = left.checked_sub(json.len()).ok_or(JqError::Long(limits.output))?;
            if outputs.len() == OUTPUTS {
                return Err(JqError::Many);
            }
            outputs.push(json);
        }
        Ok(outputs)
    }
}

/// What the outputs of a condition say: it holds where one of them is neither `false` nor `null`.
pub(crate) fn holds(outputs: &[Vec<u8>]) -> bool {
    outputs.iter().any(|json| !matches!(json.as_slice(), b"false" | b"null"))
}

/// The text of an error: of jaq, which names kinds of values, or of the program's own `error("…")`.
fn failed(error: &V) -> JqError {
    JqError::Failed(match &error.val {
        Val::TStr(text) => String::from_utf8_lossy(text).chars().take(200).collect(),
        _ => format!("it threw a value of kind {}", error.kind()),
    })
}

/// Where in the program something stands.
fn place(text: &str, part: &str) -> String {
    let before = &text[..load::span(text, part).start.min(text.len())];
    let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
    let near: String = part.chars().take(20).collect();
    let near = if near.is_empty() { "the end".to_owned() } else { format!("'{near}'") };
    match before.matches('\n').count() {
        0 => format!("at {near} (column {column})"),
        lines => format!("at {near} (line {}, column {column})", lines + 1),
    }
}

fn unread(text: &str, errors: load::Errors<&str, ()>) -> String {
    let mut all = Vec::new();
    for (_, error) in errors {
        match error {
            load::Error::Io(files) => all.extend(
                files.into_iter().map(|(path, _)| format!("{}: there are no modules to include", place(text, path))),
            ),
            load::Error::Lex(errors) => all.extend(
                errors
                    .into_iter()
                    .map(|(expected, found)| format!("{}: a {} is wanted", place(text, found), expected.as_str())),
            ),
            load::Error::Parse(errors) => all.extend(
                errors
                    .into_iter()
                    .map(|(expected, found)| format!("{}: {} is wanted", place(text, found), expected.as_str())),
            ),
        }
    }
    all.join("; ")
}

fn undefined(text: &str, errors: jaq_core::compile::Errors<&str, ()>) -> String {
    let all = errors.into_iter().flat_map(|(_, errors)| errors);
    let one = |(name, what): (&str, jaq_core::compile::Undefined)| {
        format!("{}: there is no such {}", place(text, name), what.as_str())
    };
    all.map(one).collect::<Vec<_>>().join("; ")
}

impl std::fmt::Debug for Jq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Jq")
    }
}

/// What jaq runs on: our values, and a table that passes the meter.
struct Program;

#[derive(Clone)]
struct Data<'a>(&'a Lut<Program>);

impl DataT for Program {
    type V<'a> = V;
    type Data<'a> = Data<'a>;
}
