// amqplib's side of the benchmark: `drain` and `publish`, as `run` describes them.
//
// The loop that its manual shows: ack each message; publish on a confirm channel, a bounded number unconfirmed.
'use strict'

const { randomUUID } = require('node:crypto')
const amqplib = require('amqplib')

const { BENCH_URL, BENCH_QUEUES = '', BENCH_EXCHANGE = '', BENCH_ROUTING_KEY = 'bench.done' } = process.env
const COUNT = Number(process.env.BENCH_COUNT)
const SIZE = Number(process.env.BENCH_SIZE)
const PREFETCH = 200
const WINDOW = 1000
const KEYS = 10_000

async function drain(connection) {
  let handled = 0
  const channels = []
  await new Promise((resolve, reject) => {
    for (const queue of BENCH_QUEUES.split(',')) channels.push(consume(queue).catch(reject))

    async function consume(queue) {
      const channel = await connection.createChannel()
      channel.on('error', reject)
      await channel.prefetch(PREFETCH)
      await channel.consume(queue, (message) => {
        if (message === null) return reject(new Error(`${queue} is gone`))
        if (handled++ === 0) console.log('first')
        channel.ack(message)
        if (handled === COUNT) resolve()
      })
      return channel
    }
  })
  // A channel is closed after the broker has taken its acks.
  for (const channel of await Promise.all(channels)) await channel.close()
  console.log('last')
}

async function publish(connection) {
  const channel = await connection.createConfirmChannel()
  const body = Buffer.from(JSON.stringify({ data: 'x'.repeat(SIZE - 11) })) // the same size
  let sent = 0
  let confirmed = 0
  console.log('first')
  await new Promise((resolve, reject) => {
    channel.on('error', reject)
    channel.on('return', () => reject(new Error(`${BENCH_EXCHANGE} routes ${BENCH_ROUTING_KEY} nowhere`)))
    const settle = (error) => {
      if (error) return reject(error)
      if (++confirmed === COUNT) return resolve()
      fill()
    }
    function fill() {
      for (; sent < COUNT && sent - confirmed < WINDOW; sent++) {
        // The same message as the others publish: an event in CloudEvents' binary form.
        const [id, key] = [randomUUID(), `key-${String(sent % KEYS).padStart(4, '0')}`]
        const properties = {
          persistent: true,
          mandatory: true,
          contentType: 'application/json',
          messageId: id,
          correlationId: key,
          type: BENCH_ROUTING_KEY,
          headers: {
            cloudEvents_specversion: '1.0',
            cloudEvents_id: id,
            cloudEvents_source: '/bench',
            cloudEvents_type: BENCH_ROUTING_KEY,
            cloudEvents_partitionkey: key,
          },
        }
        channel.publish(BENCH_EXCHANGE, BENCH_ROUTING_KEY, body, properties, settle)
      }
    }
    fill()
  })
  console.log('last')
}

async function main(action) {
  const connection = await amqplib.connect(BENCH_URL)
  await action(connection)
  await connection.close()
}

main({ drain, publish }[process.argv[2]]).catch((error) => {
  console.error(`amqplib: ${error.message}`)
  process.exit(1)
})
