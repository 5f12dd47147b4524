//! Worker and publisher processes, and how they end.
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;
use tokio::process::{Child, ChildStdin};

/// A running process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

/// A binary of this workspace, beside the test's own.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    let dir = exe.parent().unwrap_or(Path::new("."));
    let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
    dir.join(name)
}

/// A command with this environment and nothing of Warren's from outside.
#[must_use]
pub fn command(name: &str, environment: &[(String, String)]) -> Command {
    let mut command = Command::new(binary(name));
    for (variable, _) in std::env::vars() {
        if ["WARREN_", "AMQP_", "DATABASE_"].iter().any(|ours| variable.starts_with(ours)) {
            command.env_remove(variable);
        }
    }
    command.envs(environment.iter().map(|(k, v)| (k, v)));
    command
}

/// Runs a command to its end, with this input.
///
/// # Errors
/// It cannot be started, or does not end within a minute or two.
pub async fn output(mut command: Command, input: Vec<u8>) -> anyhow::Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut command = tokio::process::Command::from(command);
    let mut child = command.kill_on_drop(true).spawn().context("is the workspace built? 'make test' builds it")?;
    let stdin = child.stdin.take();
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        if let Some(mut stdin) = stdin {
            // A process that ends early does not read it all.
            let _ = stdin.write_all(&input).await;
        }
    });
    let ended = tokio::time::timeout(Duration::from_secs(120), child.wait_with_output()).await;
    Ok(ended.context("the command does not end")??)
}

impl Process {
    /// Starts a command; its output goes to a file.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: Command, log: &Path) -> anyhow::Result<Self> {
        Self::spawn(command, log, Stdio::null())
    }

    /// Starts a command with this end of a pipe to write its input into; its output goes to a file.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_fed(command: Command, log: &Path) -> anyhow::Result<(Self, ChildStdin)> {
        let mut process = Self::spawn(command, log, Stdio::piped())?;
        let stdin = process.child.stdin.take().context("piped")?;
        Ok((process, stdin))
    }

    fn spawn(mut command: Command, log: &Path, input: Stdio) -> anyhow::Result<Self> {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(input).stdout(file.try_clone()?).stderr(file);
        let child = tokio::process::Command::from(command).kill_on_drop(true).spawn();
        Ok(Self { child: child.context("is the workspace built? 'make test' builds it")?, log: log.to_owned() })
    }

    /// Its pid, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: rustix::process::Signal) -> anyhow::Result<()> {
        let pid = self.pid().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
        rustix::process::kill_process(pid.context("the process has ended")?, signal)?;
        Ok(())
    }

    /// Stops it in its tracks, and waits until each of its threads stands still.
    ///
    /// # Errors
    /// It has ended.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::STOP)?;
        while !self.stands_still()? {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Whether each of its threads is stopped by a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn stands_still(&self) -> anyhow::Result<bool> {
        let tasks = format!("/proc/{}/task", self.pid().context("the process has ended")?);
        let stands = |entry: std::io::Result<std::fs::DirEntry>| {
            let stat = entry.and_then(|entry| std::fs::read_to_string(entry.path().join("stat"))).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
        };
        Ok(std::fs::read_dir(&tasks)?.all(stands))
    }

    /// Kills it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// It cannot be killed.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("cannot be killed")
    }

    /// Asks it to end, and waits for its exit status.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn terminate(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(rustix::process::Signal::TERM)?;
        self.wait(patience).await
    }

    /// Waits for its exit status.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn wait(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        let ended = tokio::time::timeout(patience, self.child.wait()).await;
        Ok(ended.with_context(|| format!("it still runs after {patience:?}; its log:\n{}", self.log()))??)
    }

    /// The last line of JSON that it printed, such as the account of `send`.
    ///
    /// # Errors
    /// It printed none.
    pub fn account(&self) -> anyhow::Result<serde_json::Value> {
        let log = self.log();
        let line = log.lines().rev().find(|line| line.starts_with('{')).with_context(|| format!("no account:\n{log}"));
        Ok(serde_json::from_str(line?)?)
    }

    /// What it printed.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// The exit code and both outputs, for assertions that show them.
///
/// # Errors
/// The exit code is another.
pub fn expect_exit(output: &Output, code: i32) -> anyhow::Result<(String, String)> {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(code), "{} instead of {code}\n{stdout}\n{stderr}", output.status);
    Ok((stdout.into_owned(), stderr.into_owned()))
}
