#!/usr/bin/env python3
"""The shop opens: goods are delivered, and its customers' orders lie ready for the publisher.

usage: orders.py DIR [N]     adds goods to DIR/stock, writes N orders (20000) to DIR/orders.ndjson, a CloudEvent a line

Of every 400 orders, some are for goods that ran out, some from customers without enough money, some to where nobody delivers, as in
`make demo`. Each call makes new orders from new customers, so that every start of the stack brings some.
"""
import fcntl
import json
import os
import sys
import time

DIR = sys.argv[1]
N = int(sys.argv[2]) if len(sys.argv) > 2 else 20000
# What an article costs, and how many of it come for 400 orders: fewer chairs and lamps than are ordered.
ARTICLES = [("book", 15, 500), ("lamp", 40, 120), ("chair", 60, 150), ("pen", 3, 500)]
BATCH = int(time.time())
CUSTOMERS = max(1, N * 3 // 10)


def order(n):
    sku, price, _ = ARTICLES[n % len(ARTICLES)]
    customer = f"customer-{BATCH}-{n % CUSTOMERS}"
    address = "nowhere" if n % 20 == 13 else f"{n % 97 + 1} Main Street"
    data = {"sku": sku, "price": price, "quantity": n % 3 + 1, "customer": customer, "address": address}
    return {"specversion": "1.0", "id": f"order-{BATCH}-{n}", "source": "/shop", "type": "order.placed",
            "partitionkey": customer, "data": data}


# Under the lock that the handlers take: they may be reading the journal.
goods = "".join(f"add - {sku} {quantity * N // 400 + 1}\n" for sku, _, quantity in ARTICLES)
with open(os.path.join(DIR, "stock"), "ab", buffering=0) as stock:
    fcntl.flock(stock, fcntl.LOCK_EX)
    stock.write(goods.encode())
# A publisher that still reads the orders of the last time keeps them.
path = os.path.join(DIR, "orders.ndjson")
with open(path + ".new", "w") as orders:
    orders.writelines(json.dumps(order(n)) + "\n" for n in range(N))
os.rename(path + ".new", path)
print(f"{N} orders of {CUSTOMERS} customers are in {path}")
