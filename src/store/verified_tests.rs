//! Tests of verified ranges: valid encodings round-trip, and every kind of damage
//! is refused within one group of where it begins.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::executor::block_on;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::io::ReadBuf;

use super::*;

/// An in-memory stream that counts the bytes read from it.
struct Wire {
    bytes: Vec<u8>,
    taken: usize,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n = buf.remaining().min(self.bytes.len() - self.taken);
        buf.put_slice(&self.bytes[self.taken..self.taken + n]);
        self.taken += n;
        Poll::Ready(Ok(()))
    }
}

fn random(seed: u64, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    Bytes::from(bytes)
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

fn receive(
    shard: ShardId,
    size: u64,
    range: ByteRange,
    bytes: Vec<u8>,
) -> (Result<VerifiedRange, DecodeError>, usize) {
    let mut wire = Wire { bytes, taken: 0 };
    let got = block_on(decode(shard, size, range, &mut wire));
    (got, wire.taken)
}

const G: u64 = GROUP_BYTES;

#[test]
fn ranges_of_every_shape_round_trip() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut sizes = vec![1, 1023, 1024, 1025, G - 1, G, G + 1, 2 * G, 2 * G + 1, 3 * G, 5 * G - 7];
    sizes.extend((0..20).map(|_| rng.random_range(1..40 * G)));
    for size in sizes {
        let data = random(size, size as usize);
        let outboard = Outboard::of(&data).unwrap();
        assert_eq!(outboard.shard(), ShardId::of(&data), "the root is the object's BLAKE3");
        assert_eq!(outboard.nodes().len() as u64, outboard_bytes(size));
        let mut ranges = vec![range(0, size), range(0, 1), range(size - 1, size)];
        for _ in 0..8 {
            let start = rng.random_range(0..size);
            ranges.push(range(start, rng.random_range(start + 1..=size)));
        }
        for want in ranges {
            let encoded = encode(&data, &outboard, want).unwrap();
            let sent = encoded.bytes.len();
            // Bytes after the encoding belong to someone else and must not be taken.
            let mut wire = encoded.bytes.to_vec();
            wire.extend([0xEE; 100]);
            let (got, taken) = receive(outboard.shard(), size, want, wire);
            let got = got.unwrap();
            assert_eq!(taken, sent, "size {size} range {want}");
            let grown = align(want, size).unwrap();
            assert!(grown.contains(&want) && grown.start().is_multiple_of(G));
            assert_eq!((got.range(), got.size(), got.shard()), (grown, size, outboard.shard()));
            assert_eq!(got.bytes()[..], data[grown.start() as usize..grown.end() as usize]);
            let cut = got.slice(want).unwrap();
            assert_eq!(cut[..], data[want.start() as usize..want.end() as usize]);
            assert_eq!(got.encode().bytes, encoded.bytes, "what was received can be served on");
            for node in got.nodes() {
                let at = node.index as usize * NODE_BYTES;
                assert_eq!(outboard.nodes()[at..at + NODE_BYTES], node.pair);
            }
        }
    }
}

#[test]
fn any_flipped_byte_is_refused_within_a_group() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for (size, want) in [
        (1, range(0, 1)),
        (G, range(3, 9)),
        (3 * G + 17, range(0, 3 * G + 17)),
        (37 * G + 5, range(4 * G + 1, 9 * G)),
        (37 * G + 5, range(36 * G, 37 * G + 5)),
    ] {
        let data = random(rng.random(), size as usize);
        let outboard = Outboard::of(&data).unwrap();
        let good = encode(&data, &outboard, want).unwrap().bytes;
        // Every byte of the first kilobyte (nodes first), then a stride over all of it.
        let places = (0..good.len().min(1024)).chain((1024..good.len()).step_by(977));
        for at in places.chain([good.len() - 1]) {
            let mut bad = good.to_vec();
            bad[at] ^= 1 << rng.random_range(0..8);
            let (got, taken) = receive(outboard.shard(), size, want, bad);
            let error = got.unwrap_err();
            assert!(error.is_wrong_bytes(), "byte {at} of {}: {error}", good.len());
            assert!(taken >= at && taken - at <= G as usize, "byte {at}: {taken} taken");
        }
    }
}

#[test]
fn a_short_encoding_is_truncated_and_a_foreign_one_wrong() {
    let data = random(1, 9 * G as usize + 3);
    let size = data.len() as u64;
    let outboard = Outboard::of(&data).unwrap();
    let want = range(2 * G, 7 * G);
    let good = encode(&data, &outboard, want).unwrap().bytes;
    for cut in [0, 1, 63, 64, 200, good.len() / 2, good.len() - 1] {
        let (got, _) = receive(outboard.shard(), size, want, good[..cut].to_vec());
        let error = got.unwrap_err();
        assert!(matches!(error, DecodeError::Truncated { .. }), "cut at {cut}: {error}");
        assert!(!error.is_wrong_bytes());
    }
    let (got, taken) = receive(ShardId::of(b"another"), size, want, good.to_vec());
    assert!(matches!(got, Err(DecodeError::Node { .. })));
    assert_eq!(taken, NODE_BYTES);
    // The proof of another range of the same object proves nothing here.
    let (got, _) = receive(outboard.shard(), size, range(3 * G, 8 * G), good.to_vec());
    assert!(got.unwrap_err().is_wrong_bytes());
}

#[test]
fn a_wrong_size_is_refused_where_the_end_is_read() {
    let data = random(2, 5 * G as usize + 100);
    let size = data.len() as u64;
    let outboard = Outboard::of(&data).unwrap();
    let good = encode(&data, &outboard, range(0, size)).unwrap().bytes;
    for wrong in [1, G, 3 * G, 5 * G, size - 1, size + 1, 6 * G, 7 * G, 11 * G, 40 * G] {
        let want = range(0, wrong);
        let (got, _) = receive(outboard.shard(), wrong, want, good.to_vec());
        assert!(got.is_err(), "size {wrong} passed");
    }
    // Away from the end nothing binds the length: the bytes are right, but the size is unproved.
    let inner = encode(&data, &outboard, range(0, G)).unwrap().bytes;
    let got = receive(outboard.shard(), size + 1, range(0, G), inner.to_vec()).0.unwrap();
    assert_eq!(got.bytes()[..], data[..G as usize]);
    assert!(!got.proves_size());
    let last = encode(&data, &outboard, range(size - 1, size)).unwrap().bytes;
    assert!(
        receive(outboard.shard(), size, range(size - 1, size), last.to_vec())
            .0
            .unwrap()
            .proves_size()
    );
}

#[test]
fn bounds_hold_before_anything_is_read_or_allocated() {
    let shard = ShardId::of(b"x");
    let check = |size, want| receive(shard, size, want, vec![0; 4096]);
    let (got, taken) = check(OBJECT_BYTES_MAX + 1, range(0, 1));
    assert!(matches!(got, Err(DecodeError::TooLarge { .. })) && taken == 0);
    let (got, taken) = check(u64::MAX, range(0, u64::MAX));
    assert!(matches!(got, Err(DecodeError::TooLarge { .. })) && taken == 0);
    let (got, taken) = check(100, range(0, 101));
    assert!(matches!(got, Err(DecodeError::OutOfRange { .. })) && taken == 0);
    let (got, taken) = check(0, range(0, 1));
    assert!(matches!(got, Err(DecodeError::OutOfRange { .. })) && taken == 0);
    let (got, taken) = check(OBJECT_BYTES_MAX, range(1, DECODE_BYTES_MAX + 1));
    assert!(matches!(got, Err(DecodeError::TooLong { .. })) && taken == 0);
    assert!(matches!(
        Outboard::parse(shard, 2 * G, Bytes::new()),
        Err(DecodeError::OutboardLength { got: 0, expected: 64, .. })
    ));
}

#[test]
fn damaged_data_or_outboard_is_never_encoded() {
    let data = random(3, 6 * G as usize + 1);
    let size = data.len() as u64;
    let outboard = Outboard::of(&data).unwrap();
    let mut bad = data.to_vec();
    bad[4 * G as usize] ^= 1;
    let bad = Bytes::from(bad);
    let error = encode(&bad, &outboard, range(0, size)).unwrap_err();
    assert!(matches!(error, DecodeError::Group { at, .. } if at == 4 * G), "{error}");
    assert!(encode(&bad, &outboard, range(0, 4 * G)).is_ok(), "the other groups are whole");
    let mut nodes = outboard.nodes().to_vec();
    nodes[5] ^= 1;
    let damaged = Outboard::parse(outboard.shard(), size, Bytes::from(nodes)).unwrap();
    assert!(matches!(encode(&data, &damaged, range(0, 1)), Err(DecodeError::Node { .. })));
    assert!(matches!(
        encode(&data.slice(1..), &outboard, range(0, 1)),
        Err(DecodeError::Truncated { .. })
    ));
}

#[test]
fn an_object_hashed_in_memory_serves_ranges_that_others_accept() {
    let data = random(5, 13 * G as usize + 3);
    let size = data.len() as u64;
    let hashed = Hashed::of(data.clone()).unwrap();
    assert_eq!((hashed.shard(), hashed.bytes()), (ShardId::of(&data), &data));
    for (start, end) in [(0, size), (G + 5, 2 * G - 1), (7 * G, 12 * G), (size - 1, size)] {
        let encoded = hashed.range(range(start, end)).unwrap().encode();
        let got = receive(hashed.shard(), size, range(start, end), encoded.bytes.to_vec()).0;
        let got = got.unwrap();
        assert_eq!(got.range(), align(range(start, end), size).unwrap());
        let (start, end) = (got.range().start() as usize, got.range().end() as usize);
        assert_eq!(got.bytes()[..], data[start..end]);
    }
    let outside = hashed.range(range(0, size + 1));
    assert!(matches!(outside, Err(DecodeError::OutOfRange { .. })));
}

#[test]
fn adjacent_ranges_join_into_one_that_can_be_served() {
    let data = random(4, 21 * G as usize + 9);
    let size = data.len() as u64;
    let outboard = Outboard::of(&data).unwrap();
    let piece = |a, b, buffer: BytesMut| {
        let bytes = encode(&data, &outboard, range(a, b)).unwrap().bytes.to_vec();
        let mut wire = Wire { bytes, taken: 0 };
        let piece = decode_into(outboard.shard(), size, range(a, b), &mut wire, buffer);
        block_on(piece).unwrap()
    };
    // Two pieces of one buffer, and one with a buffer of its own.
    let mut buffer = BytesMut::with_capacity(6 * G as usize);
    let first = buffer.as_ptr();
    let second = buffer.split_off(5 * G as usize);
    let a = piece(3 * G, 8 * G, buffer);
    let b = piece(8 * G, 9 * G, second);
    let two = VerifiedBuf::join(vec![a, b]).unwrap();
    assert_eq!((two.range(), two.bytes().as_ptr()), (range(3 * G, 9 * G), first), "not copied");
    assert_eq!(two.bytes()[..], data[3 * G as usize..9 * G as usize]);
    let parts = [(3 * G, 8 * G), (8 * G, 9 * G), (9 * G, size)];
    let pieces = parts.map(|(a, b)| piece(a, b, BytesMut::new()));
    let joined = VerifiedBuf::join(pieces.into()).unwrap();
    assert_eq!(joined.range(), range(3 * G, size));
    assert_eq!(joined.bytes()[..], data[3 * G as usize..]);
    let direct = encode(&data, &outboard, range(3 * G, size)).unwrap();
    assert_eq!(joined.encode().bytes, direct.bytes);
    let mut encoder = joined.encoder();
    let (mut frames, mut frame, mut more) = (Vec::new(), Vec::new(), true);
    while more {
        frame.clear();
        more = encoder.next(&mut frame, 3 * G as usize);
        assert!(frame.len() < 4 * G as usize);
        frames.extend_from_slice(&frame);
    }
    assert_eq!(frames, direct.bytes);
    let hole = [(3 * G, 8 * G), (9 * G, size)].map(|(a, b)| piece(a, b, BytesMut::new()));
    assert_eq!(VerifiedBuf::join(hole.into()).unwrap_err().len(), 2, "a gap");
    assert!(VerifiedBuf::join(Vec::new()).is_err());
}

#[test]
fn groups_verified_before_an_interruption_can_be_used() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..60 {
        let data = random(rng.random(), rng.random_range(1..40 * G as usize));
        let size = data.len() as u64;
        let outboard = Outboard::of(&data).unwrap();
        let shard = outboard.shard();
        let start = rng.random_range(0..size);
        let wanted = range(start, rng.random_range(start..size) + 1);
        let whole = align(wanted, size).unwrap();
        let encoded = encode(&data, &outboard, wanted).unwrap().bytes.to_vec();
        // Truncated, or wrong from some byte on: the groups before it are valid.
        let at = rng.random_range(0..encoded.len());
        let mut bytes = encoded.clone();
        if rng.random() {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        let mut decoder = RangeDecoder::new(BytesMut::new());
        let proved = decoder.proved();
        let mut wire = Wire { bytes, taken: 0 };
        assert!(block_on(decoder.run(shard, size, wanted, &mut wire)).is_err());
        let proved = proved.load(Ordering::Relaxed);
        let Some(piece) = decoder.finish() else {
            assert_eq!(proved, 0);
            continue;
        };
        assert_eq!((piece.range().start(), piece.range().end()), (whole.start(), proved));
        assert!(proved < whole.end() && at as u64 >= proved - whole.start());
        // The result can be served, cut again, and joined with the rest.
        let groups = piece.range().len().div_ceil(G);
        let middle = whole.start() + G * rng.random_range(1..=groups);
        let rest = |from| {
            let left = range(from, whole.end());
            let bytes = encode(&data, &outboard, left).unwrap().bytes.to_vec();
            let mut wire = Wire { bytes, taken: 0 };
            block_on(decode_into(shard, size, left, &mut wire, BytesMut::new())).unwrap()
        };
        let cut = piece.cut(middle).unwrap();
        let from = cut.range().end();
        assert_eq!(from, middle.min(proved));
        let joined = VerifiedBuf::join(vec![cut, rest(from)]).unwrap();
        assert_eq!(joined.range(), whole);
        assert_eq!(joined.encode().bytes[..], encoded[..]);
    }
    // Others accept it on its own.
    let data = random(9, 9 * G as usize);
    let outboard = Outboard::of(&data).unwrap();
    let bytes = encode(&data, &outboard, range(0, 9 * G)).unwrap().bytes.to_vec();
    for end in 1..=8 {
        let mut wire = Wire { bytes: bytes.clone(), taken: 0 };
        let mut decoder = RangeDecoder::new(BytesMut::new());
        block_on(decoder.run(outboard.shard(), 9 * G, range(0, 9 * G), &mut wire)).unwrap();
        let part = decoder.finish().unwrap().cut(end * G).unwrap().freeze();
        assert_eq!((part.range(), part.size()), (range(0, end * G), 9 * G));
        let got = receive(outboard.shard(), 9 * G, part.range(), part.encode().bytes.to_vec()).0;
        assert_eq!(got.unwrap().bytes()[..], data[..(end * G) as usize]);
    }
}
