"""An upstream system that knows nothing of Warren: publishes plain AMQP messages with pika, confirmed.

usage: upstream.py URL EXCHANGE    one JSON object a line on stdin: {"key": ROUTING KEY, "body": TEXT, and any of pika's
                                   BasicProperties (message_id, correlation_id, type, app_id, timestamp, headers, …)}
"""
import json
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
channel = connection.channel()
channel.confirm_delivery()
for line in sys.stdin:
    fields = json.loads(line)
    key, body = fields.pop("key"), fields.pop("body", "{}")
    channel.basic_publish(
        exchange=sys.argv[2],
        routing_key=key,
        body=body.encode(),
        properties=pika.BasicProperties(delivery_mode=2, **fields),
        mandatory=True,
    )
connection.close()
