//! Streams that flush each write before the next. Without that, frames accumulate into one
//! message that the data channel refuses (rust-libp2p issue 6557).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::{AsyncRead, AsyncWrite};

use crate::options::WEBRTC_WRITE_BYTES_MAX;

/// A stream that writes at most one frame at a time, and only after the last one is flushed.
pub(crate) struct FlushedStream<S>(pub(crate) S);

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
    use std::future::poll_fn;

    use futures::executor::block_on;

    use super::*;

    /// Records messages as the data channel below would see them.
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
}
