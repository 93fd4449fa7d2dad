//! Memory for stored weights, on large pages where the system gives them to those who ask.
//!
//! A decoded token reads every weight once. With pages of 4 KiB each of them costs a walk of the
//! page tables, which a virtual machine makes twice as long; with pages of 2 MiB hardly any does.
//! Asking is advice: where it is not taken, the same bytes lie on small pages.

use std::io;

use memmap2::{MmapMut, MmapOptions};

/// Zeroed bytes. Pages never written take no memory.
pub fn zeroed(len: usize) -> io::Result<MmapMut> {
    // An empty mapping is an error to some systems.
    let map = MmapOptions::new().len(len.max(1)).map_anon()?;
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "no large pages");
    }
    Ok(map)
}

/// Bytes that are taken together.
const CHUNK: usize = 64 << 20;
/// Where a tensor may start: on a line of the cache.
const ALIGN: usize = 64;

/// Tensors one after another, so that those smaller than a large page share one.
/// Nothing is given back before all of it is.
#[derive(Debug, Default)]
pub struct Arena {
    chunks: Vec<MmapMut>,
    /// Bytes of the last chunk that are taken.
    used: usize,
}

/// Where a tensor lies in its arena.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    chunk: usize,
    start: usize,
    len: usize,
}

impl Arena {
    /// Keeps a copy of `bytes`.
    pub fn store(&mut self, bytes: &[u8]) -> io::Result<Place> {
        let left = self.chunks.last().map_or(0, |chunk| chunk.len() - self.used);
        if bytes.len() > left {
            self.chunks.push(zeroed(bytes.len().max(CHUNK))?);
            self.used = 0;
        }
        let (chunk, start, len) = (self.chunks.len().saturating_sub(1), self.used, bytes.len());
        if let Some(last) = self.chunks.last_mut() {
            last[start..start + len].copy_from_slice(bytes);
            self.used = (start + len).next_multiple_of(ALIGN).min(last.len());
        }
        Ok(Place { chunk, start, len })
    }

    pub fn get(&self, place: Place) -> &[u8] {
        match self.chunks.get(place.chunk) {
            Some(chunk) => &chunk[place.start..place.start + place.len],
            None => &[], // nothing but empty tensors so far
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_gives_back_what_it_was_given_whatever_the_sizes() {
        let mut arena = Arena::default();
        let sizes = [0, 1, 63, 64, 65, 0, CHUNK - 300, 200, CHUNK, 7, CHUNK + 1, 9];
        let byte = |n: usize, i: usize| (i * 31 + n) as u8;
        let mut places = Vec::new();
        for (n, size) in sizes.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..size).map(|i| byte(n, i)).collect();
            places.push(arena.store(&bytes).unwrap());
        }
        for (n, (place, size)) in places.into_iter().zip(sizes).enumerate() {
            let bytes = arena.get(place);
            assert_eq!((bytes.len(), bytes.as_ptr().addr() % ALIGN), (size, 0), "tensor {n}");
            assert!(bytes.iter().enumerate().all(|(i, b)| *b == byte(n, i)), "tensor {n}");
        }
    }

    #[test]
    fn more_than_there_can_be_is_an_error() {
        assert!(zeroed(usize::MAX / 2).is_err());
        assert!(zeroed(0).is_ok());
    }
}
