"""An exec handler for tests: notes what it saw, and emits one event for each event that it handled.

usage: ledger.py FILE        each call appends "<pid> <id> <key> <sequence> <attempt>" to FILE
       ledger.py FILE fresh  the same, and every call emits under an id of its own: an effect that is recorded twice
                             shows as two events instead of one repeated

What an event's data asks for happens: {"fail": N} fails the first N attempts, {"dead": true} fails for good,
{"sleep": S} takes S seconds, {"exit": true} ends this program, {"kill_parent": true} kills the worker (-9),
{"sleeps": [S, T]} takes S seconds the first time it is called, by whichever worker, T the next, and notes "answered <id>".
"""
import json
import os
import signal
import sys
import time
import uuid

FRESH = sys.argv[2:] == ["fresh"]


def kill_parent():
    """Kills the worker that started this program, and nobody who adopted it since."""
    parent = os.getppid()
    with open(f"/proc/{parent}/comm", encoding="ascii") as comm:
        if comm.read().strip() == "warren-worker":
            os.kill(parent, signal.SIGKILL)
            time.sleep(5)


def calls(wanted):
    """How often this event was handed to a program."""
    with open(sys.argv[1], encoding="utf-8") as notes:
        return sum(len(note.split(" ")) == 5 and note.split(" ")[1] == wanted for note in notes)


ledger = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

for line in sys.stdin:
    call = json.loads(line)
    event = call["event"]
    data = event.get("data") if isinstance(event.get("data"), dict) else {}
    key = event.get("partitionkey") or event.get("subject") or event["id"]
    note = f"{os.getpid()} {event['id']} {key} {event.get('sequence', '-')} {call['attempt']}\n"
    os.write(ledger, note.encode())
    answer = {"id": event["id"], "source": event["source"], "status": "done"}
    if data.get("kill_parent"):
        kill_parent()
    if data.get("exit"):
        os._exit(3)
    if data.get("sleep"):
        time.sleep(data["sleep"])
    if data.get("sleeps"):
        time.sleep(data["sleeps"][calls(event["id"]) - 1])
    if data.get("dead"):
        answer.update(status="dead", error="asked to die")
    elif data.get("fail", 0) >= call["attempt"]:
        answer.update(status="retry", error="asked to fail")
    else:
        answer["emit"] = [
            {
                "type": "test.recorded",
                "subject": key,
                "data": {"id": event["id"], "type": event["type"], "sequence": event.get("sequence")},
            }
        ]
        if FRESH:
            answer["emit"][0]["id"] = str(uuid.uuid4())
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    if data.get("sleeps"):
        os.write(ledger, f"answered {event['id']}\n".encode())
