//! Ways into a value and changes inside it (`.a`, `.[]`, `.[1:]`, `|=`): each passes the meter.
use super::meter::{beat, spend};
use super::value::{DIGITS, ENTRY, NODE, V};
use jaq_core::path::Opt;
use jaq_core::val::Range;
use jaq_core::{Error, ValR, ValT, ValX};
use jaq_json::{Map, Rc, Val};
use jaq_std::ValT as _;

impl ValT for V {
    fn from_num(text: &str) -> ValR<Self> {
        if text.len() > DIGITS {
            return Err(Error::str(format_args!("a number of {} digits, the limit is {DIGITS}", text.len())));
        }
        Ok(Val::from_num(text).map_or_else(|_| Self::from(f64::NAN), Self::new))
    }

    fn from_map<I: IntoIterator<Item = (Self, Self)>>(members: I) -> ValR<Self> {
        let (mut size, mut depth, mut out) = (NODE, 0, Map::default());
        for (key, value) in members {
            beat();
            spend(ENTRY);
            if !matches!(key.val, Val::TStr(_)) {
                return Err(Error::typ(key, "key of an object: use a string"));
            }
            size = key.size.saturating_add(value.size).saturating_add(size).saturating_add(ENTRY);
            depth = value.depth.max(depth);
            out.insert(key.val, value.val);
        }
        Ok(Self::made(Val::obj(out), size, depth + 1, 0))
    }

    fn key_values(self) -> Box<dyn Iterator<Item = ValR<(Self, Self), Self>>> {
        let pass = |pair| {
            beat();
            pair
        };
        match self.val.clone() {
            Val::Arr(items) => {
                Box::new((0..items.len()).map(move |i| pass(Ok((Self::from(i), self.part(items[i].clone()))))))
            }
            Val::Obj(members) => Box::new((0..members.len()).filter_map(move |i| {
                let (key, value) = members.get_index(i)?;
                Some(pass(Ok((Self::scalar(key.clone()), self.part(value.clone())))))
            })),
            _ => Box::new(std::iter::once(Err(Error::typ(self, "iterable (array or object)")))),
        }
    }

    fn values(self) -> Box<dyn Iterator<Item = ValR<Self>>> {
        Box::new(self.key_values().map(|pair| pair.map(|(_, value)| value)))
    }

    fn index(self, index: &Self) -> ValR<Self> {
        match (&self.val, &index.val) {
            (Val::Null, Val::Null | Val::Num(_) | Val::TStr(_) | Val::Obj(_)) => Ok(self.step()),
            (Val::Arr(_), Val::Arr(_)) => self.indices(index),
            (Val::Arr(_) | Val::TStr(_), Val::Obj(range)) => {
                let bound = |name: &str| range.get(&Val::utf8_str(name.to_owned())).cloned().map(Self::new);
                let (start, end) = (bound("start"), bound("end"));
                self.range(start.as_ref()..end.as_ref())
            }
            _ => match self.val.clone().index(&index.val) {
                Ok(Val::Null) => Ok(self.part(Val::Null).step()),
                Ok(val) => Ok(self.part(val)),
                Err(_) => Err(Error::index(self, index.clone())),
            },
        }
    }

    fn range(self, range: Range<&Self>) -> ValR<Self> {
        match self.val.clone() {
            Val::Null => Ok(self.step()),
            Val::Arr(items) => {
                let (from, to) = self.slice(range, items.len())?;
                spend((to - from) * NODE);
                let val = Val::Arr(Rc::new(items[from..to].to_vec()));
                Ok(Self { val, ..self }.step())
            }
            val @ Val::TStr(_) => {
                let sliced = val.range(range.start.map(|v| &v.val)..range.end.map(|v| &v.val));
                let wrong = || Error::str("the bounds of a slice are integers");
                let slice = sliced.map(Self::scalar).map_err(|_| wrong())?;
                Ok(Self { steps: self.steps, ..slice }.step())
            }
            _ => Err(Error::typ(self, "array or string")),
        }
    }

    fn map_values<'a, I: Iterator<Item = ValX<'a, Self>>>(self, opt: Opt, f: impl Fn(Self) -> I) -> ValX<'a, Self> {
        match self.val {
            Val::Arr(_) => self.values().flat_map(|item| f(item.unwrap_or_else(|_| Self::scalar(Val::Null)))).collect(),
            Val::Obj(_) => {
                let mut members = Vec::new();
                for (key, value) in self.key_values().flatten() {
                    members.extend(f(value).next().transpose()?.map(|value| (key, value)));
                }
                Ok(Self::from_map(members)?)
            }
            _ => opt.fail(self, |v| Error::typ(v, "iterable (array or object)").into()),
        }
    }

    fn map_index<'a, I: Iterator<Item = ValX<'a, Self>>>(
        self,
        index: &Self,
        opt: Opt,
        f: impl Fn(Self) -> I,
    ) -> ValX<'a, Self> {
        beat();
        let Self { val, size, depth, steps } = self;
        match (val, &index.val) {
            // `null | .a = 1` makes an object, as in jq.
            (val @ (Val::Obj(_) | Val::Null), Val::TStr(_)) => {
                let mut members = if let Val::Obj(members) = val { members } else { Rc::default() };
                // Taken out, so that what is changed deep inside is not copied.
                let place = members.get_index_of(&index.val);
                let whole = Self { val: Val::Null, size, depth, steps };
                own(&mut members);
                let slot = |members: &mut Rc<Map>, place: usize| {
                    Rc::make_mut(members).get_index_mut(place).map(|(_, value)| std::mem::take(value))
                };
                let old = place.and_then(|place| slot(&mut members, place));
                let new = f(old.map_or_else(|| Self::scalar(Val::Null), |old| whole.part(old))).next().transpose()?;
                let (more, deeper) = new.as_ref().map_or((0, 0), |new| (new.size, new.depth));
                match (new, place) {
                    (Some(new), _) => drop(Rc::make_mut(&mut members).insert(index.val.clone(), new.val)),
                    (None, Some(place)) => drop(Rc::make_mut(&mut members).shift_remove_index(place)),
                    (None, None) => {}
                }
                let size = size.saturating_add(more).saturating_add(index.size).saturating_add(ENTRY);
                Ok(Self::made(Val::Obj(members), size, depth.max(deeper + 1), 0))
            }
            (Val::Arr(mut items), Val::Num(number)) => {
                let place = number.as_isize().and_then(|place| {
                    let from_end = || items.len().checked_sub(place.unsigned_abs());
                    if place < 0 { from_end() } else { Some(place.unsigned_abs()) }
                });
                let whole = |items| Self { val: Val::Arr(items), size, depth, steps };
                let Some(place) = place.filter(|place| *place < items.len()) else {
                    return opt.fail(whole(items), |_| Error::str("the index is out of bounds").into());
                };
                if Rc::strong_count(&items) > 1 {
                    spend(items.len() * NODE);
                }
                let old = std::mem::take(&mut Rc::make_mut(&mut items)[place]);
                let new = f(whole(Rc::default()).part(old)).next().transpose()?;
                let (more, deeper) = new.as_ref().map_or((0, 0), |new| (new.size, new.depth));
                match new {
                    Some(new) => Rc::make_mut(&mut items)[place] = new.val,
                    None => drop(Rc::make_mut(&mut items).remove(place)),
                }
                Ok(Self::made(Val::Arr(items), size.saturating_add(more), depth.max(deeper + 1), 0))
            }
            (val @ (Val::Arr(_) | Val::Null), Val::Obj(range)) => {
                let bound = |name: &str| range.get(&Val::utf8_str(name.to_owned())).cloned().map(Self::new);
                let (start, end) = (bound("start"), bound("end"));
                Self { val, size, depth, steps }.map_range(start.as_ref()..end.as_ref(), opt, f)
            }
            (val, _) => {
                let whole = Self { val, size, depth, steps };
                opt.fail(whole, |v| Error::index(v, index.clone()).into())
            }
        }
    }

    fn map_range<'a, I: Iterator<Item = ValX<'a, Self>>>(
        self,
        range: Range<&Self>,
        opt: Opt,
        f: impl Fn(Self) -> I,
    ) -> ValX<'a, Self> {
        let Val::Arr(items) = &self.val else {
            return opt.fail(self, |v| Error::typ(v, "array").into());
        };
        let (from, to) = match self.slice(range, items.len()) {
            Ok(slice) => slice,
            Err(error) => return opt.fail(self, |_| error.into()),
        };
        let part = |places: std::ops::Range<usize>| places.map(|i| self.part(items[i].clone()));
        let new = f(part(from..to).collect()).next().transpose()?;
        let new = match new.map(Self::into_seq::<Vec<Self>>) {
            None => Vec::new(),
            Some(Ok(new)) => new,
            Some(Err(other)) => return Err(Error::typ(other, "array").into()),
        };
        Ok(part(0..from).chain(new).chain(part(to..items.len())).collect())
    }

    fn as_bool(&self) -> bool {
        self.val.as_bool()
    }

    fn into_string(self) -> Self {
        if matches!(self.val, Val::TStr(_)) { self } else { Self::text(self.json()) }
    }
}

/// Accounts for the copy that a change makes of what others hold as well.
fn own(members: &mut Rc<Map>) {
    if Rc::strong_count(members) > 1 {
        spend(members.len() * ENTRY);
    }
}
