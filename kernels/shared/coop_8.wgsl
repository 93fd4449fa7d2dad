// Cooperative matrices of 8 x 8 with subgroups of 8, for software adapters.
const BLOCK: u32 = 8u;
const LANES: u32 = 8u;
alias Weights = coop_mat8x8<f16, A>;
alias Inputs = coop_mat8x8<f16, B>;
alias Outputs = coop_mat8x8<f32, C>;
