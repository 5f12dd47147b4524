//! Secrets from files, read again whenever somebody connects: a rotation takes no restart.
use std::collections::BTreeSet;
use warren_shared::env::Secret;
use warren_shared::secret::of_file;

/// What was complained about and has not been set right: each is said once.
#[derive(Debug, Default)]
pub struct Complaints(BTreeSet<String>);

impl Complaints {
    /// Reads a secret's file again. While that cannot be done, its last value stays.
    pub fn renew(&mut self, secret: &mut Secret) {
        let Some(file) = secret.file().cloned() else { return };
        // A few lines of a local file, and only before a connection is made: no thread is worth it.
        let why = match std::fs::read_to_string(&file.path) {
            Ok(text) if of_file(&text).is_empty() => "it is empty".to_owned(),
            Ok(text) => {
                self.0.remove(&file.variable);
                if secret.renew(of_file(&text).to_owned()) {
                    tracing::info!(variable = file.variable, "{}: the file has a new value", file.variable);
                }
                return;
            }
            Err(error) => error.to_string(),
        };
        let said = format!("cannot read '{}' again ({why})", file.path);
        self.say(&file.variable, &said);
    }

    /// Warns of what keeps the new values from being used, unless that was said already.
    pub fn say(&mut self, variable: &str, problem: &str) {
        if self.0.insert(variable.to_owned()) {
            tracing::warn!(variable, "{variable}: {problem}; the last good value stays in use");
        }
    }

    /// The new values are good.
    pub fn settle(&mut self, variable: &str) {
        self.0.remove(variable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warren_shared::secret::File;

    #[test]
    fn a_file_is_read_again_and_its_last_value_outlives_it() {
        let dir = std::env::temp_dir().join(format!("warren-secrets-{}", std::process::id()));
        let path = dir.to_str().expect("UTF-8").to_owned();
        std::fs::write(&path, "second\n").expect("writable");
        let file = File { variable: "AMQP_PASSWORD_FILE".into(), path: path.clone() };
        let (mut secret, mut complaints) = (Secret::new("first").of(Some(file)), Complaints::default());
        complaints.renew(&mut secret);
        assert_eq!(secret.reveal(), "second");
        std::fs::write(&path, "\n").expect("writable");
        complaints.renew(&mut secret);
        std::fs::remove_file(&path).expect("there");
        complaints.renew(&mut secret);
        assert_eq!((secret.reveal(), complaints.0.len()), ("second", 1));
        std::fs::write(&path, "third").expect("writable");
        complaints.renew(&mut secret);
        std::fs::remove_file(&path).expect("there");
        assert_eq!((secret.reveal(), complaints.0.len()), ("third", 0));
        let mut fixed = Secret::new("fixed");
        complaints.renew(&mut fixed);
        assert_eq!(fixed.reveal(), "fixed");
    }
}
