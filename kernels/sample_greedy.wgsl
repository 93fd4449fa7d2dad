// Greedy sampling, the last pass: the highest of the chunks' highest keys; among equals, the lowest
// token. Chooses no token if a logit is not finite.
// Grid: one workgroup.
//!include shared/odds.wgsl
//!include shared/highest.wgsl
//!include shared/chosen.wgsl

@group(1) @binding(0) var<storage, read> parts: array<u32>;
@group(1) @binding(1) var<storage, read> state: array<u32>;
@group(1) @binding(2) var<storage, read_write> memory: array<u32>;
@group(1) @binding(3) var<storage, read_write> tokens: array<u32>;
@group(1) @binding(4) var<storage, read_write> chosen: array<u32>;

var<workgroup> non_finite: atomic<u32>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
    if (local == 0u) {
        atomicStore(&non_finite, 0u);
    }
    workgroupBarrier();
    var key = 0u;
    var token = NEVER;
    if (local * CHUNK < params.vocab) {
        key = parts[local * PART];
        token = parts[local * PART + 1u];
        atomicOr(&non_finite, parts[local * PART + NON_FINITE]);
    }
    let best = highest(key, token, local);
    if (local == 0u && state[0] == 0u) {
        if (atomicLoad(&non_finite) != 0u) {
            refuse();
        } else {
            accept(best.y);
        }
    }
}
