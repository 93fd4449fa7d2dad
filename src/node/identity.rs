//! A node's identity, in files that only the owner can read: its Ed25519 key as 32 seed bytes in
//! `identity.key`, and the certificate of its WebRTC addresses in `webrtc.pem`.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail};
use doppler_store::regular;
use rand::Rng;
use tempfile::NamedTempFile;

/// Reads the seed. The first time, creates and stores one.
pub fn load_or_create(data: &Path) -> anyhow::Result<[u8; 32]> {
    let path = data.join("identity.key");
    match regular::read(&path) {
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

/// Reads the WebRTC certificate and its key. The first time, creates and stores one. Its hash is
/// part of every WebRTC address, which would otherwise change with each start.
pub fn load_or_create_certificate(data: &Path) -> anyhow::Result<String> {
    let path = data.join("webrtc.pem");
    match regular::read_text(&path) {
        Ok(pem) => match doppler_mesh::check_certificate(&pem) {
            Ok(()) => Ok(pem),
            Err(error) => bail!(
                "{} is not usable ({error}); restore it, or delete it for a new one, with which \
                 the node's WebRTC addresses change",
                path.display()
            ),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let pem = doppler_mesh::generate_certificate()?;
            write_private(&path, pem.as_bytes())?;
            Ok(pem)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Replaces a file by one that only its owner can read, atomically. A link is replaced, not
/// followed, and no other file is touched.
pub fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> { Ok(private(path, bytes)?.persist(path).map(drop)?) };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// As [`write_private`], but fails if something with that name exists, even a link.
pub fn create_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let write =
        || -> std::io::Result<()> { Ok(private(path, bytes)?.persist_noclobber(path).map(drop)?) };
    match write() {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("{} exists; choose a new file", path.display())
        }
        written => written.with_context(|| format!("cannot write {}", path.display())),
    }
}

/// A file with an unused name, beside `path`, which only its owner can read.
fn private(path: &Path, bytes: &[u8]) -> std::io::Result<NamedTempFile> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    // Tempfile creates new files with mode 0600.
    let mut file = NamedTempFile::new_in(dir.unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        let short = "-----BEGIN EXPIRES-----\n-----END EXPIRES-----\n";
        for damaged in ["", "-----BEGIN CERTIFICATE-----", "no pem", short] {
            fs::write(dir.path().join("webrtc.pem"), damaged).unwrap();
            let error = load_or_create_certificate(dir.path()).unwrap_err().to_string();
            assert!(error.contains("webrtc.pem") && error.contains("delete it"), "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_private_file_touches_no_other_and_follows_no_link() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (beside, target) = (dir.path().join("lab.new"), dir.path().join("target"));
        fs::write(&beside, b"mine").unwrap();
        fs::write(&target, b"mine").unwrap();
        let path = dir.path().join("lab.key");
        create_private(&path, b"one").unwrap();
        assert!(create_private(&path, b"two").unwrap_err().to_string().contains("exists"));
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write_private(&path, b"three").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for leads_to in [target.clone(), dir.path().join("nowhere")] {
            fs::remove_file(&path).unwrap();
            symlink(&leads_to, &path).unwrap();
            assert!(create_private(&path, b"four").is_err());
            write_private(&path, b"five").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"five");
            assert!(path.symlink_metadata().unwrap().is_file());
        }
        assert_eq!(
            (fs::read(&beside).unwrap(), fs::read(&target).unwrap()),
            (b"mine".into(), b"mine".into())
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is left beside it");
    }
}
