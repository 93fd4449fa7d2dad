#!/bin/sh
# Makes a prebuilt archive and its checksum in dist/: doppler-node-VERSION-TARGET.tar.gz and .sha256.
#
#     packaging/release.sh                       for this machine
#     packaging/release.sh TARGET                for another one (rustup target add TARGET)
#     packaging/release.sh --program FILE        of a program that is built already, for this machine
#
# The same commit, toolchain and target give the same archive: names are sorted, owners are root, and
# every time is the commit's (SOURCE_DATE_EPOCH, if it is set).
set -eu
cd -- "$(dirname -- "$0")/.."

host=$(rustc -vV) # fails here if there is no toolchain
host=$(printf '%s\n' "$host" | sed -n 's/^host: //p')
target=$host program=''
case ${1:-} in
--program) program=${2:?"--program needs a file"} ;;
-*) echo "release.sh: there is no option $1" >&2 && exit 1 ;;
?*) target=$1 ;;
esac
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
name=doppler-node-$version-$target
out=${DIST:-dist}
mkdir -p "$out"
tmp=$(mktemp -d)
trap 'rm -rf -- "$tmp"' EXIT

if [ -z "$program" ]; then
    build=${CARGO_TARGET_DIR:-$HOME/.cache/doppler-node/target}
    # Paths of this machine do not belong in a program that is given away.
    RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$PWD=. --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo" \
        CARGO_TARGET_DIR=$build cargo build --release --locked --target "$target" --bin doppler-node
    program=$build/$target/release/doppler-node
fi
cp -- "$program" "$tmp/program"
# Of another machine's program the host's tools know nothing: it keeps its symbols then.
strip "$tmp/program" 2>/dev/null || echo "release.sh: not stripped: strip does not know this program" >&2

tree=$tmp/$name
if [ "$target" = "$host" ]; then
    sh packaging/tree.sh "$tmp/program" "$tree"
else
    # It does not run here, so it cannot write its manual pages.
    mkdir -p "$tree/bin" && cp -- "$tmp/program" "$tree/bin/doppler-node"
fi
doc=$tree/share/doc/doppler-node
mkdir -p "$doc"
cp README.md LICENSE LICENSE-APACHE LICENSE-MIT "$doc"
cp -r packaging/systemd "$doc/systemd"
find "$tree" -type d -exec chmod 755 {} +
find "$tree/share" -type f -exec chmod 644 {} +
chmod 755 "$tree/bin/doppler-node"
LC_ALL=C tar --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --format=ustar \
    -C "$tmp" -cf - "$name" | gzip -9n >"$out/$name.tar.gz"
(cd -- "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$out/$name.tar.gz"
