//! Nodes of one local network find each other without an address. Needs multicast, so
//! it runs in a network namespace of its own (root and iproute2).

use crate::common::model;
use crate::common::netns::Namespace;

const ADDRESS: &str = "10.213.77.1";

#[test]
fn nodes_of_one_network_need_no_address() {
    let Some(namespace) = Namespace::create("mdns") else { return };
    for line in [
        "link add near type veth peer name far",
        "link set near up",
        "link set far up",
        &format!("addr add {ADDRESS}/24 dev near"),
        "route add 224.0.0.0/4 dev near",
    ] {
        namespace.ip(line);
    }
    let dir = tempfile::tempdir().unwrap();
    let first = namespace.join(&dir.path().join("a"), ADDRESS, &[]);
    let mut second = namespace.join(&dir.path().join("b"), ADDRESS, &[]);
    let published = namespace
        .command()
        .arg("publish")
        .arg(model())
        .args(["--shards", "0"])
        .arg("--data")
        .arg(&first.data)
        .output()
        .unwrap();
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    assert_eq!(second.event("model")["name"], "tiny-mixtral-q4_k_m");
}
