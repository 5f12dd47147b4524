//! A real process log with its known answer: the directly-follows graph of its cases.
use crate::broker::root;
use anyhow::ensure;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Read;

/// The log of receipts.
#[derive(Debug)]
pub struct Receipt {
    /// Its events, a line each.
    pub log: Vec<u8>,
    /// Its graph: numbers of `events` and `cases`, and counts of `starts`, `ends` and `directly_follows`.
    pub wanted: Value,
}

impl Receipt {
    /// The log, where it is there; else it is said that it is not.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read() -> anyhow::Result<Option<Self>> {
        let data = root().join("../shared/data");
        let Ok(file) = std::fs::File::open(data.join("receipt.ndjson.gz")) else {
            println!("SKIPPED: there is no {}/receipt.ndjson.gz, so this proves nothing here", data.display());
            return Ok(None);
        };
        let mut log = Vec::new();
        flate2::read::GzDecoder::new(file).read_to_end(&mut log)?;
        let wanted = serde_json::from_str(&std::fs::read_to_string(data.join("receipt.dfg.json"))?)?;
        Ok(Some(Self { log, wanted }))
    }

    /// Holds the types of each case's events, in their order, against the known graph.
    ///
    /// # Errors
    /// Which part is another one.
    pub fn is_graph_of<'a>(&self, cases: impl IntoIterator<Item = &'a [String]>) -> anyhow::Result<()> {
        let (mut starts, mut ends, mut follows) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let count = |counts: &mut BTreeMap<String, u64>, what: String| *counts.entry(what).or_default() += 1;
        let (mut events, mut number) = (0, 0);
        for case in cases {
            (events, number) = (events + case.len(), number + 1);
            case.first().into_iter().for_each(|first| count(&mut starts, first.clone()));
            case.last().into_iter().for_each(|last| count(&mut ends, last.clone()));
            case.windows(2).for_each(|pair| count(&mut follows, format!("{} > {}", pair[0], pair[1])));
        }
        let found = json!(
            {"events": events, "cases": number, "starts": starts, "ends": ends, "directly_follows": follows}
        );
        for part in ["events", "cases", "starts", "ends", "directly_follows"] {
            ensure!(found[part] == self.wanted[part], "{part}: found {}\nwanted {}", found[part], self.wanted[part]);
        }
        Ok(())
    }
}
