#!/usr/bin/env bash
# What takes too long for every change: all of ./test.sh, then the sweeps that it skips (tests marked
# `#[ignore]`; among them a soak of an hour, or of DOPPLER_SOAK_MINUTES), then models with real weights
# where pip can fetch them, then the fuzz targets for a minute each where cargo-fuzz is installed.
set -euo pipefail
cd "$(dirname "$0")"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/doppler-node/target}"

./test.sh

printf '\n== sweeps\n'
export DOPPLER_REQUIRE_GPU=1 DOPPLER_REQUIRE_FAKETIME=1 DOPPLER_REQUIRE_WEB=1
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --profile nightly --release --workspace --locked --no-fail-fast --run-ignored only
else
    cargo test --release --workspace --locked --no-fail-fast -- --ignored
fi

printf '\n== planted bugs\n'
cargo test --release -p simnet --features planted --locked -- planted

printf '\n== real weights\n'
tests/real_weights.sh

printf '\n== fuzz targets\n'
if cargo fuzz --version >/dev/null 2>&1; then
    fuzz/run.sh
else
    echo "skipped: cargo-fuzz is not installed (cargo install cargo-fuzz)"
fi
