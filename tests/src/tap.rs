//! A tap on the wire: it passes everything on, and keeps what clients send.
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};

/// A tap; it ends with the test's runtime.
#[derive(Debug)]
pub struct Tap {
    /// Where clients find it.
    pub address: SocketAddr,
    sent: Arc<Mutex<Vec<u8>>>,
}

impl Tap {
    /// A tap before a port of this machine.
    ///
    /// # Errors
    /// No port is free.
    pub async fn before(port: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let sent = Arc::<Mutex<Vec<u8>>>::default();
        let kept = sent.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
                let ((mut from, mut back), (mut answers, mut to)) = (client.into_split(), server.into_split());
                let kept = kept.clone();
                tokio::spawn(async move {
                    let mut bytes = [0; 4096];
                    while let Ok(n @ 1..) = from.read(&mut bytes).await {
                        kept.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&bytes[..n]);
                        if to.write_all(&bytes[..n]).await.is_err() {
                            return;
                        }
                    }
                });
                tokio::spawn(async move { copy(&mut answers, &mut back).await });
            }
        });
        Ok(Self { address, sent })
    }

    /// What clients sent since this was asked last.
    #[must_use]
    pub fn sent(&self) -> Vec<u8> {
        std::mem::take(&mut *self.sent.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
