//! Publishers of other makes: Python's pika, in an environment of its own.
use crate::broker::{root, scratch};
use crate::lab::Lab;
use crate::process;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A Python with pika; none where neither PyPI nor a package of the system has it.
///
/// # Errors
/// The scratch directory cannot be written.
pub fn python() -> anyhow::Result<Option<PathBuf>> {
    let has_pika = |python: &Path| {
        Command::new(python).args(["-c", "import pika"]).output().is_ok_and(|output| output.status.success())
    };
    let system = PathBuf::from("python3");
    if has_pika(&system) {
        return Ok(Some(system));
    }
    let dir = scratch().join("python");
    std::fs::create_dir_all(scratch())?;
    let python = dir.join("bin/python3");
    // Tests run side by side; one of them makes it.
    let lock = std::fs::File::create(scratch().join("python.lock"))?;
    lock.lock()?;
    if !has_pika(&python) {
        let venv = Command::new("python3").args(["-m", "venv"]).arg(&dir).output();
        if venv.is_ok_and(|output| output.status.success()) {
            let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pika==1.3.2"];
            Command::new(&python).args(pip).output().ok();
        }
    }
    if has_pika(&python) {
        return Ok(Some(python));
    }
    eprintln!("SKIPPED: python3 has no pika, and it could not be installed (python3-pika, or pip and a network)");
    Ok(None)
}

impl Lab {
    /// Publishes plain messages to an exchange with `tests/handlers/upstream.py`, mandatory and confirmed.
    ///
    /// # Errors
    /// What it printed.
    pub async fn upstream(&self, python: &Path, exchange: &str, messages: &[Value]) -> anyhow::Result<()> {
        let mut command = Command::new(python);
        command.arg(root().join("tests/handlers/upstream.py")).args([&self.url(), exchange]);
        let lines: String = messages.iter().map(|message| format!("{message}\n")).collect();
        process::expect_exit(&process::output(command, lines.into_bytes()).await?, 0).map(|_| ())
    }
}
