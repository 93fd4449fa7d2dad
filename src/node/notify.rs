//! Tells a service manager that the node answers, or stops: systemd's protocol, `sd_notify(3)`.
//!
//! Does nothing unless `NOTIFY_SOCKET` names a socket. Nothing depends on whether it is heard.

/// The node answers.
pub const READY: &str = "READY=1";
/// The node begins to stop.
pub const STOPPING: &str = "STOPPING=1";

/// Tells the manager that started this process, if it wants to know.
pub fn tell(state: &str) {
    #[cfg(target_os = "linux")]
    if let Some(name) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(&name, state)
    {
        tracing::warn!("NOTIFY_SOCKET={}: {error}", name.display());
    }
    #[cfg(not(target_os = "linux"))]
    let _ = state;
}

/// Sends one datagram to a socket's path, or to the abstract name after an `@`.
#[cfg(target_os = "linux")]
fn send(name: &std::ffi::OsStr, state: &str) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A manager that reads nothing delays nobody.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::*;

    #[test]
    fn a_manager_is_told_at_a_path_and_at_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("doppler-node-test-{:x}", rand::random::<u64>());
        let sockets = [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (
                UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(),
                format!("@{name}").into(),
            ),
        ];
        for (socket, name) in sockets {
            send(&name, READY).unwrap();
            let mut said = [0; 64];
            let length = socket.recv(&mut said).unwrap();
            assert_eq!(&said[..length], READY.as_bytes());
        }
        assert!(send(dir.path().join("nobody").as_os_str(), STOPPING).is_err());
    }
}
