// The end of a choice: where the token is written, and what is remembered of it.

// For one invocation to call if the step was not halted and a logit is not finite: no token is
// chosen and nothing is remembered. Steps that are queued behind it get a valid token.
fn refuse() {
    tokens[0] = 0u;
    chosen[0] = NEVER;
}

// For one invocation to call if the step was not halted.
fn accept(token: u32) {
    tokens[0] = token;
    chosen[0] = token;
    if (params.window > 0u) {
        let accepted = memory[ACCEPTED];
        memory[RING + accepted % params.window] = token;
        memory[ACCEPTED] = accepted + 1u;
    }
}
