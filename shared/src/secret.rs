//! Values that no log shows, and the files that they came from.
use std::fmt;

/// A value that no log shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    value: String,
    file: Option<File>,
}

/// Where a secret came from: whoever connects reads it again, for it may have been rotated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// The variable that names it, such as `AMQP_PASSWORD_FILE`.
    pub variable: String,
    /// Its path.
    pub path: String,
}

impl Secret {
    /// Hides a value.
    #[must_use]
    pub fn new(value: impl Into<String>) -> Self {
        Self { value: value.into(), file: None }
    }

    /// The same, from this file.
    #[must_use]
    pub fn of(self, file: Option<File>) -> Self {
        Self { file, ..self }
    }

    /// The value, for the one place that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.value
    }

    /// The file that it came from.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// What was found in its file now; returns whether that is another value.
    pub fn renew(&mut self, found: String) -> bool {
        let changed = self.value != found;
        self.value = found;
        changed
    }

    /// The variable to correct where the value is wrong: the one that names its file, or this one.
    #[must_use]
    pub fn variable(&self, name: &str) -> String {
        self.file.as_ref().map_or_else(|| name.to_owned(), |file| file.variable.clone())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What the text of a file stands for: an editor's line end is no part of a password.
#[must_use]
pub fn of_file(text: &str) -> &str {
    text.trim_end_matches(['\r', '\n'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_shows_it_and_its_file_is_what_is_to_be_corrected() {
        let file = File { variable: "AMQP_PASSWORD_FILE".into(), path: "/run/secrets/p".into() };
        let mut secret = Secret::new("hunter2").of(Some(file));
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "(secret) Some((secret))");
        assert_eq!(secret.variable("AMQP_PASSWORD"), "AMQP_PASSWORD_FILE");
        assert!(!secret.renew("hunter2".into()) && secret.renew("hunter3".into()));
        assert_eq!(secret.reveal(), "hunter3");
        assert_eq!(Secret::new("x").variable("AMQP_PASSWORD"), "AMQP_PASSWORD");
    }

    #[test]
    fn only_the_line_end_of_a_file_is_left_out() {
        assert_eq!([" a b \r\n", "a\n\n", "", "\n"].map(of_file), [" a b ", "a", "", ""]);
    }
}
