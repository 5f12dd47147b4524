"""An exec handler for tests: emits, for each event, one of the type TYPE that says what it was.

usage: echo.py TYPE FILE    each call appends the program's pid to FILE; every call emits under an id of its own
"""
import json
import os
import sys
import uuid

calls = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

for line in sys.stdin:
    event = json.loads(line)["event"]
    os.write(calls, f"{os.getpid()}\n".encode())
    what = {"type": event["type"], "case": event["subject"], "sequence": event["sequence"]}
    emit = {"id": str(uuid.uuid4()), "type": sys.argv[1], "data": what}
    answer = {"id": event["id"], "source": event["source"], "status": "done", "emit": [emit]}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
