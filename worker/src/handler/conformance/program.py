"""The exec host of the conformance suite: does what the extension 'script' of each event says."""
import json
import os
import sys
import threading
import time

lock = threading.Lock()
met = []


def say(event, **answer):
    line = json.dumps({"id": event["id"], "source": event["source"], "status": "done", **answer})
    with lock:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def work(call, script):
    event = call["event"]
    match script["do"]:
        case "reply":
            say(event, **{name: script[name] for name in ("result", "emit") if name in script})
        case "reply raw":
            line = json.dumps({"id": event["id"], "source": event["source"], "status": "done"})
            with lock:
                sys.stdout.write(line[:-1] + ', "result": ' + script["json"] + "}\n")
                sys.stdout.flush()
        case "empty":
            say(event)
        case "twice":
            say(event, result=script["result"])
            say(event, result="the second answer")
        case "stranger":
            say({"id": "nobody", "source": "/elsewhere"}, status="dead", error="not mine")
            say(event, result=script["result"])
        case "retry":
            say(event, status="retry", error="asked to", **({"after": script["after"]} if "after" in script else {}))
        case "dead":
            say(event, status="dead", error="asked to")
        case "malformed":
            say(event, status="perhaps")
        case "tell":
            key = event["source"] + "\0" + event["id"]
            told = {"event": event, "attempt": call["attempt"], "key": key, "trace": event.get("traceparent")}
            say(event, result=told)
        case "measure":
            say(event, result=len(event["data"]))
        case "fill":
            text = "z" * script["bytes"]
            if script["in"] == "result":
                say(event, result=text)
            else:
                say(event, emit=[{"type": "filled", "data": text}])
        case "wait":
            time.sleep(script["ms"] / 1000)
            say(event, result=script.get("result"))
        case "meet":
            # Nobody is answered before all are there; then the last one first.
            with lock:
                met.append((event, script["result"]))
                there = met[:] if len(met) == script["all"] else []
            for event, result in reversed(there):
                say(event, result=result)
        case "crash":
            os._exit(3)
        case "hang":
            time.sleep(1000)


for line in sys.stdin:
    call = json.loads(line)
    threading.Thread(target=work, args=(call, json.loads(call["event"]["script"])), daemon=True).start()
