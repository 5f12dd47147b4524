//! Real programs, small ones: what they answer, how they die, what they leave.
use super::*;
use crate::handler::Context;
use futures_util::{StreamExt, stream};
use std::sync::Mutex;
use warren_shared::Event;

/// What the Python programs below begin with.
const PRELUDE: &str = "
import json, os, sys, time, signal, subprocess
def answer(e, **said):
    print(json.dumps({'id': e['id'], 'source': e['source'], 'status': 'done', **said}), flush=True)
def events():
    for line in sys.stdin:
        yield json.loads(line)['event']
";

fn start(processes: usize, argv: &[&str]) -> Exec {
    Exec::start(Command { argv: argv.iter().map(ToString::to_string).collect(), processes })
}

fn python(processes: usize, program: &str) -> Exec {
    start(processes, &["python3", "-c", &format!("{PRELUDE}{program}")])
}

fn call_with(id: &str, data: &str, timeout: Duration) -> Call {
    let event = Event::new(id, "/tests", "thing.done").and_then(|e| e.with_json(data.as_bytes(), Default::default()));
    let context = Context {
        attempt: 1,
        timeout,
        partition: "p00".into(),
        pool: "tests".into(),
        limits: Default::default(),
        ..Default::default()
    };
    Call { event: event.expect("valid"), context, entry: Default::default(), kept: None }
}

fn call(id: &str) -> Call {
    call_with(id, "null", Duration::from_secs(60))
}

/// Calls all at once; what became of each, in a word or the error.
async fn all(exec: &Exec, ids: &[&str]) -> Vec<String> {
    futures_util::future::join_all(ids.iter().map(|id| exec.handle(call(id)))).await.into_iter().map(word).collect()
}

fn word(outcome: Outcome) -> String {
    match outcome {
        Outcome::Done(_) => "done".into(),
        Outcome::Retry { error, .. } | Outcome::NotNow { error, .. } => format!("retry: {error}"),
        Outcome::Dead { error } | Outcome::Unclear { error } => format!("dead: {error}"),
        Outcome::Interrupted => "interrupted".into(),
        Outcome::Recorded { .. } => "recorded".into(),
        Outcome::Needs(_) => "needs".into(),
    }
}

async fn result(exec: &Exec, call: Call) -> serde_json::Value {
    match exec.handle(call).await {
        Outcome::Done(reply) => reply.result.expect("a result").parse().expect("JSON"),
        other => panic!("{other:?}"),
    }
}

/// Whether a process is gone, or a zombie that its new parent has not looked at.
fn is_gone(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

async fn until(mut fact: impl FnMut() -> bool) {
    let waiting = async {
        while !fact() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("it becomes true");
}

/// The log of this thread, from here on.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let to = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || to.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("not poisoned")).into_owned()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("not poisoned").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_program_says_done_retry_or_dead() {
    let exec = python(
        1,
        "
for e in events():
    match e['id']:
        case 'r': answer(e, status='retry', error='later', after='5s')
        case 'd': answer(e, status='dead', error='never')
        case 'w': answer(e, status='perhaps')
        case _: answer(e, result={'n': 1}, emit=[{'type': 'a'}, {'type': 'b', 'data': e['data']}])
",
    );
    let retry = exec.handle(call("r")).await;
    assert!(
        matches!(&retry, Outcome::Retry { error, after: Some(after) } if error == "later" && after.as_secs() == 5),
        "{retry:?}"
    );
    assert_eq!(all(&exec, &["d"]).await, ["dead: never"]);
    assert!(all(&exec, &["w"]).await[0].starts_with("dead: the program's answer is wrong: 'status' is \"perhaps\""));
    let Outcome::Done(reply) = exec.handle(call_with("x", "{\"k\": [1]}", Duration::from_secs(60))).await else {
        panic!("not done");
    };
    assert_eq!(reply.result.expect("a result").get(), "{\"n\": 1}");
    assert_eq!(reply.emit.iter().map(Event::kind).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(reply.emit[1].json::<serde_json::Value>().expect("JSON"), serde_json::json!({"k": [1]}));
}

#[tokio::test]
async fn answers_come_in_any_order_and_once() {
    let exec = python(
        1,
        "
held = []
for e in events():
    held.append(e)
    if len(held) == 3:
        for e in reversed(held):
            answer(e, result=e['id'])
            answer(e, status='dead', error='twice')
            answer({'id': 'nobody', 'source': '/x'}, status='dead')
        held = []
",
    );
    for round in 0..3 {
        let ids = ["a", "b", "c"].map(|id| format!("{id}{round}"));
        let results = futures_util::future::join_all(ids.iter().map(|id| result(&exec, call(id)))).await;
        assert_eq!(results, ids);
    }
}

#[tokio::test]
async fn ids_and_sizes_of_all_kinds_come_through() {
    let exec = python(1, "\nfor e in events(): answer(e, result=len(json.dumps(e['data'])))\n");
    for id in ["ü✓\"'\\ \u{1F600}", "\\u0041", "{\"id\":1}", &"x".repeat(255)] {
        assert_eq!(result(&exec, call(id)).await, 4, "{id}");
    }
    let large = format!("\"{}\"", "y".repeat(8 << 20));
    let calls = ["l1", "l2", "l3"].map(|id| result(&exec, call_with(id, &large, Duration::from_secs(60))));
    for size in futures_util::future::join_all(calls).await {
        assert_eq!(size, (8 << 20) + 2);
    }
}

#[tokio::test]
async fn an_answer_may_be_as_large_as_a_body() {
    let exec = python(1, "\nfor e in events(): answer(e, result='z' * (15 << 20))\n");
    assert_eq!(result(&exec, call("a")).await.as_str().map(str::len), Some(15 << 20));
}

#[tokio::test]
async fn garbage_is_ignored_and_logged_a_few_times() {
    let (log, _guard) = Log::start();
    let exec = python(
        1,
        "
for e in events():
    for i in range(2000):
        print('secret garbage', i)
        print('{\"id\": 5}')
        print('')
        sys.stdout.buffer.write(b'\\xff\\xfe{}\\n')
        answer({'id': 'secret stranger', 'source': '/x'})
    answer(e)
",
    );
    assert_eq!(all(&exec, &["a", "b"]).await, ["done", "done"]);
    let text = log.text();
    assert!(text.contains("that is no answer") && text.contains("it does not hold"), "{text}");
    assert!(text.lines().count() < 12, "{text}");
    assert!(!text.contains("secret"), "{text}");
}

#[tokio::test]
async fn a_flood_of_lines_neither_starves_nor_floods() {
    let (log, _guard) = Log::start();
    let exec = python(
        1,
        "
import threading
def flood():
    while True: sys.stdout.write('y\\n' * 10000)
for e in events():
    if e['id'] == 'first': threading.Thread(target=flood, daemon=True).start()
    sys.stdout.write('\\n' + json.dumps({'id': e['id'], 'source': e['source'], 'status': 'done'}) + '\\n')
",
    );
    for id in ["first", "second", "third"] {
        assert_eq!(all(&exec, &[id]).await, ["done"]);
    }
    // Others on this thread get their turn.
    let other = tokio::time::timeout(Duration::from_secs(20), async {
        let run = exec.handle(call("fourth"));
        let ticks = stream::iter(0..50).then(|_| sleep(Duration::from_millis(1))).count();
        tokio::join!(run, ticks).1
    });
    assert_eq!(other.await.expect("not starved"), 50);
    assert!(log.text().lines().count() < 20, "{}", log.text());
    exec.close().await;
}

#[tokio::test]
async fn a_line_without_an_end_is_the_end() {
    let exec = python(
        1,
        "
for e in events():
    while e['id'] == 'x': sys.stdout.write('x' * 65536)
    answer(e)
",
    );
    let outcomes = all(&exec, &["x"]).await;
    assert!(outcomes[0].starts_with("retry: the program wrote a line of more than 16842752 bytes"), "{outcomes:?}");
    assert_eq!(all(&exec, &["y"]).await, ["done"]);
}

#[tokio::test]
async fn who_dies_alone_is_tried_again() {
    let exec = python(1, "\nfor e in events():\n    if e['id'] == 'x': os._exit(3)\n    answer(e)\n");
    assert_eq!(all(&exec, &["x"]).await, ["retry: the program ended (exit status: 3) while it handled this event"]);
    assert_eq!(all(&exec, &["a", "b"]).await, ["done", "done"]);
}

#[tokio::test]
async fn whoever_kills_the_program_pays_and_its_neighbours_do_not() {
    let exec = python(
        1,
        "
import signal
for e in events():
    if e['id'].startswith('x'): os.kill(os.getpid(), signal.SIGSEGV)
    answer(e)
",
    );
    let ids: Vec<String> = (0..40).map(|i| if i % 5 == 3 { format!("x{i}") } else { i.to_string() }).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    for (id, outcome) in ids.iter().zip(all(&exec, &ids).await) {
        if id.starts_with('x') {
            assert!(outcome.starts_with("retry: the program ended (signal: 11"), "{id}: {outcome}");
        } else {
            assert_eq!(outcome, "done", "{id}");
        }
    }
}

#[tokio::test]
async fn a_program_that_reads_all_before_it_dies_still_betrays_the_culprit() {
    // It answers late and out of order, so every event is in it when it dies.
    let exec = python(
        1,
        "
import threading, queue
q = queue.Queue()
def work():
    while True:
        e = q.get()
        time.sleep(0.05)
        if e['id'] == 'x': os._exit(1)
        answer(e)
threading.Thread(target=work).start()
for e in events(): q.put(e)
",
    );
    let outcomes = all(&exec, &["a", "b", "x", "c", "d"]).await;
    assert_eq!(outcomes.iter().filter(|o| *o == "done").count(), 4, "{outcomes:?}");
    assert!(outcomes[2].starts_with("retry: the program ended (exit status: 1)"), "{outcomes:?}");
}

#[tokio::test]
async fn last_answers_of_a_dying_program_count() {
    let directory = tempfile::tempdir().expect("a directory");
    let read = directory.path().join("read");
    let program = format!(
        "{PRELUDE}
batch = []
for e in events():
    if e['id'] == 'warm': answer(e, result=os.getpid())
    else: batch.append(e)
    if len(batch) == 3:
        open(sys.argv[1], 'w').close()
        time.sleep(0.3)
        answer(batch[0], result=1); answer(batch[1], result=2)
        os._exit(0)
"
    );
    let exec = start(1, &["python3", "-c", &program, &read.display().to_string()]);
    let pid = result(&exec, call("warm")).await.as_u64().expect("a pid");
    let answered = futures_util::future::join(result(&exec, call("a")), result(&exec, call("b")));
    let (answered, last, ()) = tokio::join!(answered, exec.handle(call("c")), async {
        until(|| read.exists()).await;
        // The runtime stands still: it finds the answers and the death at once.
        while !is_gone(pid) {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    assert_eq!(answered, (1.into(), 2.into()));
    assert_eq!(word(last), "retry: the program ended (exit status: 0) while it handled this event");
}

#[tokio::test]
async fn a_closed_pipe_is_an_end() {
    let exec = python(
        1,
        "
for e in events():
    os.close(1)
    time.sleep(0.2 if e['id'] == 'x' else 1000)
    os._exit(5)
",
    );
    assert_eq!(all(&exec, &["x"]).await, ["retry: the program ended (exit status: 5) while it handled this event"]);
    let stays = "retry: the program closed its stdin or stdout while it handled this event";
    assert_eq!(all(&exec, &["y"]).await, [stays]);
}

#[tokio::test]
async fn who_hangs_pays_and_its_neighbours_do_not() {
    let exec = python(
        1,
        "
for e in events():
    if e['id'] == 'x': time.sleep(1000)
    answer(e)
",
    );
    assert_eq!(all(&exec, &["warm"]).await, ["done"]);
    let ids = [("a", 60_000), ("x", 300), ("b", 60_000), ("c", 60_000)];
    let calls = ids.map(|(id, ms)| exec.handle(call_with(id, "null", Duration::from_millis(ms))));
    let outcomes = futures_util::future::join_all(calls).await;
    let outcomes: Vec<String> = outcomes.into_iter().map(word).collect();
    assert_eq!(outcomes, ["done", "retry: no answer within 300ms", "done", "done"]);
}

#[tokio::test]
async fn a_queue_behind_a_slow_program_is_nobodys_fault() {
    let exec = python(1, "\nfor e in events():\n    time.sleep(0.15)\n    answer(e)\n");
    assert_eq!(all(&exec, &["warm"]).await, ["done"]);
    let ids: Vec<String> = (0..20).map(|i| i.to_string()).collect();
    let calls = ids.iter().map(|id| exec.handle(call_with(id, "null", Duration::from_millis(2500))));
    for outcome in futures_util::future::join_all(calls).await {
        assert_eq!(word(outcome), "done");
    }
}

#[tokio::test]
async fn a_dropped_call_leaves_no_trace_in_the_next() {
    let exec = python(
        1,
        "
n = 0
for e in events():
    n += 1
    time.sleep(0.1)
    answer(e, result=n)
",
    );
    {
        let first = exec.handle(call("same"));
        let warm = result(&exec, call("warm"));
        tokio::select! { biased; _ = first => panic!("it is dropped before its answer"), () = async {
            let _ = tokio::time::timeout(Duration::from_millis(1), warm).await;
        } => {} }
    }
    // The program still answers the call that nobody waits for; this one gets the answer that is its own.
    let second = result(&exec, call("same")).await;
    let third = result(&exec, call("same")).await.as_i64().expect("a number");
    assert_eq!(second.as_i64().map(|n| n + 1), Some(third), "no answer was taken for another's");
}

#[tokio::test]
async fn a_call_that_is_dropped_before_the_program_had_it_is_never_run() {
    let exec = python(
        1,
        "
seen = []
for e in events():
    seen.append(e['id'])
    answer(e, result=seen)
",
    );
    // On this one thread the slot has not run yet.
    tokio::select! { biased; _ = exec.handle(call("left")) => panic!("nobody answered"), () = std::future::ready(()) => {} }
    assert_eq!(result(&exec, call("stays")).await, serde_json::json!(["stays"]));
    assert_eq!(exec.doors[0].gauge.calls.load(Relaxed), 0);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let exec = start(2, &["/no/such/program", "x"]);
    let outcomes = all(&exec, &["a", "b", "c"]).await;
    for outcome in outcomes {
        assert!(outcome.starts_with("retry: cannot start '/no/such/program': No such file"), "{outcome}");
        assert!(outcome.ends_with("correct 'exec' in the routes"), "{outcome}");
    }
    let refused = start(1, &["/"]);
    assert!(all(&refused, &["a"]).await[0].contains("Permission denied"));
}

#[tokio::test]
async fn a_program_that_never_works_fails_its_events_within_seconds() {
    let exec = start(1, &["sh", "-c", "exit 7"]);
    let ids: Vec<String> = (0..100).map(|i| i.to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let outcomes = tokio::time::timeout(Duration::from_secs(60), all(&exec, &ids)).await.expect("soon");
    assert!(outcomes.iter().all(|o| o.starts_with("retry: the program ended (exit status: 7)")), "{outcomes:?}");
}

#[tokio::test]
async fn stderr_is_logged_by_the_line() {
    let (log, _guard) = Log::start();
    let exec = python(
        1,
        "
for e in events():
    print('hello', file=sys.stderr)
    print('\\x1b[31mred\\r', file=sys.stderr)
    print('L' * 100000 + 'END', file=sys.stderr)
    sys.stderr.write('unfinished'); sys.stderr.flush()
    answer(e)
",
    );
    assert_eq!(all(&exec, &["a"]).await, ["done"]);
    exec.close().await;
    let text = log.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[0].contains("python3 -c: hello") && lines[3].contains("unfinished"), "{text}");
    assert!(!text.contains('\x1b') && !text.contains("END"), "control characters and long lines are cut");
    assert!(lines[2].len() < LOG_LINE_AND_FIELDS, "{}", lines[2].len());
}

const LOG_LINE_AND_FIELDS: usize = 4096 + 300;

#[tokio::test]
async fn who_hangs_is_killed_with_all_that_it_started() {
    let exec = python(
        1,
        "
child = subprocess.Popen(['sleep', '1000'])
for e in events():
    if e['id'] == 'x': time.sleep(1000)
    answer(e, result=[os.getpid(), child.pid])
",
    );
    let first = result(&exec, call("a")).await;
    let pids: Vec<u64> = first.as_array().expect("two").iter().filter_map(serde_json::Value::as_u64).collect();
    assert!(pids.len() == 2 && !pids.iter().any(|pid| is_gone(*pid)), "{pids:?}");
    let hung = exec.handle(call_with("x", "null", Duration::from_millis(300))).await;
    assert_eq!(word(hung), "retry: no answer within 300ms");
    until(|| pids.iter().all(|pid| is_gone(*pid))).await;
    exec.close().await;
}

#[tokio::test]
async fn no_shell_reads_its_arguments() {
    let program = "import json, sys\nfor line in sys.stdin:\n    e = json.loads(line)['event']\n    \
                   print(json.dumps({'id': e['id'], 'source': e['source'], 'status': 'done', 'result': sys.argv[1:]}), flush=True)";
    let arguments = ["$HOME", "$(exit 3)", "`id`", "; exit 4", "* ?", "> /dev/null", "a\nb", "\"'\\"];
    let argv = [&["python3", "-c", program][..], &arguments].concat();
    let exec = start(1, &argv);
    assert_eq!(result(&exec, call("a")).await, serde_json::json!(arguments));
    exec.close().await;
}

#[tokio::test]
async fn closing_leaves_no_process() {
    // It ignores that its stdin ends, and so does what it started.
    let exec = python(
        2,
        "
child = subprocess.Popen(['sleep', '1000'])
for e in events():
    time.sleep(0.2)
    answer(e, result=[os.getpid(), child.pid])
time.sleep(1000)
",
    );
    let pids = futures_util::future::join_all(["a", "b"].map(|id| result(&exec, call(id)))).await;
    let pids: Vec<u64> =
        pids.iter().flat_map(|p| p.as_array().expect("two")).filter_map(serde_json::Value::as_u64).collect();
    assert_eq!(pids.iter().collect::<std::collections::BTreeSet<_>>().len(), 4, "two processes and their children");
    assert!(!pids.iter().any(|pid| is_gone(*pid)));
    exec.close().await;
    until(|| pids.iter().all(|pid| is_gone(*pid))).await;
    assert_eq!(all(&exec, &["c"]).await, ["interrupted"]);
    exec.close().await;
}

#[tokio::test]
async fn closing_lets_a_program_finish() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("bye");
    let exec = start(1, &["sh", "-c", "cat >/dev/null; echo bye > \"$0\"", &path.display().to_string()]);
    exec.close().await;
    assert_eq!(std::fs::read_to_string(path).expect("written at the end"), "bye\n");
}

#[tokio::test]
async fn a_handler_that_is_dropped_ends_its_programs() {
    let exec = python(1, "\nfor e in events(): answer(e, result=os.getpid())\n");
    let pid = result(&exec, call("a")).await.as_u64().expect("a pid");
    drop(exec);
    until(|| is_gone(pid)).await;
}

#[tokio::test]
async fn closing_interrupts_what_runs() {
    let exec = python(1, "\nfor e in events(): time.sleep(1000)\n");
    let (outcomes, ()) = tokio::join!(all(&exec, &["a", "b"]), async {
        until(|| exec.doors[0].gauge.calls.load(Relaxed) == 2).await;
        exec.close().await;
    });
    assert_eq!(outcomes, ["interrupted", "interrupted"]);
    assert_eq!(exec.doors[0].gauge.calls.load(Relaxed), 0);
}

#[tokio::test]
async fn the_least_loaded_process_is_taken() {
    let exec = python(
        3,
        "
for e in events():
    time.sleep(0.2)
    answer(e, result=os.getpid())
",
    );
    let ids: Vec<String> = (0..9).map(|i| i.to_string()).collect();
    let pids = futures_util::future::join_all(ids.iter().map(|id| result(&exec, call(id)))).await;
    for pid in &pids {
        assert_eq!(pids.iter().filter(|p| *p == pid).count(), 3, "{pids:?}");
    }
}

#[tokio::test]
async fn no_dead_process_is_taken_while_another_lives() {
    let exec = python(
        2,
        "
for e in events():
    if e['id'] == 'x': os._exit(1)
    answer(e, result=os.getpid())
",
    );
    let living = {
        let both = ["a", "b"].map(|id| result(&exec, call(id)));
        futures_util::future::join_all(both).await
    };
    assert!(all(&exec, &["x"]).await[0].starts_with("retry: "));
    let chosen = result(&exec, call("c")).await;
    assert!(living.contains(&chosen), "it did not wait for the one that is started again");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_thousand_events_pass_through_an_echo() {
    let exec = python(
        1,
        "
for line in sys.stdin:
    e = json.loads(line)['event']
    sys.stdout.write('{\"id\":\"%s\",\"source\":\"%s\",\"status\":\"done\"}\\n' % (e['id'], e['source']))
    sys.stdout.flush()
",
    );
    assert_eq!(all(&exec, &["warm"]).await, ["done"]);
    let begun = std::time::Instant::now();
    let ids =
        stream::iter(0..20_000).map(|i| exec.handle(call_with(&i.to_string(), "{\"n\":1}", Duration::from_secs(60))));
    let done = ids.buffer_unordered(256).filter(|o| std::future::ready(matches!(o, Outcome::Done(_)))).count().await;
    assert_eq!(done, 20_000);
    eprintln!("echo: {:.0} events/s", 20_000.0 / begun.elapsed().as_secs_f64());
}

/// An answer that is wrong and names its event: each would be another until the timeout, eight times over.
#[tokio::test]
async fn an_answer_that_is_wrong_and_names_its_event_fails_it_at_once() {
    let exec = python(
        1,
        "
for e in events():
    match e['id']:
        case 'nan': answer(e, result=float('nan'))
        case '7': print(json.dumps({'id': 7, 'source': e['source'], 'status': 'done'}), flush=True)
        case 'anonymous': print(json.dumps({'id': e['id'], 'status': 'done'}), flush=True)
        case 'half': print('{\"id\":\"half\",\"result\":{,', flush=True)
        case _: answer(e)
",
    );
    let seen = all(&exec, &["nan", "7", "anonymous", "half", "good"]).await;
    let wanted = [
        "not valid JSON at column 6",
        "'id' is not a string (column 8)",
        "it has no 'source'",
        "not valid JSON at column 24",
        "done",
    ];
    for (seen, wanted) in seen.iter().zip(wanted) {
        assert!(seen.contains(wanted) && (wanted == "done" || seen.starts_with("dead: ")), "{seen}");
    }
}

/// Two events with one id, of two sources: the program holds both when it answers without a source.
#[tokio::test]
async fn an_id_that_two_events_have_names_neither() {
    let exec = python(
        1,
        "
held = []
for e in events():
    held.append(e)
    if len(held) == 2:
        print(json.dumps({'id': e['id'], 'status': 'done'}), flush=True)
        for e in held: answer(e)
",
    );
    let mut other = call("1");
    other.event = Event::new("1", "/elsewhere", "thing.done").expect("valid");
    let seen = futures_util::future::join(exec.handle(call("1")), exec.handle(other)).await;
    assert_eq!((word(seen.0), word(seen.1)), ("done".into(), "done".into()));
}

/// The longest line follows the limit of a body, and one that is longer fails the event that it names, and no other.
#[tokio::test]
async fn the_longest_line_follows_the_limit_of_a_body() {
    let exec = python(
        1,
        "
for e in events():
    answer(e, result='z' * (20 << 20) if e['id'] == 'large' else None)
",
    );
    let large = || {
        let mut call = call("large");
        call.context.limits.body = 32 << 20;
        call
    };
    let outcome = exec.handle(large()).await;
    let Outcome::Done(reply) = outcome else { panic!("{}", word(outcome)) };
    assert_eq!(reply.result.expect("a result").get().len(), (20 << 20) + 2);

    let exec = python(
        1,
        "
for e in events():
    answer(e, result='z' * (20 << 20) if e['id'] == 'large' else None)
",
    );
    let seen = all(&exec, &["large", "a", "b"]).await;
    assert!(seen[0].starts_with("dead: ") && seen[0].contains("a line of more than 1"), "{}", seen[0]);
    assert_eq!(seen[1..], ["done", "done"]);
}

#[tokio::test]
async fn a_worker_without_file_descriptors_fails_no_event_of_a_program() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: before.maximum }).expect("lower is always allowed");
    let exec = python(1, "for e in events(): answer(e)");
    let mut call = exec.handle(call("1"));
    let waits = tokio::time::timeout(Duration::from_millis(1500), &mut call).await;
    setrlimit(Resource::Nofile, before).expect("as it was");
    assert!(waits.is_err(), "it cannot be started, which is no attempt: {waits:?}");
    assert_eq!(word(call.await), "done");
}

#[tokio::test]
async fn a_program_that_cannot_be_started_for_want_of_descriptors_can_be_closed() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: before.maximum }).expect("lower is always allowed");
    let exec = python(1, "for e in events(): answer(e)");
    tokio::task::yield_now().await;
    let closed = tokio::time::timeout(Duration::from_secs(20), exec.close()).await;
    setrlimit(Resource::Nofile, before).expect("as it was");
    closed.expect("it ends at once");
}
