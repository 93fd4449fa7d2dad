// Groups of neighbouring experts, of which a token chooses from the best (at most 32 groups).

// The two largest scores seen so far.
fn best_two(best: vec2<f32>, score: f32) -> vec2<f32> {
    return vec2<f32>(max(best.x, score), max(best.y, min(best.x, score)));
}

const NO_SCORES: vec2<f32> = vec2<f32>(-3.0e38, -3.0e38);
