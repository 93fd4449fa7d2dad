//! Reading, writing and giving back parts of a file by position.

use std::fs::File;
use std::io;

#[cfg(unix)]
pub fn read(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(unix)]
pub fn write(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
pub fn read(file: &File, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => (out, offset) = (&mut out[count..], offset + count as u64),
        }
    }
    Ok(())
}

#[cfg(windows)]
pub fn write(file: &File, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        (bytes, offset) = (&bytes[count..], offset + count as u64);
    }
    Ok(())
}

/// Gives a range's blocks back to the file system, where that is possible. It reads as zeros then.
#[cfg(target_os = "linux")]
pub fn free(file: &File, start: u64, end: u64) {
    use rustix::fs::{FallocateFlags, fallocate};
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // Without it, the file merely keeps its blocks until the pull is done.
    let _ = fallocate(file, flags, start, end - start);
}

#[cfg(not(target_os = "linux"))]
pub fn free(_file: &File, _start: u64, _end: u64) {}
