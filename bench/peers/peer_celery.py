"""Celery's side of the benchmark: `load` and `drain`, as `run` describes them.

Its tasks promise the least of what Warren's do: they are acked after they ran (`task_acks_late`) and the broker has the
next one of their chain (`confirm_publish`). Everything that costs time and is not needed for that is off: results, events,
gossip, mingle, rate limits, remote control.

Two workers with the solo pool, because that is the fastest that two cores can do with it: a no-op task costs less than
the way to a process of the prefork pool, or another thread, and back.
"""

import sys

import amqp
from celery import Celery, chain
from kombu import Exchange, Queue, serialization, uuid

import contract
from contract import COUNT, QUEUES, SIZE, STEPS, URL

app = Celery("bench", broker=URL)
app.conf.update(
    # A topic exchange, of which Celery's delayed tasks would have need: it warns of others.
    task_queues=[Queue(q, Exchange("bench", "topic"), q, queue_arguments={"x-queue-type": "quorum"}) for q in QUEUES],
    task_acks_late=True,
    broker_transport_options={"confirm_publish": True},
    task_ignore_result=True,
    # Quorum queues refuse a prefetch for the whole channel; so Celery finds out and sets it per consumer. It then also
    # declares 28 queues for delayed tasks, here of the cheaper type because nothing is delayed.
    worker_detect_quorum_queues=True,
    broker_native_delayed_delivery_queue_type="classic",
    # A queue, so 200 a worker: what one worker holds too many of, the other waits for at the end.
    worker_prefetch_multiplier=25,
    worker_disable_rate_limits=True,
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    broker_heartbeat=0,
)


@app.task(name="noop")
def noop(_data):
    pass


@app.task(name="step")
def step(data):
    """What it returns is what the next one of its chain gets."""
    return data


def messages():
    data = "x" * SIZE
    for i in range(COUNT):
        task = app.amqp.create_task_message(uuid(), noop.name, (data,), {})
        kind, encoding, body = serialization.dumps(task.body, "json")
        form = {"content_type": kind, "content_encoding": encoding, "application_headers": task.headers}
        yield QUEUES[i % len(QUEUES)], amqp.Message(body, delivery_mode=2, priority=0, **form, **task.properties)


def load():
    with app.connection_for_write() as connection:
        for queue in app.conf.task_queues:
            queue(connection.default_channel).declare()
    if STEPS == 1:
        contract.publish(messages())
        return
    # However slow: who enqueues chains is not what is measured.
    for i in range(COUNT // STEPS):
        each = {"queue": QUEUES[i % len(QUEUES)]}
        rest = [step.s().set(**each) for _ in range(STEPS - 1)]
        chain(step.s("x" * SIZE).set(**each), *rest).apply_async()


def work():
    """An ack is written to the socket before `basic_ack` returns, and in this process, whatever the pool."""
    send = amqp.Channel.basic_ack

    def ack(channel, *args, **kwargs):
        send(channel, *args, **kwargs)
        contract.acked()

    amqp.Channel.basic_ack = ack
    app.Worker(
        pool="solo",
        loglevel="WARNING",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    ).start()


if sys.argv[1] == "load":
    load()
else:
    contract.drain(2, work)
