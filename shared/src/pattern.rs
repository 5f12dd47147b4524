//! Patterns of event types: words split by dots, `*` is one word, `#` any number of them (AMQP's topic syntax).
use std::fmt;

/// A pattern of event types.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern(String);

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > 255 {
            return Err(format!("a pattern has 1 to 255 bytes, this has {}", text.len()));
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(format!("'{text}' holds white space"));
        }
        match text.split('.').find(|word| word.len() > 1 && word.contains(['*', '#'])) {
            Some(word) => Err(format!(
                "in '{text}' the word '{word}' mixes a wildcard with text: write '*' or '#' alone between dots"
            )),
            None => Ok(Self(text.into())),
        }
    }

    /// The pattern as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the pattern takes this event type.
    #[must_use]
    pub fn matches(&self, kind: &str) -> bool {
        let pattern: Vec<&str> = self.0.split('.').collect();
        let words: Vec<&str> = kind.split('.').collect();
        // open[j]: the pattern so far takes the first j words.
        let mut open = vec![false; words.len() + 1];
        open[0] = true;
        for part in pattern {
            if part == "#" {
                let first = open.iter().position(|o| *o).unwrap_or(open.len());
                open[first..].fill(true);
            } else {
                for j in (0..words.len()).rev() {
                    open[j + 1] = open[j] && (part == "*" || part == words[j]);
                }
                open[0] = false;
            }
        }
        open[words.len()]
    }

    /// Whether some event type is taken by both patterns.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let (one, two): (Vec<&str>, Vec<&str>) = (self.0.split('.').collect(), other.0.split('.').collect());
        // common[i][j]: what is left of the one from i and of the other from j takes some words in common.
        let mut common = vec![vec![false; two.len() + 1]; one.len() + 1];
        for i in (0..=one.len()).rev() {
            for j in (0..=two.len()).rev() {
                common[i][j] = match (one.get(i), two.get(j)) {
                    (None, None) => true,
                    // It takes no more words, or one more of those that the other takes.
                    (Some(&"#"), b) => common[i + 1][j] || b.is_some() && common[i][j + 1],
                    (a, Some(&"#")) => common[i][j + 1] || a.is_some() && common[i + 1][j],
                    (Some(a), Some(b)) => (a == b || *a == "*" || *b == "*") && common[i + 1][j + 1],
                    (None, _) | (_, None) => false,
                };
            }
        }
        common[0][0]
    }

    /// How specific the pattern is: more literal words first, then `*` before `#`. Greater wins.
    #[must_use]
    pub fn rank(&self) -> (usize, usize, bool) {
        let count = |want: fn(&str) -> bool| self.0.split('.').filter(|w| want(w)).count();
        let literal = count(|w| w != "*" && w != "#");
        let open = self.0.split('.').any(|w| w == "#");
        (literal, count(|w| w == "*"), !open)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(pattern: &str, kind: &str) -> bool {
        Pattern::parse(pattern).expect("valid").matches(kind)
    }

    #[test]
    fn matches_as_the_broker_does() {
        assert!(takes("order.placed", "order.placed"));
        assert!(!takes("order.placed", "order.placed.late"));
        assert!(takes("order.*", "order.placed"));
        assert!(!takes("order.*", "order"));
        assert!(!takes("order.*", "order.placed.late"));
        assert!(takes("order.#", "order"));
        assert!(takes("order.#", "order.placed.late"));
        assert!(takes("#", "anything.at.all"));
        assert!(takes("#.late", "late"));
        assert!(takes("#.late", "order.placed.late"));
        assert!(takes("order.#.late", "order.late"));
        assert!(takes("order.#.*.late", "order.placed.late"));
        assert!(!takes("order.#.*.late", "order.late"));
    }

    #[test]
    fn the_more_specific_pattern_ranks_higher() {
        let ranked = ["#", "order.#", "order.*", "order.placed"];
        for pair in ranked.windows(2) {
            let rank = |text| Pattern::parse(text).expect("valid").rank();
            assert!(rank(pair[0]) < rank(pair[1]), "{pair:?}");
        }
    }

    /// All of up to so many words.
    fn texts(words: &[&str], most: usize) -> Vec<String> {
        let (mut all, mut last) = (Vec::new(), vec![String::new()]);
        for _ in 0..most {
            let longer = |text: &String| words.iter().map(|w| format!("{text}.{w}")).collect::<Vec<_>>();
            last = last.iter().flat_map(longer).collect();
            all.extend(last.iter().map(|text| text[1..].to_owned()));
        }
        all
    }

    #[test]
    fn patterns_overlap_where_a_type_matches_both() {
        let kinds = texts(&["a", "b", "c"], 5);
        let patterns: Vec<Pattern> =
            texts(&["a", "b", "*", "#"], 3).iter().filter_map(|t| Pattern::parse(t).ok()).collect();
        let taken: Vec<Vec<bool>> = patterns.iter().map(|p| kinds.iter().map(|k| p.matches(k)).collect()).collect();
        for (one, one_takes) in patterns.iter().zip(&taken) {
            for (two, two_takes) in patterns.iter().zip(&taken) {
                let both = one_takes.iter().zip(two_takes).any(|(a, b)| *a && *b);
                assert_eq!(one.overlaps(two), both, "{one} and {two}");
            }
        }
    }

    #[test]
    fn refuses_what_would_never_match() {
        for text in ["", "order*", "a b", "order.#x"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }
}
