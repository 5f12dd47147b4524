"""Dramatiq's side of the benchmark: `load` and `drain`, as `run` describes them.

Dramatiq acks after a task ran; its default middleware (retries, time and age limits) stays in place. Two processes with
two threads each were the fastest of 1, 2 and 8 threads on two cores.
"""

import os
import sys

# Read on import; for each queue and process. More makes one process wait for the other at the end.
os.environ["dramatiq_queue_prefetch"] = "50"

import amqp
import dramatiq
from dramatiq.brokers import rabbitmq

import contract
from contract import COUNT, QUEUES, SIZE, URL


class CountingConsumer(rabbitmq._RabbitmqConsumer):
    """Counts acks where pika has written them to the socket."""

    def __init__(self, *args):
        super().__init__(*args)
        send = self.channel.basic_ack

        def ack(tag):
            send(tag)
            contract.acked()

        self.channel.basic_ack = ack


class QuorumBroker(rabbitmq.RabbitmqBroker):
    consumer_class = CountingConsumer

    def _build_queue_arguments(self, queue_name):
        return super()._build_queue_arguments(queue_name) | {"x-queue-type": "quorum"}


def actors():
    """A task for each queue: in Dramatiq a task has one."""
    dramatiq.set_broker(QuorumBroker(url=URL))
    return [dramatiq.actor(lambda _data: None, actor_name=f"noop-{q}", queue_name=q) for q in QUEUES]


def messages(tasks):
    data = "x" * SIZE
    for i in range(COUNT):
        message = tasks[i % len(tasks)].message(data)
        yield message.queue_name, amqp.Message(message.encode(), delivery_mode=2)


def load():
    tasks = actors()
    for queue in QUEUES:
        dramatiq.get_broker().declare_queue(queue, ensure=True)
    contract.publish(messages(tasks))


def work():
    actors()
    worker = dramatiq.Worker(dramatiq.get_broker(), worker_threads=2)
    worker.start()
    worker.workers[0].join()


if sys.argv[1] == "load":
    load()
else:
    contract.drain(2, work)
