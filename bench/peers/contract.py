"""What `run` promises, for the Python peers: its environment, loading with confirms, counting acks over processes."""

import multiprocessing
import os
import sys
import time
from urllib.parse import unquote, urlsplit

import amqp

URL, COUNT, SIZE = os.environ["BENCH_URL"], int(os.environ["BENCH_COUNT"]), int(os.environ["BENCH_SIZE"])
QUEUES, STEPS = os.environ["BENCH_QUEUES"].split(","), int(os.environ["BENCH_STEPS"])

_WINDOW = 2000
_GRACE = 0.2
_fork = multiprocessing.get_context("fork")
_acked, _done = _fork.Value("Q", 0), _fork.Event()


def publish(messages):
    """Publishes pairs of queue and amqp.Message; all are in the queues when it returns.

    One `send` a task is slower by an order, and how tasks are enqueued is not what is measured.
    """
    at = urlsplit(URL)
    connection = amqp.Connection(
        host=f"{at.hostname}:{at.port or 5672}",
        userid=unquote(at.username or "guest"),
        password=unquote(at.password or "guest"),
        virtual_host=unquote(at.path[1:]) or "/",
    )
    unconfirmed = set()

    def confirm(tag, multiple):
        if multiple:
            unconfirmed.difference_update([t for t in unconfirmed if t <= tag])
        else:
            unconfirmed.discard(tag)

    def refuse(tag, _multiple):
        sys.exit(f"the broker refused message {tag}")

    with connection:
        channel = connection.channel()
        channel.confirm_select()
        channel.events["basic_ack"].add(confirm)
        channel.events["basic_nack"].add(refuse)
        for tag, (queue, message) in enumerate(messages, 1):
            unconfirmed.add(tag)
            # `basic_publish` of a channel with confirms would wait for each.
            channel._basic_publish(message, routing_key=queue)
            while len(unconfirmed) >= _WINDOW:
                connection.drain_events(timeout=60)
        while unconfirmed:
            connection.drain_events(timeout=60)


def acked():
    """To be called after each ack was written to its socket, in whichever process. The last one ends them all."""
    with _acked.get_lock():
        _acked.value += 1
        count = _acked.value
    if count == 1:
        print("first", flush=True)
    if count == COUNT:
        print("last", flush=True)
        _done.set()


def drain(processes, work):
    """Runs `work` in so many processes until all is acked. They are killed then: nothing is left to shut down for."""
    workers = [_fork.Process(target=work) for _ in range(processes)]
    for worker in workers:
        worker.start()
    while not _done.wait(timeout=1) and all(worker.is_alive() for worker in workers):
        pass
    # A channel of the broker hands a quorum queue its acks in batches; one that ends at once takes the last ones along.
    time.sleep(_GRACE)
    for worker in workers:
        worker.kill()
        worker.join()
    sys.exit(0 if _done.is_set() else "a worker ended before all was handled")
