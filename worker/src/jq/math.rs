//! Operators on values: each passes the meter, and refuses before it makes too much.
use super::meter::{beat, spend};
use super::value::{DIGITS, ENTRY, NODE, V};
use jaq_core::ops::Math;
use jaq_core::{Error, ValR};
use jaq_json::{Num, Rc, Val};
use jaq_std::ValT as _;
use memchr::memmem;
use std::ops::{Add, Div, Mul, Neg, Rem, Sub};

/// What jaq made of values for which it is defined.
fn made(result: Result<Val, Error<Val>>, size: usize, depth: u32) -> ValR<V> {
    match result {
        Ok(val) => Ok(V::made(val, size, depth, 0)),
        Err(_) => Err(Error::str("this cannot be calculated")),
    }
}

fn number(result: Result<Val, Error<Val>>) -> ValR<V> {
    made(result, NODE + DIGITS, 0)
}

/// The digits of a number, at most.
fn digits(number: &Num) -> usize {
    match number {
        Num::BigInt(big) => usize::try_from(big.bits() / 3 + 1).unwrap_or(usize::MAX),
        _ => 20,
    }
}

/// Both sides written out.
fn both(l: &V, r: &V) -> (usize, u32) {
    (l.size.saturating_add(r.size), l.depth.max(r.depth))
}

/// What the left side costs where others hold it as well: then it is copied.
fn copied<T>(left: &Rc<T>, size: usize) -> usize {
    if Rc::strong_count(left) > 1 { size } else { 0 }
}

impl Add for V {
    type Output = ValR<Self>;

    fn add(self, other: Self) -> Self::Output {
        beat();
        let (size, depth) = both(&self, &other);
        match (&self.val, &other.val) {
            (Val::Null, _) => return Ok(other),
            (_, Val::Null) => return Ok(self),
            (Val::Num(_), Val::Num(_)) => return number(self.val + other.val),
            (Val::TStr(l), Val::TStr(r)) => spend(r.len() + if l.is_unique() { 0 } else { l.len() }),
            (Val::Arr(l), Val::Arr(r)) => spend(NODE * r.len() + copied(l, NODE * l.len())),
            (Val::Obj(l), Val::Obj(r)) => spend(ENTRY * r.len() + copied(l, ENTRY * l.len())),
            _ => return Err(Error::math(self, Math::Add, other)),
        }
        made(self.val + other.val, size, depth)
    }
}

impl Sub for V {
    type Output = ValR<Self>;

    fn sub(self, other: Self) -> Self::Output {
        beat();
        match (&self.val, &other.val) {
            (Val::Num(_), Val::Num(_)) => number(self.val - other.val),
            (Val::Arr(_), Val::Arr(_)) => {
                let (all, mut gone): (Vec<Self>, Vec<Self>) = match (self.into_seq(), other.into_seq()) {
                    (Ok(all), Ok(gone)) => (all, gone),
                    (Err(v), _) | (_, Err(v)) => return Err(Error::typ(v, "array")),
                };
                gone.sort();
                Ok(all.into_iter().filter(|item| gone.binary_search(item).is_err()).collect())
            }
            _ => Err(Error::math(self, Math::Sub, other)),
        }
    }
}

impl Mul for V {
    type Output = ValR<Self>;

    fn mul(self, other: Self) -> Self::Output {
        beat();
        let (size, depth) = both(&self, &other);
        match (&self.val, &other.val) {
            (Val::Num(l), Val::Num(r)) if digits(l).saturating_add(digits(r)) > DIGITS => {
                Err(Error::str(format_args!("a product of more than {DIGITS} digits")))
            }
            (Val::Num(_), Val::Num(_)) => number(self.val * other.val),
            (Val::TStr(text), Val::Num(number)) | (Val::Num(number), Val::TStr(text)) => {
                let bytes = text.len().saturating_mul(times(number));
                spend(bytes);
                made(self.val * other.val, bytes.saturating_add(size), 0)
            }
            (Val::Obj(l), Val::Obj(r)) => {
                spend(ENTRY * (l.len() + r.len()));
                made(self.val * other.val, size, depth)
            }
            _ => Err(Error::math(self, Math::Mul, other)),
        }
    }
}

/// How often a text is repeated.
fn times(number: &Num) -> usize {
    match number {
        Num::Int(times) => usize::try_from(*times).unwrap_or(0),
        Num::BigInt(_) => usize::MAX,
        Num::Float(_) | Num::Dec(_) => 0,
    }
}

impl Div for V {
    type Output = ValR<Self>;

    fn div(self, other: Self) -> Self::Output {
        beat();
        match (&self.val, &other.val) {
            (Val::Num(_), Val::Num(_)) => number(self.val / other.val),
            (Val::TStr(text), Val::TStr(by)) => {
                let parts = if by.is_empty() { text.len() } else { memmem::find_iter(text, &***by).count() + 1 };
                // Each part points into the whole.
                spend(parts.saturating_mul(2 * ENTRY));
                let size = self.size.saturating_add(parts.saturating_mul(2 * NODE));
                made(self.val / other.val, size, 1)
            }
            _ => Err(Error::math(self, Math::Div, other)),
        }
    }
}

impl Rem for V {
    type Output = ValR<Self>;

    fn rem(self, other: Self) -> Self::Output {
        beat();
        match (&self.val, &other.val) {
            (Val::Num(_), Val::Num(Num::Int(0))) => Err(Error::str("a number cannot be divided by zero")),
            (Val::Num(_), Val::Num(_)) => number(self.val % other.val),
            _ => Err(Error::math(self, Math::Rem, other)),
        }
    }
}

impl Neg for V {
    type Output = ValR<Self>;

    fn neg(self) -> Self::Output {
        beat();
        match &self.val {
            Val::Num(_) => number(-self.val),
            _ => Err(Error::typ(self, "number")),
        }
    }
}
