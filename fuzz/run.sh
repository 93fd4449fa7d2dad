#!/usr/bin/env bash
# Fuzzes every target, or those named: fuzz/run.sh [SECONDS] [TARGET]...
# Needs cargo-fuzz and a nightly toolchain, or any toolchain and RUSTC_BOOTSTRAP=1.
# Starts from the samples of tests/parts/hostile.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
targets=("${@:2}")
if ((${#targets[@]} == 0)); then
    mapfile -t targets < <(sed -n 's/^name = "\(.*\)"/\1/p' fuzz/Cargo.toml | tail -n +2)
fi
toolchain=(+nightly)
if [ -n "${RUSTC_BOOTSTRAP:-}" ]; then toolchain=(); fi
# Use the dependency versions that the node is built with.
cp Cargo.lock fuzz/Cargo.lock
DOPPLER_FUZZ_CORPUS="$PWD/fuzz/corpus" cargo test --release --workspace --locked --test parts hostile::mutate
for target in "${targets[@]}"; do
    cargo "${toolchain[@]}" fuzz run "$target" -- -max_total_time="$seconds" -print_final_stats=1
done
