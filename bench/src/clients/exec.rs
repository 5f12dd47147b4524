//! Warren with an exec handler: the worker is embedded, the program is this binary again, as an echo.
use super::{Task, say, warren};
use anyhow::Context;
use serde::Deserialize;
use std::borrow::Cow;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use tokio::io::AsyncBufReadExt;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use warren_worker::Worker;

/// Takes everything, each event through the echo. Its answers are its own, so a socket tells us how far it is.
pub(crate) async fn drain(task: Task) -> anyhow::Result<()> {
    let socket = format!("{}.socket", task.store);
    // Of an earlier run.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {socket}"))?;
    let exe = std::env::current_exe()?;
    let argv = [&*exe.to_string_lossy(), "client", "echo", &socket, &task.count.to_string()].map(str::to_owned);
    let routes = serde_json::json!({"routes": [{"on": crate::events::KIND, "exec": argv}]}).to_string();
    let settings = warren::settings(&task.url, &task.store_url(), Some(&routes))?;
    let worker = Worker::builder(settings).build().map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
    let (stop, stops) = mpsc::unbounded_channel();
    let running = tokio::spawn(worker.run(stops));
    let (stream, _) = listener.accept().await?;
    let mut lines = tokio::io::BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await? {
        if line == "last" {
            break;
        }
        say(&line);
    }
    let _ = stop.send(());
    running.await??;
    say("last");
    Ok(())
}

#[derive(Deserialize)]
struct Asked<'a> {
    #[serde(borrow)]
    event: Named<'a>,
}

#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    source: Cow<'a, str>,
}

/// The program: an answer a line, written when there is nothing more to read at once.
pub(crate) fn echo(rest: &[String]) -> anyhow::Result<ExitCode> {
    let [socket, count] = rest else { anyhow::bail!("echo SOCKET COUNT") };
    let (mut socket, count) = (UnixStream::connect(socket)?, count.parse::<u64>()?);
    let (mut input, mut out) = (BufReader::with_capacity(1 << 16, std::io::stdin().lock()), std::io::stdout().lock());
    let (mut line, mut answers, mut handled) = (Vec::new(), Vec::new(), 0);
    while input.read_until(b'\n', &mut line)? > 0 {
        let Asked { event: Named { id, source } } = serde_json::from_slice(&line)?;
        writeln!(answers, "{{\"id\":\"{id}\",\"source\":\"{source}\",\"status\":\"done\"}}")?;
        line.clear();
        handled += 1;
        if handled == 1 {
            socket.write_all(b"first\n")?;
        }
        if input.buffer().is_empty() || answers.len() > 1 << 16 {
            out.write_all(&answers)?;
            out.flush()?;
            answers.clear();
        }
        if handled == count {
            socket.write_all(b"last\n")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
