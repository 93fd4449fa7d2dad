//! What bytes from a peer, a file or a user enter through, each as a function of
//! bytes alone. The fuzz targets call these; so do the tests, with a seeded mutator.
//!
//! Each must neither panic nor take more memory than its bounds say, and asserts
//! what holds for whatever it accepts.

use std::sync::LazyLock;

use doppler_node::store::groups::Groups;
use doppler_node::store::verified::{self, Outboard};
use doppler_node::store::{ByteRange, Manifest, ShardId};
use doppler_node::wire::{
    BODY_BYTES_MAX, ENVELOPE_BYTES_MAX, Envelope, FRAME_BYTES_MAX, ShardReply, ShardRequest,
};

/// The object that replies are about: three groups and a little.
pub static OBJECT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; 3 * verified::GROUP_BYTES as usize + 100];
    blake3::Hasher::new().update(b"an object").finalize_xof().fill(&mut bytes);
    bytes
});

/// The ranges of it that may be asked for; an input's first byte chooses.
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

/// A request of the shard protocol, with its length in front.
pub fn request(data: &[u8]) {
    let Some(frame) = framed(data) else { return };
    if let Ok(request) = ShardRequest::decode(frame) {
        assert!(request.range.len() <= verified::SERVE_BYTES_MAX);
        assert!(request.range.end() <= verified::OBJECT_BYTES_MAX);
        assert_eq!(ShardRequest::decode(&request.encode()[2..]), Ok(request));
    }
}

/// A choice of what was asked, then a whole reply: its head and the bao encoding.
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

/// A message of gossip.
pub fn envelope(data: &[u8]) {
    let Ok(envelope) = Envelope::decode(data) else { return };
    assert!(data.len() <= ENVELOPE_BYTES_MAX);
    if let Envelope::Announcement(signed) = &envelope {
        // Verified or not: an answer, never a panic.
        let _ = signed.verify();
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

/// The bytes of a message whose length stands in front.
fn framed(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_at_checked(2)?;
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    if length > FRAME_BYTES_MAX { None } else { rest.get(..length) }
}
