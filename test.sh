#!/usr/bin/env bash
# Installs what the tests need, then runs every check. Needs Rust; no GPU.
set -euo pipefail
cd "$(dirname "$0")"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/doppler-node/target}"
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}

step() { printf '\n== %s\n' "$*"; }

step "Debian packages"
# mesa-vulkan-drivers: a software Vulkan driver (lavapipe), so that the wgpu kernels run without a GPU.
# iproute2: network namespaces, in which nodes find each other by mDNS.
# nftables: routers between them, behind which nodes hide.
# chromium: drives the page that a node serves.
packages=(mesa-vulkan-drivers iproute2 nftables chromium faketime)
missing=()
for package in "${packages[@]}"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]})); then
    if ! command -v apt-get >/dev/null; then
        echo "please install: ${missing[*]} (or your system's software Vulkan driver)" >&2
        exit 1
    fi
    sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
else
    echo "have: ${packages[*]}"
fi

step "npm packages of the page"
if command -v npm >/dev/null; then
    npm ci --prefix web --no-audit --no-fund
    export DOPPLER_REQUIRE_WEB=1
else
    echo "skipped: npm is not installed; the page's tests will say so"
fi

step "the APIs' official clients"
if command -v npm >/dev/null && python3 -c 'import ensurepip' 2>/dev/null; then
    npm ci --prefix tests/clients --no-audit --no-fund
    [ -x tests/clients/.venv/bin/python ] || python3 -m venv tests/clients/.venv
    tests/clients/.venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -r tests/clients/requirements.txt
    export DOPPLER_REQUIRE_CLIENTS=1
else
    echo "skipped: npm, or python3 with venv, is not installed; the clients' tests will say so"
fi

step "formatting"
cargo fmt --all --check
# Families and formats are declared by macros, behind which cargo fmt does not look.
rustfmt --edition 2024 --check src/infer/families/*.rs src/infer/quant/*.rs

step "clippy (release as well: build scripts run once)"
cargo clippy --release --workspace --all-targets --locked -- -D warnings

step "tests (release: one build serves the tests, the demo and the benchmarks)"
export DOPPLER_REQUIRE_GPU=1 DOPPLER_REQUIRE_FAKETIME=1
if cargo nextest --version >/dev/null 2>&1; then
    # One thread more than processors, for tests that mostly wait (.config/nextest.toml).
    cargo nextest run --release --workspace --locked --no-fail-fast --test-threads $(($(nproc) + 1))
else
    cargo test --release --workspace --locked --no-fail-fast
fi
