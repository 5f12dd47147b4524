//! AMQP by hand: what no client library would write.
use anyhow::{Context, bail, ensure};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A connection that writes whatever bytes it is given as properties.
#[derive(Debug)]
pub struct Frames {
    stream: TcpStream,
}

/// The flag of a property in a content header.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the protocol's names")]
pub enum Property {
    ContentType = 15,
    Headers = 13,
    CorrelationId = 10,
    MessageId = 7,
    Type = 5,
    AppId = 3,
}

impl Frames {
    /// Connects to `amqp://guest:guest@host:port/vhost` and asks for confirms.
    ///
    /// # Errors
    /// The broker does not agree.
    pub fn connect(url: &str) -> anyhow::Result<Self> {
        let (_, rest) = url.split_once('@').context("a URL with user and host")?;
        let (address, vhost) = rest.split_once('/').context("a URL with a vhost")?;
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut frames = Self { stream };
        frames.stream.write_all(b"AMQP\0\0\x09\x01")?;
        frames.expect(10, 10)?;
        let mut start_ok = vec![0, 0, 0, 0];
        start_ok.extend(short(b"PLAIN"));
        start_ok.extend(long(b"\0guest\0guest"));
        start_ok.extend(short(b"en_US"));
        frames.method(0, 10, 11, &start_ok)?;
        frames.expect(10, 30)?;
        // What the broker offers: channels, bytes of a frame, no heartbeat.
        frames.method(0, 10, 31, &[&2047_u16.to_be_bytes()[..], &131_072_u32.to_be_bytes(), &[0, 0]].concat())?;
        frames.method(0, 10, 40, &[short(vhost.as_bytes()), vec![0, 0]].concat())?;
        frames.expect(10, 41)?;
        frames.method(1, 20, 10, &[0])?;
        frames.expect(20, 11)?;
        frames.method(1, 85, 10, &[0])?;
        frames.expect(85, 11)?;
        Ok(frames)
    }

    /// Publishes with these properties, each already encoded, and waits for the confirm.
    ///
    /// # Errors
    /// The broker refuses it.
    pub fn publish(
        &mut self,
        exchange: &str,
        routing_key: &[u8],
        properties: &[(Property, Vec<u8>)],
        body: &[u8],
    ) -> anyhow::Result<()> {
        let publish = [vec![0, 0], short(exchange.as_bytes()), short(routing_key), vec![0]].concat();
        self.method(1, 60, 40, &publish)?;
        let mut properties = properties.to_vec();
        properties.push((Property::ContentType, Vec::new()));
        properties.retain(|(_, value)| !value.is_empty());
        // In the order of their flags, highest first, as the protocol wants it.
        properties.sort_by_key(|(property, _)| std::cmp::Reverse(*property as u8));
        let flags = properties.iter().fold(0_u16, |flags, (property, _)| flags | 1 << (*property as u8));
        let mut header = [&60_u16.to_be_bytes()[..], &[0, 0], &(body.len() as u64).to_be_bytes()].concat();
        header.extend(flags.to_be_bytes());
        properties.iter().for_each(|(_, value)| header.extend(value));
        ensure!(header.len() <= 131_064, "{} bytes do not fit into a frame", header.len());
        self.frame(2, 1, &header)?;
        for chunk in body.chunks(131_064) {
            self.frame(3, 1, chunk)?;
        }
        self.expect(60, 80)
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) -> anyhow::Result<()> {
        self.frame(1, channel, &[&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat())
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) -> anyhow::Result<()> {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend(u32::try_from(payload.len())?.to_be_bytes());
        frame.extend(payload);
        frame.push(0xce);
        Ok(self.stream.write_all(&frame)?)
    }

    fn expect(&mut self, class: u16, method: u16) -> anyhow::Result<()> {
        loop {
            let mut head = [0; 7];
            self.stream.read_exact(&mut head)?;
            let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
            let mut payload = vec![0; size + 1];
            self.stream.read_exact(&mut payload)?;
            if head[0] != 1 {
                continue;
            }
            let found = (u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]]));
            if found != (class, method) {
                bail!("the broker says {found:?}: {}", String::from_utf8_lossy(&payload[4..]));
            }
            return Ok(());
        }
    }
}

/// A short string.
#[must_use]
pub fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).expect("tests write short strings")], text].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).expect("tests write less than 4 GiB").to_be_bytes(), bytes].concat()
}

/// A header table of encoded fields.
#[must_use]
pub fn table(fields: &[Vec<u8>]) -> Vec<u8> {
    long(&fields.concat())
}

/// A header that is a text.
#[must_use]
pub fn text(name: &[u8], value: &[u8]) -> Vec<u8> {
    [short(name), vec![b'S'], long(value)].concat()
}

/// A header of so many lists, one in the other.
#[must_use]
pub fn nested(name: &[u8], levels: usize) -> Vec<u8> {
    let mut value = Vec::with_capacity(levels * 5);
    for inner in (0..levels).rev() {
        value.push(b'A');
        value.extend(u32::try_from(inner * 5).expect("a frame is smaller").to_be_bytes());
    }
    [short(name), value].concat()
}
