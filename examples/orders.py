#!/usr/bin/env python3
"""A handler for order events, in the exec protocol: one JSON line in per event, one JSON line out.

Warren starts this program, keeps it running, and feeds it events of `order.*`. It may answer in any order. It needs
no library. What it answers is recorded with the event, in one transaction; what it emits is published afterwards.

usage: orders.py [CALLS]      CALLS is a file to note each call in (the demo counts attempts with it)
"""
import json
import sys

calls = open(sys.argv[1], "a", buffering=1) if len(sys.argv) > 1 else None

for line in sys.stdin:
    call = json.loads(line)
    event, attempt = call["event"], call["attempt"]
    order = event["data"]
    if calls:
        calls.write(f"{event['id']} {attempt}\n")

    answer = {"id": event["id"], "source": event["source"], "status": "done"}
    if order.get("card") == "stolen":
        # Trying again cannot help: the event is dead-lettered with this reason.
        answer.update(status="dead", error="the card is reported stolen")
    elif order.get("bank") == "busy" and attempt < 3:
        # Trying again may help: the event comes back through the delay queues.
        answer.update(status="retry", error="the bank does not answer", after="1s")
    else:
        # The event's key (the customer) is inherited, its id is derived: a repeat has the same id.
        answer["emit"] = [{"type": "ledger.entry", "data": {"order": event["id"], "n": event["sequence"], "total": order["total"]}}]
    print(json.dumps(answer), flush=True)
