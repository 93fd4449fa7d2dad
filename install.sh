#!/bin/sh
# Installs doppler-node for one user, or under any prefix, and removes it again.
set -eu

usage() {
    cat <<'USAGE'
Installs doppler-node: the program, its manual pages and its completions for bash, zsh and fish.

    ./install.sh                              build this checkout with cargo, and install it
    ./install.sh --from ARCHIVE               install a prebuilt archive: a file or an https:// URL
    ./install.sh --uninstall                  remove what was installed; models and keys stay

    --sha256 HEX     the archive's SHA-256 [default: the one in ARCHIVE.sha256]
    --prefix DIR     where to: DIR/bin, DIR/share [default: ~/.local]
    --help           this text

An archive whose SHA-256 is not the expected one is refused. packaging/release.sh makes archives.
USAGE
}

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

prefix='' from='' expected='' uninstall=''
while [ $# -gt 0 ]; do
    case $1 in
    --from | --sha256 | --prefix)
        [ -n "${2:-}" ] || fail "$1 needs a value (--help lists the options)"
        case $1 in
        --from) from=$2 ;;
        --sha256) expected=$2 ;;
        --prefix) prefix=$2 ;;
        esac
        shift
        ;;
    --uninstall) uninstall=1 ;;
    --help | -h)
        usage
        exit 0
        ;;
    *) fail "there is no option $1 (--help lists the options)" ;;
    esac
    shift
done
if [ -z "$prefix" ]; then
    [ -n "${HOME:-}" ] || fail "HOME is not set: give --prefix DIR"
    prefix=$HOME/.local
fi
case $prefix in
/*) ;;
*) prefix=$PWD/$prefix ;;
esac
# What was installed, one path below the prefix a line. Not in share/doppler-node: models may lie there.
record=$prefix/share/doc/doppler-node/installed

remove() {
    [ -f "$record" ] || fail "nothing is installed under $prefix ($record does not exist)"
    printf 'share/doc/doppler-node/installed\n' >>"$record"
    while IFS= read -r path; do
        case $path in
        bin/* | share/*)
            rm -f -- "$prefix/$path"
            # Directories in which nothing is left go, too.
            (cd -- "$prefix" && rmdir -p -- "${path%/*}") 2>/dev/null || true
            ;;
        esac
    done <"$record"
    echo "removed doppler-node from $prefix"
    echo "Models, keys and settings stay where they are: ${XDG_DATA_HOME:-~/.local/share}/doppler-node" \
        "and ${XDG_CONFIG_HOME:-~/.config}/doppler-node, or where --data and DOPPLER_CONFIG point."
}

sha256() {
    if have sha256sum; then
        sha256sum -- "$1" | cut -d ' ' -f 1
    elif have shasum; then
        shasum -a 256 -- "$1" | cut -d ' ' -f 1
    else
        fail "neither sha256sum nor shasum is here to check the archive with"
    fi
}

# fetch SOURCE FILE: copies a file, or what a URL leads to.
fetch() {
    case $1 in
    https://* | http://127.0.0.1:* | http://localhost:*)
        if have curl; then
            curl -fsSL --retry 3 -o "$2" -- "$1" || fail "cannot fetch $1"
        elif have wget; then
            wget -q -O "$2" -- "$1" || fail "cannot fetch $1"
        else
            fail "neither curl nor wget is here to fetch $1 with"
        fi
        ;;
    *://*) fail "$1: only https:// is fetched" ;;
    *) cp -- "$1" "$2" || fail "cannot read $1" ;;
    esac
}

# Fills $tmp/tree from the archive.
unpack() {
    fetch "$from" "$tmp/archive.tar.gz"
    if [ -z "$expected" ]; then
        fetch "$from.sha256" "$tmp/sha256"
        expected=$(cut -d ' ' -f 1 <"$tmp/sha256")
    fi
    expected=$(printf %s "$expected" | tr 'A-F' 'a-f')
    got=$(sha256 "$tmp/archive.tar.gz")
    [ "$got" = "$expected" ] ||
        fail "$from: its SHA-256 is $got, not $expected: it is damaged or not what was meant"
    mkdir "$tmp/tree"
    # The archive's one directory is left out.
    tar -xzf "$tmp/archive.tar.gz" -C "$tmp/tree" --strip-components 1
}

# Fills $tmp/tree from this checkout.
build() {
    here=$(cd -- "$(dirname -- "$0")" && pwd)
    [ -f "$here/Cargo.toml" ] || fail "$here is no checkout: give --from ARCHIVE"
    have cargo || fail "cargo is not here: install Rust (https://rustup.rs), or give --from ARCHIVE"
    target=${CARGO_TARGET_DIR:-${HOME:-$here}/.cache/doppler-node/target}
    # A relative path is the caller's, not the checkout's.
    case $target in
    /*) ;;
    *) target=$PWD/$target ;;
    esac
    (cd -- "$here" && CARGO_TARGET_DIR=$target cargo build --release --locked --bin doppler-node)
    sh "$here/packaging/tree.sh" "$target/release/doppler-node" "$tmp/tree"
}

put() {
    program=$tmp/tree/bin/doppler-node
    if [ ! -f "$program" ] || [ -L "$program" ]; then
        fail "the archive has no bin/doppler-node"
    fi
    chmod 755 "$program"
    version=$(DOPPLER_CONFIG='' "$program" --version) ||
        fail "this program does not run here: is it of another system or processor?"
    (cd -- "$tmp/tree" && find bin/doppler-node share -type f ! -path share/doc/doppler-node/installed 2>/dev/null |
        LC_ALL=C sort) >"$tmp/new"
    if [ -f "$record" ]; then
        # What an earlier version had and this one has not.
        while IFS= read -r path; do
            case $path in
            bin/* | share/*) grep -Fqx -- "$path" "$tmp/new" || rm -f -- "$prefix/$path" ;;
            esac
        done <"$record"
    fi
    mkdir -p -- "${record%/*}"
    cp -- "$tmp/new" "$record"
    while IFS= read -r path; do
        mkdir -p -- "$prefix/${path%/*}"
        # Renamed into place, so that a running program stays as it is until it ends.
        cp -p -- "$tmp/tree/$path" "$prefix/$path.new"
        mv -f -- "$prefix/$path.new" "$prefix/$path"
    done <"$tmp/new"
    echo "installed $version: $prefix/bin/doppler-node"
    case :${PATH:-}: in
    *":$prefix/bin:"*) ;;
    *) echo "$prefix/bin is not in PATH: add it, or call the program by its path" ;;
    esac
}

if [ -n "$uninstall" ]; then
    remove
    exit 0
fi
[ -z "$expected" ] || [ -n "$from" ] || fail "--sha256 goes with --from"
umask 022
tmp=$(mktemp -d)
trap 'rm -rf -- "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -n "$from" ]; then unpack; else build; fi
put
