// Looks up the slots of the experts that route.wgsl has chosen for one token in a layer. The choice
// is written to the state. If an expert has no slot, the step is halted, as in decode_route.wgsl;
// the kernels that follow then run with the experts that have slots, or with none, and their
// results are not used. Uses no barrier, for software adapters.
// Grid: one workgroup, of which one invocation works.
//!include shared/step.wgsl

struct Params {
    top_k: u32,
    // Where the layer's row begins in slot_table.
    table_at: u32,
    // Where the layer's choices are written in `state`.
    ids_at: u32,
    // The value of word 0 of the state after a miss.
    halt: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> ids: array<u32>;
@group(1) @binding(1) var<storage, read> slot_table: array<u32>;
// Word 0: 0, or the layer that halted, counted from 1. Word 2: the position of the halted step,
// counted from 1. Then the chosen ids.
@group(1) @binding(2) var<storage, read_write> state: array<u32>;

const EMPTY: u32 = 0xffffffffu;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) local: u32) {
    if (local != 0u || state[0] != 0u) {
        return;
    }
    let top_k = min(params.top_k, arrayLength(&ids));
    var missing = false;
    for (var j = 0u; j < top_k; j++) {
        let id = ids[j];
        state[params.ids_at + j] = id;
        missing = missing || slot_table[params.table_at + id] == EMPTY;
    }
    if (missing) {
        state[0] = params.halt;
        state[2] = now.position + 1u;
    }
}
