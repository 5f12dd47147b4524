//! The values that jq computes with: jaq's, each with an upper bound of its size and depth.
//!
//! The bounds are what keeps a run from ending the process: no value is deeper than [`DEPTH`], so dropping, comparing and
//! printing it cannot overflow the stack; none is larger than [`meter::most`] *written out*, so neither can a value that holds
//! itself sixty times over (`reduce range(60) as $i (0; [., .])`) be printed for ever. A part of a value takes over the
//! bounds of the whole where measuring it would take long; only where a bound exceeds a limit is the value measured.
use super::meter::{self, Stop, beat, spend};
use jaq_core::val::Range;
use jaq_core::{Error, ValR, ValT as _};
use jaq_json::{Num, Rc, Val, write};
use jaq_std::ValT as StdT;
use std::cmp::Ordering;

/// Values are nested at most so deep, as no JSON that Warren takes is deeper. Printing a level takes some kilobytes of stack
/// where nothing is optimized.
pub(super) const DEPTH: u32 = 128;
/// Steps into what is not there, and slices of slices, in a row: the paths that jaq keeps of them are chains, which it drops
/// one inside the other.
const STEPS: u32 = 2_000;
/// A value takes so many bytes beside its text.
pub(super) const NODE: usize = 16;
/// An entry of an object takes so many more.
pub(super) const ENTRY: usize = 64;
/// Digits of a number: the time to read more grows with their square.
pub(super) const DIGITS: usize = 1_000;
/// A part is measured as long as it is no larger than this.
const SMALL: usize = 1_024;

/// A value.
#[derive(Clone, Debug)]
pub(super) struct V {
    pub(super) val: Val,
    /// Bytes, written out, at most.
    pub(super) size: usize,
    /// Levels, at most; a scalar has none.
    pub(super) depth: u32,
    pub(super) steps: u32,
}

fn text_size(text: &[u8]) -> usize {
    2 * NODE + text.len()
}

/// Takes the size of a value from what is left; its depth, unless nothing is left.
fn measure(val: &Val, left: &mut usize) -> Option<u32> {
    let own = match val {
        Val::TStr(text) | Val::BStr(text) => text_size(text),
        Val::Num(Num::Dec(_) | Num::BigInt(_)) => NODE + DIGITS,
        _ => NODE,
    };
    *left = left.checked_sub(own)?;
    let mut deepest = None;
    match val {
        Val::Arr(items) => {
            for item in items.iter() {
                deepest = deepest.max(Some(measure(item, left)?));
            }
            Some(deepest.map_or(1, |depth| depth + 1))
        }
        Val::Obj(members) => {
            for (key, value) in members.iter() {
                *left = left.checked_sub(ENTRY)?;
                measure(key, left)?;
                deepest = deepest.max(Some(measure(value, left)?));
            }
            Some(deepest.map_or(1, |depth| depth + 1))
        }
        _ => Some(0),
    }
}

impl V {
    /// A value from outside.
    pub(super) fn new(val: Val) -> Self {
        Self::made(val, usize::MAX, 0, 0)
    }

    /// A value of which upper bounds are known.
    pub(super) fn made(val: Val, size: usize, depth: u32, steps: u32) -> Self {
        let most = meter::most();
        if size <= most && depth <= DEPTH {
            return Self { val, size, depth, steps };
        }
        let mut left = most;
        match measure(&val, &mut left) {
            None => meter::stop(Stop::Large),
            Some(depth) if depth > DEPTH => meter::stop(Stop::Deep),
            Some(depth) => Self { val, size: most - left, depth, steps },
        }
    }

    pub(super) fn scalar(val: Val) -> Self {
        let size = match &val {
            Val::TStr(text) => text_size(text),
            Val::Num(Num::Dec(_) | Num::BigInt(_)) => NODE + DIGITS,
            _ => NODE,
        };
        Self { val, size, depth: 0, steps: 0 }
    }

    /// A text that was just made.
    pub(super) fn text(text: impl Into<Vec<u8>>) -> Self {
        let text = text.into();
        let size = text_size(&text);
        spend(size);
        Self::made(Val::utf8_str(text), size, 0, 0)
    }

    pub(super) fn part(&self, val: Val) -> Self {
        let mut left = SMALL;
        match measure(&val, &mut left) {
            Some(depth) => Self { val, size: SMALL - left, depth, steps: self.steps },
            None => Self { val, size: self.size, depth: self.depth.saturating_sub(1), steps: self.steps },
        }
    }

    /// One more step on a path that need not get anywhere.
    pub(super) fn step(mut self) -> Self {
        self.steps += 1;
        if self.steps > STEPS {
            meter::stop(Stop::Deep);
        }
        self
    }

    /// What kind of value it is.
    pub(super) fn kind(&self) -> &'static str {
        match self.val {
            Val::Null => "null",
            Val::Bool(_) => "boolean",
            Val::Num(_) => "number",
            Val::BStr(_) | Val::TStr(_) => "string",
            Val::Arr(_) => "array",
            Val::Obj(_) => "object",
        }
    }

    /// The value as JSON.
    pub(super) fn json(&self) -> Vec<u8> {
        let mut out = Vec::new();
        // Writing to memory does not fail.
        let _ = write::write(&mut out, &write::Pp::default(), 0, &self.val);
        spend(out.len());
        out
    }

    /// The places where another value stands in this one.
    pub(super) fn indices(&self, other: &Self) -> ValR<Self> {
        let at = |hay: usize, needle: usize, same: &dyn Fn(usize) -> bool| {
            let starts = if needle == 0 { 0 } else { (hay + 1).saturating_sub(needle) };
            let found = |i: &usize| {
                beat();
                same(*i)
            };
            (0..starts).filter(found).map(Self::from).collect()
        };
        Ok(match (&self.val, &other.val) {
            (Val::TStr(hay), Val::TStr(needle)) => {
                // Counted in characters, as everything else is.
                let starts: Vec<usize> = std::str::from_utf8(hay)
                    .map(|hay| hay.char_indices().map(|(i, _)| i).collect())
                    .unwrap_or_default();
                spend(starts.len() * NODE);
                at(starts.len(), usize::from(!needle.is_empty()), &|i| hay[starts[i]..].starts_with(needle))
            }
            (Val::Arr(hay), Val::Arr(needle)) => {
                at(hay.len(), needle.len(), &|i| hay[i..i + needle.len()] == needle[..])
            }
            (Val::Arr(hay), needle) => at(hay.len(), 1, &|i| hay[i] == *needle),
            _ => return Err(Error::index(self.clone(), other.clone())),
        })
    }

    /// Where a slice of so many begins and ends.
    pub(super) fn slice(&self, range: Range<&Self>, length: usize) -> ValR<(usize, usize), Self> {
        let place = |bound: Option<&Self>, default: usize| match bound {
            None => Ok(default),
            Some(bound) if matches!(bound.val, Val::Null) => Ok(default),
            Some(bound) => {
                let place = bound.val.as_isize().ok_or_else(|| Error::typ(bound.clone(), "integer"))?;
                let from_end =
                    if place < 0 { length.saturating_sub(place.unsigned_abs()) } else { place.unsigned_abs() };
                Ok(from_end.min(length))
            }
        };
        let (from, to) = (place(range.start, 0)?, place(range.end, length)?);
        Ok((from, to.max(from)))
    }
}

/// The kind alone: errors carry it, and what an event holds must not come into a log.
impl std::fmt::Display for V {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind())
    }
}

impl PartialEq for V {
    fn eq(&self, other: &Self) -> bool {
        beat();
        self.val == other.val
    }
}

impl Eq for V {}

impl PartialOrd for V {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for V {
    fn cmp(&self, other: &Self) -> Ordering {
        beat();
        self.val.cmp(&other.val)
    }
}

impl From<bool> for V {
    fn from(flag: bool) -> Self {
        Self::scalar(flag.into())
    }
}

impl From<isize> for V {
    fn from(number: isize) -> Self {
        Self::scalar(number.into())
    }
}

impl From<usize> for V {
    fn from(number: usize) -> Self {
        Self::scalar(number.into())
    }
}

impl From<f64> for V {
    fn from(number: f64) -> Self {
        Self::scalar(number.into())
    }
}

impl From<String> for V {
    fn from(text: String) -> Self {
        Self::text(text)
    }
}

impl From<Range<V>> for V {
    fn from(range: Range<V>) -> Self {
        Self::new(Val::from(range.start.map(|v| v.val)..range.end.map(|v| v.val)))
    }
}

impl FromIterator<V> for V {
    fn from_iter<T: IntoIterator<Item = V>>(items: T) -> Self {
        let (mut size, mut depth, mut out) = (NODE, 0, Vec::new());
        for item in items {
            beat();
            spend(NODE);
            size = item.size.saturating_add(size);
            depth = item.depth.max(depth);
            out.push(item.val);
        }
        Self::made(Val::Arr(Rc::new(out)), size, depth + 1, 0)
    }
}

impl StdT for V {
    fn into_seq<S: FromIterator<Self>>(self) -> Result<S, Self> {
        match self.val {
            Val::Arr(_) => {
                let item = |item: ValR<Self>| {
                    spend(size_of::<Self>());
                    item.ok()
                };
                Ok(self.values().filter_map(item).collect())
            }
            _ => Err(self),
        }
    }

    fn is_int(&self) -> bool {
        self.val.is_int()
    }

    fn as_isize(&self) -> Option<isize> {
        self.val.as_isize()
    }

    fn as_f64(&self) -> Option<f64> {
        self.val.as_f64()
    }

    fn is_utf8_str(&self) -> bool {
        self.val.is_utf8_str()
    }

    fn as_bytes(&self) -> Option<&[u8]> {
        self.val.as_bytes()
    }

    fn as_sub_str(&self, sub: &[u8]) -> Self {
        beat();
        spend(2 * NODE);
        Self::scalar(self.val.as_sub_str(sub))
    }

    fn from_utf8_bytes(bytes: impl AsRef<[u8]> + Send + 'static) -> Self {
        let length = bytes.as_ref().len();
        spend(length);
        Self::made(Val::from_utf8_bytes(bytes), length + 2 * NODE, 0, 0)
    }
}
