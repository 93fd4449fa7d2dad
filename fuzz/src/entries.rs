//! The functions that parse bytes from a peer, a file or a user, each as a function
//! of bytes alone. The fuzz targets call them, and so do the tests, with a seeded
//! mutator.
//!
//! Each must not panic and must keep its memory bounds. It asserts what must hold
//! for every input that it accepts.

use std::io;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::SystemTime;

use doppler_infer::load;
use doppler_infer::template::{self, Conversation};
use doppler_infer::tokenizer::PROMPT_BYTES_MAX;
use doppler_mesh::wire::{
    BODY_BYTES_MAX, ENVELOPE_BYTES_MAX, Envelope, FRAME_BYTES_MAX, ShardReply, ShardRequest,
};
use doppler_store::chat::ChatTemplates;
use doppler_store::groups::Groups;
use doppler_store::verified::{self, Outboard};
use doppler_store::{ByteRange, Manifest, ShardId};
use doppler_swarm::{Address, KEY_PROTOCOL, PeerId, Side, SwarmKey, prove_key};
use futures::{AsyncRead, AsyncWrite};

/// The object that replies are about: three groups and 100 bytes.
pub static OBJECT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; 3 * verified::GROUP_BYTES as usize + 100];
    blake3::Hasher::new().update(b"an object").finalize_xof().fill(&mut bytes);
    bytes
});

/// The requested range of [`OBJECT`], chosen by an input's first byte.
pub fn wanted(choice: u8) -> ByteRange {
    let size = OBJECT.len() as u64;
    let all =
        [(0, size), (size - 100, size), (5, 6), (20_000, 40_000), (0, 16_384), (16_000, size)];
    let (start, end) = all[usize::from(choice) % all.len()];
    ByteRange::new(start, end).unwrap()
}

/// A `manifest.json`.
pub fn manifest(data: &[u8]) {
    if let Ok(manifest) = Manifest::parse(data) {
        let written = manifest.to_json_bytes();
        assert!(Manifest::parse(&written).is_ok(), "what is accepted can be written and read");
    }
}

/// A request of the shard protocol with its length prefix.
pub fn request(data: &[u8]) {
    let Some(frame) = framed(data) else { return };
    if let Ok(request) = ShardRequest::decode(frame) {
        assert!(request.range.len() <= verified::SERVE_BYTES_MAX);
        assert!(request.range.end() <= verified::OBJECT_BYTES_MAX);
        assert_eq!(ShardRequest::decode(&request.encode()[2..]), Ok(request));
    }
}

/// The choice of a range, then a whole reply: its head and the bao encoding.
pub fn reply(data: &[u8]) {
    let Some((choice, stream)) = data.split_first() else { return };
    let range = wanted(*choice);
    let shard = ShardId::of(&OBJECT);
    let Some(frame) = framed(stream) else { return };
    let mut body = &stream[2 + frame.len()..];
    let Ok(reply) = ShardReply::decode(frame) else { return };
    let ShardReply::Ok { object_size, body_bytes } = reply else { return };
    assert!(body_bytes <= BODY_BYTES_MAX && object_size <= verified::OBJECT_BYTES_MAX);
    let decoded =
        futures::executor::block_on(verified::decode(shard, object_size, range, &mut body));
    if let Ok(proved) = decoded {
        let (start, end) = (range.start() as usize, range.end() as usize);
        assert_eq!(proved.slice(range).unwrap(), OBJECT[start..end], "a wrong byte was admitted");
        assert!(!proved.proves_size() || object_size == OBJECT.len() as u64);
    }
}

/// A gossip message.
pub fn envelope(data: &[u8]) {
    let Ok(envelope) = Envelope::decode(data) else { return };
    assert!(data.len() <= ENVELOPE_BYTES_MAX);
    // A bad signature or address gives an error, never a panic.
    match &envelope {
        Envelope::Announcement(signed) => drop(signed.verify()),
        Envelope::Holdings(holdings) => {
            holdings.addresses.iter().for_each(|text| drop(text.parse::<Address>()));
        }
        Envelope::Doubt(_)
        | Envelope::Heartbeat { .. }
        | Envelope::Goodbye(_)
        | Envelope::Unknown => {}
    }
    assert_eq!(Envelope::decode(&envelope.encode()), Ok(envelope));
}

/// The files beside an object: which groups are held, and its hash tree.
pub fn files(data: &[u8]) {
    let shard = ShardId::of(&OBJECT);
    if let Some(groups) = Groups::from_file(shard, data) {
        assert_eq!(Groups::from_file(shard, &groups.to_file(shard)), Some(groups));
    }
    let size = OBJECT.len() as u64;
    if let Ok(outboard) = Outboard::parse(shard, size, data.to_vec().into()) {
        let whole = ByteRange::new(0, size).unwrap();
        let proved = outboard.prove(whole, OBJECT.clone().into());
        let own = Outboard::of(&OBJECT).unwrap();
        assert_eq!(proved.is_ok(), outboard.nodes() == own.nodes());
    }
}

/// A GGUF file: header, config and vocabulary. What is accepted describes a model or is refused by
/// its family.
pub fn gguf(data: &[u8]) {
    match load::probe_gguf(data) {
        Ok(config) => drop(doppler_infer::families::read(&config)),
        Err(problem) => assert_eq!(problem.lines().count(), 1, "{problem}"),
    }
}

/// A checkpoint's `config.json`. What is accepted describes a model.
pub fn config(data: &[u8]) {
    let Ok(config) = serde_json::from_slice(data) else { return };
    if let Err(problem) = doppler_infer::families::read(&config) {
        let problem = problem.to_string();
        assert_eq!(problem.lines().count(), 1, "{problem}");
    }
}

/// The first byte chooses: the header of a safetensors file, or the index of several.
pub fn safetensors(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    let problem = if choice & 1 == 0 {
        match load::probe_safetensors(bytes) {
            Ok(tensors) => {
                let size = bytes.len() as u64;
                assert!(tensors.values().all(|at| at.start <= at.end && at.end <= size));
                return;
            }
            Err(problem) => problem,
        }
    } else {
        match load::probe_index(bytes) {
            Ok(files) => {
                assert!(files.keys().all(|name| !name.contains(['/', '\\']) && name != ".."));
                return;
            }
            Err(problem) => problem,
        }
    };
    assert_eq!(problem.lines().count(), 1, "{problem}");
}

/// A chat template's source. Its prompt is bounded, or the refusal is one line.
pub fn template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let chat = ChatTemplates::one(source);
    let said = [("system", "Be brief."), ("user", "Is 7 prime?"), ("assistant", "Yes.")];
    let messages = said.map(|(role, content)| Conversation::message(role, content)).to_vec();
    let conversation = Conversation { messages, ..Conversation::default() };
    match template::render(Some(&chat), &conversation, SystemTime::UNIX_EPOCH) {
        Ok(prompt) => assert!(prompt.len() <= PROMPT_BYTES_MAX),
        Err(problem) => {
            let problem = problem.to_string();
            assert_eq!(problem.lines().count(), 1, "{problem}");
            assert!(!problem.contains("it panicked"), "{problem}");
        }
    }
}

/// What a peer sends before a private swarm admits it. The first byte chooses the peer's side, and
/// whether the rest is everything that it sends or is XORed over the messages of a member.
pub fn handshake(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    let side = if choice & 1 == 0 { Side::Dialer } else { Side::Listener };
    let member = choice & 2 == 0;
    let mut peer = Caller { side, member, bytes, heard: Vec::new(), said: 0 };
    let (node, key) = (PeerId::from_seed(NODE), SwarmKey::from_bytes(KEY));
    let node_side = if side == Side::Dialer { Side::Listener } else { Side::Dialer };
    let remote = PeerId::from_seed(PEER);
    let proving = prove_key(&key, node_side, node, remote, &mut peer);
    let let_in = futures::executor::block_on(proving).is_ok();
    if !member {
        assert!(!let_in, "a peer without the key was let in");
    } else if bytes.iter().take(peer.said).all(|byte| *byte == 0) {
        assert!(let_in, "a member was refused");
    } else if let_in {
        // Protocol negotiation tolerates some variation; the proof tolerates none.
        let chosen = negotiation().len();
        let proof = bytes.iter().take(peer.said).skip(chosen);
        assert!(proof.into_iter().all(|byte| *byte == 0), "a wrong proof was accepted");
    }
}

const KEY: [u8; 32] = [3; 32];
const NODE: [u8; 32] = [1; 32];
const PEER: [u8; 32] = [2; 32];
const NONCE: [u8; 32] = [4; 32];

/// The two messages of multistream-select, each with its length and a newline.
fn negotiation() -> Vec<u8> {
    let message = |text: &str| [&[text.len() as u8 + 1], text.as_bytes(), b"\n"].concat();
    [message("/multistream/1.0.0"), message(KEY_PROTOCOL)].concat()
}

/// The peer at the other end of a node's proof, as the node's stream: it yields what the peer
/// sends, and then ends.
struct Caller<'a> {
    side: Side,
    member: bool,
    bytes: &'a [u8],
    heard: Vec<u8>,
    said: usize,
}

impl Caller<'_> {
    /// What a member must have sent by now, written from the description in `docs/swarm-key.md`.
    fn words(&self) -> Vec<u8> {
        let mut words = negotiation();
        let heard = self.heard.get(words.len()..).unwrap_or_default();
        match self.side {
            Side::Dialer => {
                if let Some(nonce) = heard.get(..32) {
                    words.push(1);
                    words.extend(NONCE);
                    words.extend(proof("dialer", [PEER, NODE], [&NONCE, nonce]));
                }
            }
            Side::Listener => {
                words.extend(NONCE);
                if let Some(nonce) = heard.get(1..33) {
                    words.push(1);
                    words.extend(proof("listener", [NODE, PEER], [nonce, &NONCE]));
                }
            }
        }
        words
    }
}

/// One side's proof for a dialer and a listener, and their nonces.
fn proof(side: &str, peers: [[u8; 32]; 2], nonces: [&[u8]; 2]) -> [u8; 32] {
    let context = format!("doppler-node 2026 swarm key v1 {side}");
    let ids = peers.map(|seed| PeerId::from_seed(seed).to_bytes());
    let ids = ids.map(|id| [&[id.len() as u8], &id[..]].concat());
    let message = [ids.concat(), nonces.concat()].concat();
    *blake3::keyed_hash(&blake3::derive_key(&context, &KEY), &message).as_bytes()
}

impl AsyncRead for Caller<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let words = if self.member {
            let mask = self.bytes.iter().chain(std::iter::repeat(&0));
            self.words().into_iter().zip(mask).map(|(word, mask)| word ^ mask).collect()
        } else {
            self.bytes.to_vec()
        };
        let left = words.get(self.said..).unwrap_or_default();
        let len = left.len().min(into.len());
        into[..len].copy_from_slice(&left[..len]);
        self.said += len;
        Poll::Ready(Ok(len))
    }
}

impl AsyncWrite for Caller<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.heard.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The message after a length prefix.
fn framed(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_at_checked(2)?;
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    if length > FRAME_BYTES_MAX { None } else { rest.get(..length) }
}
