//! What a node is known by, readable by the owner only: its Ed25519 identity, 32 seed
//! bytes in `identity.key`, and the certificate of its WebRTC addresses in `webrtc.pem`.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail};
use rand::Rng;

/// Reads the seed, or makes and stores one the first time.
pub fn load_or_create(data: &Path) -> anyhow::Result<[u8; 32]> {
    let path = data.join("identity.key");
    match fs::read(&path) {
        Ok(bytes) => match <[u8; 32]>::try_from(bytes.as_slice()) {
            Ok(seed) => return Ok(seed),
            Err(_) => bail!(
                "{} is {} bytes, not a 32-byte key; restore it, or delete it for a new identity",
                path.display(),
                bytes.len()
            ),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let mut seed = [0; 32];
    rand::rng().fill_bytes(&mut seed);
    write_private(&path, &seed)?;
    Ok(seed)
}

/// Reads the WebRTC certificate with its key, or makes and stores one the first time:
/// its hash is in every WebRTC address, which would change with each start.
pub fn load_or_create_certificate(data: &Path) -> anyhow::Result<String> {
    let path = data.join("webrtc.pem");
    match fs::read_to_string(&path) {
        Ok(pem) => Ok(pem),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let pem = doppler_mesh::generate_certificate()?;
            write_private(&path, pem.as_bytes())?;
            Ok(pem)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Replaces a file by one that only its owner can read, whole or not at all.
pub fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let temporary = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file: File = options.open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = load_or_create(dir.path()).unwrap();
        assert_eq!(load_or_create(dir.path()).unwrap(), first);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(dir.path().join("identity.key")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        let certificate = load_or_create_certificate(dir.path()).unwrap();
        assert_eq!(load_or_create_certificate(dir.path()).unwrap(), certificate);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(dir.path().join("webrtc.pem")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        fs::write(dir.path().join("identity.key"), b"short").unwrap();
        assert!(load_or_create(dir.path()).unwrap_err().to_string().contains("not a 32-byte key"));
    }
}
