// The highest key of the 256 invocations of a workgroup, and its token; among equals, the lowest
// token.

var<workgroup> lane_keys: array<u32, 256>;
var<workgroup> lane_tokens: array<u32, 256>;

// (key, token), in every invocation. Must be reached by the whole workgroup.
fn highest(key: u32, token: u32, local: u32) -> vec2<u32> {
    lane_keys[local] = key;
    lane_tokens[local] = token;
    workgroupBarrier();
    for (var width = 128u; width > 0u; width = width / 2u) {
        if (local < width) {
            let other = lane_keys[local + width];
            let equal = other == lane_keys[local];
            if (other > lane_keys[local] || (equal && lane_tokens[local + width] < lane_tokens[local])) {
                lane_keys[local] = other;
                lane_tokens[local] = lane_tokens[local + width];
            }
        }
        workgroupBarrier();
    }
    return vec2<u32>(lane_keys[0], lane_tokens[0]);
}
