// An expert's score before it is divided by a total: the sigmoid of its logit, or its part of a
// softmax.
fn scored(logit: f32, highest: f32, sigmoid: u32) -> f32 {
    if (sigmoid == 1u) {
        return 1.0 / (1.0 + exp(-logit));
    }
    return exp(logit - highest);
}
