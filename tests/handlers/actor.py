"""An exec handler that does what the event's data asks for, right or wrong, and notes every call as JSON.

usage: actor.py FILE         each call appends {"pid":…, "at":…, "attempt":…, "event":{…}} to FILE

data: {"fail": N} fails the first N attempts; with "after": "2s" it asks for that wait; {"fail_unless": PATH} fails for
good until PATH exists; {"retry_unless": PATH} asks to be tried again until PATH exists; {"dead": true} fails for good;
{"hang": N} never answers the first N attempts; {"exit": N} ends the program in the first N attempts; {"sleep": S} takes
S seconds; {"flood": LINES} writes nonsense to stdout first; {"stranger": true} answers for an event that it was not
given; {"twice": true} answers twice; {"garbage": true} answers with a line that is no JSON and nothing else;
{"answer": {…}} answers with these members; {"emit": […]} emits.
"""
import json
import os
import sys
import time

notes = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def say(answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


for line in sys.stdin:
    call = json.loads(line)
    event, attempt = call["event"], call["attempt"]
    note = {"pid": os.getpid(), "at": time.time(), "attempt": attempt, "event": event}
    os.write(notes, (json.dumps(note) + "\n").encode())
    data = event.get("data") if isinstance(event.get("data"), dict) else {}
    answer = {"id": event["id"], "source": event["source"], "status": "done"}
    if attempt <= data.get("exit", 0):
        os._exit(3)
    if attempt <= data.get("hang", 0):
        time.sleep(3600)
    time.sleep(data.get("sleep", 0))
    for n in range(data.get("flood", 0)):
        sys.stdout.write(f"debug: line {n} of a program that talks too much\n")
    if data.get("stranger"):
        say({"id": "nobody-asked", "source": "/elsewhere", "status": "dead", "error": "not mine"})
    if data.get("garbage"):
        sys.stdout.write("this is no answer\n")
        sys.stdout.flush()
        continue
    if attempt <= data.get("fail", 0):
        answer.update(status="retry", error=f"asked to fail at attempt {attempt}")
        if "after" in data:
            answer["after"] = data["after"]
    elif "retry_unless" in data and not os.path.exists(data["retry_unless"]):
        answer.update(status="retry", error="not repaired yet")
    elif "fail_unless" in data and not os.path.exists(data["fail_unless"]):
        answer.update(status="dead", error="not repaired yet")
    elif data.get("dead"):
        answer.update(status="dead", error="asked to die")
    else:
        answer["emit"] = data.get("emit", [])
    answer.update(data.get("answer", {}))
    say(answer)
    if data.get("twice"):
        say(answer)
