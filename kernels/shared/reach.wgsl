// Prefix sums over the 256 invocations of a workgroup, and where they reach a target. Must be
// called by the whole workgroup.

var<workgroup> lane_sums: array<vec2<u32>, 256>;
// The first part with which the sum reaches the target, or NEVER, and how much of it is needed.
var<workgroup> reached: u32;
var<workgroup> needed: vec2<u32>;

// The sum of the values of all invocations before this one. The total is in `lane_sums[255]` until
// the next scan.
fn scan(mine: vec2<u32>, local: u32) -> vec2<u32> {
    workgroupBarrier();
    lane_sums[local] = mine;
    workgroupBarrier();
    for (var step = 1u; step < 256u; step = step * 2u) {
        var before = vec2<u32>(0u);
        if (local >= step) {
            before = lane_sums[local - step];
        }
        workgroupBarrier();
        lane_sums[local] = plus(lane_sums[local], before);
        workgroupBarrier();
    }
    return minus(lane_sums[local], mine);
}

// Each invocation holds `count` consecutive parts. The target is not 0 and the same for all. The
// answer is in `reached` and `needed`.
fn reach(parts: ptr<function, array<vec2<u32>, 8>>, count: u32, goal: vec2<u32>, local: u32) {
    var sum = vec2<u32>(0u);
    for (var j = 0u; j < 8u; j++) {
        if (j < count) {
            sum = plus(sum, (*parts)[j]);
        }
    }
    let before = scan(sum, local);
    if (local == 0u) {
        reached = NEVER;
    }
    workgroupBarrier();
    if (less(before, goal) && !less(plus(before, sum), goal)) {
        var need = minus(goal, before);
        for (var j = 0u; j < 8u; j++) {
            if (j < count && !less((*parts)[j], need)) {
                reached = local * count + j;
                needed = need;
                break;
            }
            need = minus(need, (*parts)[j]);
        }
    }
    workgroupBarrier();
}
