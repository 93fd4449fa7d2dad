// Cooperative matrices of 16 x 16 with subgroups of 32.
const BLOCK: u32 = 16u;
const LANES: u32 = 32u;
alias Weights = coop_mat16x16<f16, A>;
alias Inputs = coop_mat16x16<f16, B>;
alias Outputs = coop_mat16x16<f32, C>;
