//! A million random single-bit flips in stored bytes, outboards, have-files, bao
//! encodings, frames, signed announcements and proofs of a swarm's key. None is accepted, unless
//! its meaning is unchanged. (A peer's holdings are signed by gossipsub alone, and trusted only that
//! far: a lie costs a denied request.)

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use doppler_mesh::wire::{Envelope, FRAME_BYTES_MAX, ShardReply, ShardRequest};
use doppler_store::groups::Groups;
use doppler_store::signature::SignedModel;
use doppler_store::verified::{self, Encoded, GROUP_BYTES, Outboard, VerifiedRange};
use doppler_store::{ByteRange, ModelId, Priority, ShardId};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use rayon::prelude::*;

use super::entries;

const FLIPS: u64 = 1_000_000;
const BATCH: u64 = 5_000;

const KINDS: [&str; 8] = [
    "shard bytes",
    "outboard",
    "have-file",
    "encoding",
    "reply",
    "request",
    "announcement",
    "key proof",
];

/// An object, and its last range with the proof: a few bytes below one path to the
/// root, so that checking a flip costs a few hashes instead of the whole object.
struct Sample {
    bytes: Bytes,
    outboard: Outboard,
    end: VerifiedRange,
    encoded: Encoded,
    have: Vec<u8>,
    request: Vec<u8>,
    announcement: Vec<u8>,
    signed: SignedModel,
}

impl Sample {
    fn new(rng: &mut SmallRng) -> Self {
        let size = rng.random_range(0..9) * GROUP_BYTES + rng.random_range(1..300);
        let mut bytes = vec![0; size as usize];
        rng.fill_bytes(&mut bytes);
        let bytes = Bytes::from(bytes);
        let outboard = Outboard::of(&bytes).unwrap();
        let last = verified::align(ByteRange::new(size - 1, size).unwrap(), size).unwrap();
        let end = outboard.prove(last, bytes.slice(last.start() as usize..)).unwrap();
        let mut groups = Groups::none(size);
        groups.set(last);
        let priority = Priority::Token;
        let request = ShardRequest { shard: outboard.shard(), range: last, priority }.encode();
        let model = ModelId::of(&bytes);
        let signed = SignedModel::sign(&rng.random(), model, "a model", size).unwrap();
        Self {
            encoded: end.encode(),
            have: groups.to_file(outboard.shard()),
            request,
            announcement: Envelope::Announcement(signed.clone()).encode(),
            signed,
            bytes,
            outboard,
            end,
        }
    }

    fn shard(&self) -> ShardId {
        self.outboard.shard()
    }

    /// Whether an accepted range equals the true one.
    fn is_true(&self, proved: &VerifiedRange) -> bool {
        let range = proved.range();
        proved.size() == self.bytes.len() as u64
            && self.bytes[range.start() as usize..range.end() as usize] == proved.bytes()[..]
    }

    /// What a client accepts from a stream that answers its request.
    fn receive(&self, stream: &[u8]) -> Option<VerifiedRange> {
        let (length, rest) = stream.split_at_checked(2)?;
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        if length > FRAME_BYTES_MAX {
            return None;
        }
        let (frame, rest) = rest.split_at_checked(length)?;
        let ShardReply::Ok { object_size, body_bytes } = ShardReply::decode(frame).ok()? else {
            return None;
        };
        let mut body = rest.get(..usize::try_from(body_bytes).ok()?)?;
        let range = self.end.range();
        let decoding = verified::decode(self.shard(), object_size, range, &mut body);
        let proved = futures::executor::block_on(decoding).ok()?;
        body.is_empty().then_some(proved)
    }

    /// What a server that holds the object answers to a frame.
    fn serve(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let request = ShardRequest::decode(frame.get(2..)?).ok()?;
        if request.shard != self.shard() {
            return None;
        }
        let encoded = verified::encode(&self.bytes, &self.outboard, request.range).ok()?;
        Some(reply(&encoded))
    }

    /// Flips one bit in one kind of input. True if something false was accepted.
    fn flip(&self, rng: &mut SmallRng, kind: usize) -> bool {
        let size = self.bytes.len() as u64;
        match kind {
            0 => {
                // One flip in a hundred is anywhere in the object, the others are in its last range.
                let whole = rng.random_range(0..100) == 0;
                let range = if whole { ByteRange::new(0, size).unwrap() } else { self.end.range() };
                let bad = flipped(rng, &self.bytes[range.start() as usize..]);
                self.outboard.prove(range, bad.into()).is_ok()
            }
            1 => {
                let path = self.end.nodes();
                if path.is_empty() {
                    return self.flip(rng, 0);
                }
                let mut nodes = self.outboard.nodes().to_vec();
                let node = path[rng.random_range(0..path.len())].index as usize;
                let at = node * verified::NODE_BYTES + rng.random_range(0..verified::NODE_BYTES);
                nodes[at] ^= 1 << rng.random_range(0..8);
                let bad = Outboard::parse(self.shard(), size, nodes.into()).unwrap();
                bad.prove(self.end.range(), self.end.bytes().clone()).is_ok()
            }
            2 => Groups::from_file(self.shard(), &flipped(rng, &self.have)).is_some(),
            3 => {
                let bad = flipped(rng, &self.encoded.bytes);
                let range = self.end.range();
                let mut body = &bad[..];
                let decoding = verified::decode(self.shard(), size, range, &mut body);
                futures::executor::block_on(decoding).is_ok()
            }
            4 => {
                let head = reply(&self.encoded).len() - self.encoded.bytes.len();
                let mut stream = reply(&self.encoded);
                stream[rng.random_range(0..head)] ^= 1 << rng.random_range(0..8);
                self.receive(&stream).is_some_and(|proved| !self.is_true(&proved))
            }
            5 => {
                let answer = self.serve(&flipped(rng, &self.request));
                let received = answer.and_then(|stream| self.receive(&stream));
                received.is_some_and(|proved| !self.is_true(&proved))
            }
            6 => match Envelope::decode(&flipped(rng, &self.announcement)) {
                Ok(Envelope::Announcement(signed)) => {
                    signed.verify().is_ok() && signed != self.signed
                }
                _ => false,
            },
            _ => {
                // One bit of the 107 bytes that a member sends, on either side. The entry asserts.
                let mut laid_over = vec![0; 1 + 107];
                laid_over[0] = rng.random_range(0..2);
                laid_over[rng.random_range(1..108)] = 1 << rng.random_range(0..8);
                entries::handshake(&laid_over);
                false
            }
        }
    }
}

fn reply(encoded: &Encoded) -> Vec<u8> {
    let (object_size, body_bytes) = (encoded.size, encoded.bytes.len() as u64);
    [&ShardReply::Ok { object_size, body_bytes }.encode()[..], &encoded.bytes[..]].concat()
}

fn flipped(rng: &mut SmallRng, bytes: &[u8]) -> Vec<u8> {
    let mut bad = bytes.to_vec();
    let at = rng.random_range(0..bad.len());
    bad[at] ^= 1 << rng.random_range(0..8);
    bad
}

#[test]
fn none_of_a_million_flipped_bits_is_accepted() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let counts: [AtomicU64; KINDS.len()] = std::array::from_fn(|_| AtomicU64::new(0));
    let admitted: Vec<String> = (0..FLIPS / BATCH)
        .into_par_iter()
        .flat_map_iter(|batch| {
            let mut rng = SmallRng::seed_from_u64(seed.wrapping_add(batch));
            let sample = Sample::new(&mut rng);
            // Without a flip everything is accepted, so the checks below can fail.
            assert!(sample.outboard.prove(sample.end.range(), sample.end.bytes().clone()).is_ok());
            assert!(Groups::from_file(sample.shard(), &sample.have).is_some());
            let answer = sample.serve(&sample.request).unwrap();
            assert!(sample.is_true(&sample.receive(&answer).unwrap()));
            assert!(sample.signed.verify().is_ok());
            let mut wrong = Vec::new();
            for _ in 0..BATCH {
                // A signature costs as much as a hundred of the others.
                let kind = match rng.random_range(0..1000) {
                    n if n < 10 => 6,
                    n if n < 30 => 7,
                    n => n % 6,
                };
                counts[kind].fetch_add(1, Ordering::Relaxed);
                if sample.flip(&mut rng, kind) {
                    wrong.push(format!("batch {batch}: {}", KINDS[kind]));
                }
            }
            wrong
        })
        .collect();
    let counts = counts.map(AtomicU64::into_inner);
    println!("{:?}", KINDS.iter().zip(counts).collect::<Vec<_>>());
    assert_eq!(counts.iter().sum::<u64>(), FLIPS);
    assert!(counts.iter().all(|count| *count > 1_000));
    assert_eq!(admitted, Vec::<String>::new(), "{} admitted", admitted.len());
}
