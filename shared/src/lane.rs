//! Lanes: how urgency is shared out, so that no lane starves.
use std::fmt;

/// One lane and its share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lane {
    /// Its name, part of exchange and queue names.
    pub name: String,
    /// Its share of the worker relative to the other lanes' weights.
    pub weight: u32,
}

/// Words that stand where a lane's name stands in the names of a pool's other queues and exchanges.
pub const RESERVED: [&str; 5] = ["delay", "dead", "unrouted", "fleet", "probe"];

/// The lane of events that ask for none.
pub const NORMAL: &str = "normal";

/// The lane that an AMQP or CloudEvents priority asks for: 7–9 high, 4–6 normal, 0–3 low.
#[must_use]
pub fn for_priority(priority: i64) -> &'static str {
    match priority {
        7.. => "high",
        4..=6 => NORMAL,
        _ => "low",
    }
}

/// Whether a lane can be called so.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty() && name.len() <= 32 && name.chars().all(legal)
}

/// The lanes of a pool, in order of urgency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lanes(Vec<Lane>);

impl Lanes {
    /// Reads `high:6,normal:3,low:1`.
    ///
    /// # Errors
    /// Says which part is not a lane.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lanes: Vec<Lane> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (name, weight) = part.split_once(':').ok_or_else(|| format!("'{part}' is not name:weight"))?;
            if !is_name(name) {
                return Err(format!("'{name}' is not a name of a-z, 0-9 and -"));
            }
            if RESERVED.contains(&name) {
                return Err(format!("'{name}' is taken, choose another name"));
            }
            let weight = match weight.parse() {
                Ok(weight @ 1..=1000) => weight,
                _ => return Err(format!("the weight '{weight}' of '{name}' is not a number from 1 to 1000")),
            };
            if lanes.iter().any(|lane| lane.name == name) {
                return Err(format!("'{name}' stands twice"));
            }
            lanes.push(Lane { name: name.into(), weight });
        }
        if lanes.iter().any(|lane| lane.name == NORMAL) {
            Ok(Self(lanes))
        } else {
            Err(format!("no lane is called '{NORMAL}', where events that ask for no lane go"))
        }
    }

    /// The lanes.
    pub fn iter(&self) -> impl Iterator<Item = &Lane> {
        self.0.iter()
    }

    /// A lane's place by its name.
    #[must_use]
    pub fn position(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|lane| lane.name == name)
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, lane) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", lane.name, lane.weight)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let text = "high:6,normal:3,low:1";
        assert_eq!(Lanes::parse(text).expect("valid").to_string(), text);
    }

    #[test]
    fn refuses_what_cannot_be_a_lane() {
        for text in
            ["", "high", "normal:0", "normal:x", "high:1", "normal:1,normal:2", "normal:1,probe:1", "A:1,normal:1"]
        {
            assert!(Lanes::parse(text).is_err(), "{text}");
        }
    }
}
