//! A private swarm's key as a file: 32 bytes as 64 hexadecimal digits, readable by the owner only.

use std::fs;
use std::path::Path;

use anyhow::Context;

use super::identity::create_private;
use doppler_mesh::SwarmKey;

/// The longest file that is read: the digits, and some white space.
const FILE_BYTES_MAX: u64 = 256;

/// Creates a key and stores it.
///
/// # Errors
/// If the file exists, so that a key in use is not replaced by accident.
pub fn create(path: &Path) -> anyhow::Result<()> {
    let digits = blake3::Hash::from_bytes(*SwarmKey::generate().as_bytes()).to_hex();
    create_private(path, format!("{digits}\n").as_bytes())
}

/// Reads a key. The error never quotes the file's contents.
pub fn read(path: &Path) -> anyhow::Result<SwarmKey> {
    let cannot = || format!("cannot read {}", path.display());
    let metadata = fs::metadata(path).with_context(cannot)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        if metadata.permissions().mode() & 0o077 != 0 {
            tracing::warn!("{} can be read by others; chmod 600 it", path.display());
        }
    }
    let text = if metadata.len() <= FILE_BYTES_MAX {
        fs::read_to_string(path).with_context(cannot)?
    } else {
        String::new()
    };
    let key = blake3::Hash::from_hex(text.trim()).ok();
    let key = key.with_context(|| {
        let path = path.display();
        format!("{path} is not a swarm key (64 hexadecimal digits); `swarm-key FILE` makes one")
    })?;
    Ok(SwarmKey::from_bytes(*key.as_bytes()))
}

/// A key's digits.
///
/// # Errors
/// As [`read`].
pub fn digits(path: &Path) -> anyhow::Result<String> {
    let key = read(path)?;
    Ok(blake3::Hash::from_bytes(*key.as_bytes()).to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lab.key");
        create(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.trim().len(), 2 * SwarmKey::BYTES);
        let key = read(&path).unwrap();
        assert_eq!(blake3::Hash::from_bytes(*key.as_bytes()).to_hex().as_str(), text.trim());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert!(create(&path).unwrap_err().to_string().contains("exists"));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn what_is_no_key_is_refused_without_being_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for text in [String::new(), "ab".repeat(31), "zz".repeat(32), "ab".repeat(1 << 20)] {
            fs::write(&path, &text).unwrap();
            let error = format!("{:#}", read(&path).unwrap_err());
            assert!(error.contains("not a swarm key"), "{error}");
            assert!(!error.contains("abab") && !error.contains("zzzz"), "{error}");
        }
        assert!(format!("{:#}", read(&dir.path().join("none")).unwrap_err()).contains("none"));
    }
}
