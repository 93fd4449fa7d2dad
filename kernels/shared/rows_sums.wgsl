// Four rows of weights times the packed activations of up to {most} tokens, which are `x_stride`
// vec4s apart. A weight is loaded and unpacked once for all tokens. Each token's sums are those that
// shared/pieces.wgsl computes for it alone: the same items in the same order in the same invocation.

// The workgroup's group of tokens: all tokens in as few groups as possible, of about the same size.
var<private> first_token: u32;
var<private> tokens: u32;

// Chooses the group of a workgroup. Returns its number among those of its group.
fn take_group(item: u32) -> u32 {
    let groups = (now.tokens + {most}u - 1u) / {most}u;
    let each = (now.tokens + groups - 1u) / groups;
    first_token = item % groups * each;
    tokens = min(each, now.tokens - min(first_token, now.tokens));
    return item / groups;
}

// By token: the sums of the four rows.
struct Sums {
//!repeat t in {most}
    s{t}: vec4<f32>,
//!end
}
