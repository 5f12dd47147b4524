//! The functions that a program may call: jaq's, without those that look or act outside, and with ours in place of those that
//! could not be stopped or are made for another type of values.
use super::meter::beat;
use super::value::{DEPTH, DIGITS, V};
use super::{Data, Program};
use jaq_core::load::{self, parse::Def};
use jaq_core::native::{Fun, bome, run, unary, v};
use jaq_core::{Error, Native, ValR};
use jaq_json::{Val, read};
use jaq_std::ValT as _;
use warren_shared::json;

/// They read the environment, the clock or the time zone of the machine, write to its log, or end the process.
const OUTSIDE: [&str; 7] = ["env", "now", "halt", "debug_empty", "stderr_empty", "localtime", "strflocaltime"];
/// They are defined by those.
const BY_THOSE: [&str; 4] = ["debug", "stderr", "halt", "halt_error"];

/// Definitions in jq.
pub(super) fn defs() -> impl Iterator<Item = Def<&'static str>> {
    let all = jaq_core::defs().chain(jaq_std::defs()).chain(jaq_json::defs());
    let more = load::parse(include_str!("more.jq"), |parser| parser.defs()).expect("a test compiles them");
    all.filter(|def| !BY_THOSE.contains(&def.name)).chain(more)
}

/// Functions in Rust.
pub(super) fn funs() -> impl Iterator<Item = Fun<Program>> {
    let theirs = jaq_core::funs().chain(jaq_std::funs()).filter(|(name, ..)| !OUTSIDE.contains(name));
    theirs.chain(ours())
}

fn ours() -> impl Iterator<Item = (&'static str, Box<[jaq_core::Bind]>, Native<Program>)> {
    let one = || v(1);
    [
        run::<Program>(("tojson", v(0), |cv| bome(Ok(V::from_utf8_bytes(cv.1.json()))))),
        run(("fromjson", v(0), |cv| bome(from_json(&cv.1)))),
        run(("encode_base32", v(0), |cv| bome(base32(cv.1)))),
        run(("decode_base32", v(0), |cv| bome(from_base32(cv.1)))),
        run(("length", v(0), |cv| bome(length(cv.1)))),
        run(("contains", one(), |cv| unary(cv, |whole, part| Ok(contains(&whole.val, &part.val).into())))),
        run(("has", one(), |cv| unary(cv, has))),
        run(("indices", one(), |cv| unary(cv, |whole, part| whole.indices(&part)))),
    ]
    .into_iter()
}

/// Reads JSON that was checked, or comes from where numbers may be of any length.
pub(super) fn parse(text: &[u8]) -> Result<Val, String> {
    let longest = longest_number(text);
    if longest > DIGITS {
        return Err(format!("a number has {longest} digits, the limit is {DIGITS}"));
    }
    read::parse_single(text).map_err(|_| "not JSON".into())
}

fn from_json(text: &V) -> ValR<V> {
    let text = text.try_as_utf8_bytes()?;
    super::meter::spend(text.len());
    let strict = json::check(text, json::MAX_DEPTH.min(DEPTH as usize));
    strict.map_err(|e| e.to_string()).and_then(|_| parse(text)).map(V::new).map_err(Error::str)
}

/// The digits of base 32, RFC 4648.
const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

fn base32(text: V) -> ValR<V> {
    let bytes = text.try_as_utf8_bytes()?;
    super::meter::spend(bytes.len() * 2);
    let mut out = Vec::with_capacity(bytes.len().div_ceil(5) * 8);
    for chunk in bytes.chunks(5) {
        let bits = (0..5).fold(0_u64, |bits, i| bits << 8 | u64::from(chunk.get(i).copied().unwrap_or(0)));
        let digits = (chunk.len() * 8).div_ceil(5);
        out.extend((0..8).map(|i| if i < digits { BASE32[(bits >> (35 - 5 * i)) as usize & 31] } else { b'=' }));
    }
    Ok(V::from_utf8_bytes(out))
}

fn from_base32(text: V) -> ValR<V> {
    let bytes = text.try_as_utf8_bytes()?;
    super::meter::spend(bytes.len());
    let (mut out, mut bits, mut count) = (Vec::with_capacity(bytes.len()), 0_u32, 0);
    for byte in bytes.iter().take_while(|byte| **byte != b'=') {
        let digit = BASE32.iter().position(|digit| digit == byte).ok_or_else(|| Error::str("it is not base32 data"))?;
        (bits, count) = ((bits << 5 | digit as u32) & 0xfff, count + 5);
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Ok(V::from_utf8_bytes(out))
}

/// The length of the longest number, in bytes.
fn longest_number(json: &[u8]) -> usize {
    let (mut longest, mut run, mut text, mut escaped) = (0, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if text => escaped = true,
            b'"' => text = !text,
            b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-' if !text => {
                run += 1;
                longest = longest.max(run);
                continue;
            }
            _ => {}
        }
        run = 0;
    }
    longest
}

fn length(value: V) -> ValR<V> {
    match &value.val {
        Val::Null => Ok(0_usize.into()),
        Val::Bool(_) => Err(Error::typ(value, "something with a length")),
        Val::Num(_) => {
            if value < V::from(0_usize) {
                -value
            } else {
                Ok(value)
            }
        }
        Val::BStr(bytes) => Ok(bytes.len().into()),
        Val::TStr(text) => Ok(text.iter().filter(|byte| (**byte as i8) >= -0x40).count().into()),
        Val::Arr(items) => Ok(items.len().into()),
        Val::Obj(members) => Ok(members.len().into()),
    }
}

fn contains(whole: &Val, part: &Val) -> bool {
    beat();
    match (whole, part) {
        (Val::TStr(whole), Val::TStr(part)) => memchr::memmem::find(whole, part).is_some(),
        (Val::Arr(whole), Val::Arr(part)) => part.iter().all(|r| whole.iter().any(|l| contains(l, r))),
        (Val::Obj(whole), Val::Obj(part)) => part.iter().all(|(key, r)| whole.get(key).is_some_and(|l| contains(l, r))),
        _ => whole == part,
    }
}

fn has(value: V, key: V) -> ValR<V> {
    match (&value.val, &key.val) {
        (Val::Obj(members), Val::TStr(_)) => Ok(members.contains_key(&key.val).into()),
        (Val::Arr(items), Val::Num(_)) => {
            let place = key.as_isize().and_then(|place| usize::try_from(place).ok());
            Ok(place.is_some_and(|place| place < items.len()).into())
        }
        _ => Err(Error::index(value, key)),
    }
}

impl<'a> jaq_core::data::HasLut<'a, Program> for Data<'a> {
    fn lut(&self) -> &'a jaq_core::Lut<Program> {
        beat();
        self.0
    }
}
