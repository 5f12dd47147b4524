#!/usr/bin/env python3
"""The payment service: takes events over HTTP, needs nothing but Python's standard library.

usage: payments.py PORT DIR [HOST]      balances are in DIR/payments.db; each request adds a line to DIR/payments.log

HOST is where it listens: 127.0.0.1 if nothing is said, 0.0.0.0 in a container.

A request may come more than once: for one order money moves once, whatever happens. What the status means to Warren: 200 done
(the JSON is the step's result), 4xx fails for good (the order is taken back), 5xx comes again later. While DIR/down exists,
everything is answered with 503.
"""
import json
import os
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, DIR, HOST = int(sys.argv[1]), sys.argv[2], (sys.argv[3:] or ["127.0.0.1"])[0]
OPENING = 200

db = sqlite3.connect(os.path.join(DIR, "payments.db"), check_same_thread=False, isolation_level=None)
db.executescript("""
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    CREATE TABLE IF NOT EXISTS accounts (customer TEXT PRIMARY KEY, balance INTEGER NOT NULL CHECK (balance >= 0));
    CREATE TABLE IF NOT EXISTS charges (instance TEXT PRIMARY KEY, customer TEXT NOT NULL, amount INTEGER NOT NULL,
                                        refunded INTEGER NOT NULL DEFAULT 0);
""")
lock = threading.Lock()
log = open(os.path.join(DIR, "payments.log"), "a", buffering=1)


def charge(instance, data):
    """Takes the money, unless it was taken before."""
    if not db.execute("SELECT 1 FROM charges WHERE instance = ?", (instance,)).fetchone():
        customer, amount = data["customer"], data["amount"]
        db.execute("INSERT OR IGNORE INTO accounts VALUES (?, ?)", (customer, OPENING))
        paid = db.execute("UPDATE accounts SET balance = balance - ?1 WHERE customer = ?2 AND balance >= ?1", (amount, customer))
        if not paid.rowcount:
            return 402, {"error": "not enough money"}
        db.execute("INSERT INTO charges (instance, customer, amount) VALUES (?, ?, ?)", (instance, customer, amount))
    return 200, {"charged": instance}


def refund(instance, _data):
    """Gives it back, unless it was given back before."""
    found = db.execute("UPDATE charges SET refunded = 1 WHERE instance = ? AND NOT refunded RETURNING customer, amount", (instance,))
    for customer, amount in found.fetchall():
        db.execute("UPDATE accounts SET balance = balance + ? WHERE customer = ?", (amount, customer))
    return 200, {"refunded": instance}


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        instance, kind = self.headers["ce-processid"], self.headers["ce-type"]
        action = {"payment.charge": charge, "payment.refund": refund}.get(kind)
        if os.path.exists(os.path.join(DIR, "down")):
            status, answer = 503, {"error": "down for a while"}
        elif not action:
            status, answer = 404, {"error": "no such action"}
        else:
            with lock:
                db.execute("BEGIN IMMEDIATE")
                status, answer = action(instance, json.loads(body))
                db.execute("COMMIT")
        log.write(f"{time.time():.3f} {status} {kind} {instance}\n")
        answer = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


Server((HOST, PORT), Service).serve_forever()
