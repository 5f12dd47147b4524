"""The services of the order process: stock, payments, shipping and mail, in one exec handler.

usage: services.py FILE      each call appends {"id":…, "type":…, "step":…, "instance":…, "key":…, "attempt":…, "outcome":…} to FILE

What the starting event's data says of a step (or of `undo.<step>`) happens, as `data["input"][<step>]`: {"dead": true} fails for
good; {"fail": N} fails the first N attempts; {"dead_unless": PATH} fails for good until PATH exists; {"wait_for": PATH} waits
until PATH exists; {"sleep": S} takes S seconds; {"lose": N} never answers the first N attempts of the process.
"""
import json
import os
import sys
import threading
import time

notes = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
lock = threading.Lock()


def serve(call):
    event, attempt = call["event"], call["attempt"]
    step, _, again = event["processstep"].partition("#")
    wish = event["data"]["input"].get(step) or {}
    if int(again or 1) <= wish.get("lose", 0):
        time.sleep(3600)
    while "wait_for" in wish and not os.path.exists(wish["wait_for"]):
        time.sleep(0.02)
    time.sleep(wish.get("sleep", 0))
    answer = {"id": event["id"], "source": event["source"], "status": "done", "result": {"by": step}}
    if wish.get("dead") or "dead_unless" in wish and not os.path.exists(wish["dead_unless"]):
        answer.update(status="dead", error=f"{step} is asked to fail")
    elif attempt <= wish.get("fail", 0):
        answer.update(status="retry", error=f"{step} is asked to fail at attempt {attempt}")
    note = {"id": event["id"], "type": event["type"], "step": event["processstep"], "instance": event["processid"],
            "key": event["partitionkey"], "attempt": attempt, "outcome": answer["status"]}
    os.write(notes, (json.dumps(note) + "\n").encode())
    with lock:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


for line in sys.stdin:
    call = json.loads(line)
    wishes = call["event"]["data"]["input"]
    if any(isinstance(wish, dict) for wish in wishes.values()):
        threading.Thread(target=serve, args=(call,), daemon=True).start()
    else:
        serve(call)
