//! WebRTC-direct, for browsers only.
//!
//! Three faults of the library below are cured here. It never dials: between two
//! nodes frames above 8 KiB are lost. Each write is flushed before the next:
//! otherwise frames pile up into one message that the data channel refuses
//! (rust-libp2p issue 6557). And a connection that is dropped is closed: its parts
//! hold each other, and only closing lets go of them.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerBox, StreamMuxerEvent};
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::identity::Keypair;
use libp2p::{Multiaddr, Transport};
use libp2p_webrtc::tokio::Certificate;

use crate::SwarmError;
use crate::behaviour::setup;
use crate::options::{WEBRTC_CLOSE_TIMEOUT, WEBRTC_WRITE_BYTES_MAX};
use crate::transport::Connection;

/// A new certificate with its private key, PEM. Its hash is part of every
/// WebRTC address of the node, so it should be kept.
pub fn generate_certificate() -> Result<String, SwarmError> {
    crate::install_crypto();
    let certificate = Certificate::generate(&mut rand::rng());
    Ok(certificate.map_err(|error| setup("a WebRTC certificate", &error))?.serialize_pem())
}

/// A transport that listens only. Without a certificate it makes one for this run.
pub(crate) fn listener(
    keys: &Keypair,
    certificate: Option<&str>,
) -> Result<Boxed<Connection>, SwarmError> {
    let certificate = match certificate {
        Some(pem) => Certificate::from_pem(pem),
        None => Certificate::generate(&mut rand::rng()),
    };
    let certificate = certificate.map_err(|error| setup("the WebRTC certificate", &error))?;
    let transport = libp2p_webrtc::tokio::Transport::new(keys.clone(), certificate).map(
        |(peer, connection), _| (peer, StreamMuxerBox::new(Closing::new(Flushing(connection)))),
    );
    Ok(ListenOnly(transport.boxed()).boxed())
}

/// Accepts, never dials.
struct ListenOnly(Boxed<Connection>);

impl Transport for ListenOnly {
    type Output = Connection;
    type Error = io::Error;
    type ListenerUpgrade = <Boxed<Connection> as Transport>::ListenerUpgrade;
    type Dial = <Boxed<Connection> as Transport>::Dial;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        self.0.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.0.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// A connection all of whose streams flush.
struct Flushing<C>(C);

impl<C: StreamMuxer + Unpin> StreamMuxer for Flushing<C>
where
    C::Substream: Unpin,
{
    type Substream = FlushedStream<C::Substream>;
    type Error = C::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.0).poll_inbound(cx).map_ok(FlushedStream)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.0).poll_outbound(cx).map_ok(FlushedStream)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Pin::new(&mut self.0).poll_close(cx)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// A connection that is closed when it is dropped.
struct Closing<C: StreamMuxer + Unpin + Send + 'static>(Option<C>);

impl<C: StreamMuxer + Unpin + Send + 'static> Closing<C> {
    const fn new(connection: C) -> Self {
        Self(Some(connection))
    }

    /// The connection; none only while it is dropped.
    fn with<T>(&mut self, poll: impl FnOnce(Pin<&mut C>) -> Poll<T>) -> Poll<T> {
        self.0.as_mut().map_or(Poll::Pending, |connection| poll(Pin::new(connection)))
    }
}

impl<C: StreamMuxer + Unpin + Send + 'static> StreamMuxer for Closing<C> {
    type Substream = C::Substream;
    type Error = C::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        self.with(|connection| connection.poll_inbound(cx))
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        self.with(|connection| connection.poll_outbound(cx))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.with(|connection| connection.poll_close(cx))
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
        self.with(|connection| connection.poll(cx))
    }
}

impl<C: StreamMuxer + Unpin + Send + 'static> Drop for Closing<C> {
    fn drop(&mut self) {
        let Some(mut connection) = self.0.take() else { return };
        // Without a runtime the process is about to end.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            let close = poll_fn(|cx| Pin::new(&mut connection).poll_close(cx).map(drop));
            // Closed or not: nobody is left to be told.
            let _ = tokio::time::timeout(WEBRTC_CLOSE_TIMEOUT, close).await;
        });
    }
}

/// A stream that writes at most a frame, and only once the one before is flushed.
struct FlushedStream<S>(S);

impl<S: AsyncRead + Unpin> AsyncRead for FlushedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FlushedStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.0).poll_flush(cx))?;
        let frame = &buf[..buf.len().min(WEBRTC_WRITE_BYTES_MAX)];
        Pin::new(&mut self.0).poll_write(cx, frame)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    /// Counts what waits unflushed, as the data channel below would see it.
    #[derive(Default)]
    struct Channel {
        waiting: usize,
        messages: Vec<usize>,
    }

    impl AsyncWrite for Channel {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.waiting += buf.len();
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            let waiting = std::mem::take(&mut self.waiting);
            if waiting > 0 {
                self.messages.push(waiting);
            }
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.poll_flush(cx)
        }
    }

    #[test]
    fn no_message_is_ever_longer_than_a_frame() {
        let mut stream = FlushedStream(Channel::default());
        let data = vec![7; 3 * WEBRTC_WRITE_BYTES_MAX + 5];
        let mut left = &data[..];
        while !left.is_empty() {
            let write = poll_fn(|cx| Pin::new(&mut stream).poll_write(cx, left));
            left = &left[block_on(write).unwrap()..];
        }
        block_on(poll_fn(|cx| Pin::new(&mut stream).poll_flush(cx))).unwrap();
        let frame = WEBRTC_WRITE_BYTES_MAX;
        assert_eq!(stream.0.messages, [frame, frame, frame, 5]);
    }

    /// Says when it is closed.
    struct Muxer(Option<tokio::sync::oneshot::Sender<()>>);

    impl StreamMuxer for Muxer {
        type Substream = futures::io::Cursor<Vec<u8>>;
        type Error = io::Error;

        fn poll_inbound(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<io::Result<Self::Substream>> {
            Poll::Pending
        }

        fn poll_outbound(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<io::Result<Self::Substream>> {
            Poll::Pending
        }

        fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            if let Some(closed) = self.0.take() {
                closed.send(()).unwrap();
            }
            Poll::Ready(Ok(()))
        }

        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_dropped_is_closed() {
        let (closed, is_closed) = tokio::sync::oneshot::channel();
        drop(Closing::new(Muxer(Some(closed))));
        is_closed.await.unwrap();
    }

    #[test]
    fn a_certificate_survives_its_text_and_a_damaged_one_is_refused() {
        let pem = generate_certificate().unwrap();
        let keys = crate::ids::keypair([3; 32]);
        assert!(listener(&keys, Some(&pem)).is_ok());
        assert_ne!(pem, generate_certificate().unwrap());
        let damaged = pem.replace("CERTIFICATE", "TESTIMONIAL");
        let error = listener(&keys, Some(&damaged)).err().unwrap().to_string();
        assert!(error.contains("WebRTC certificate"), "{error}");
        assert!(listener(&keys, Some("")).is_err());
    }
}
