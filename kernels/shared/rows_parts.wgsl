// By team, token and row: the team's sum.
var<workgroup> parts: array<f32, 32 * {most}>;

fn part_at(team: u32, token: u32, row: u32) -> u32 {
    return (team * {most}u + token) * 4u + row;
}
//!include shared/rows_parts_{team}.wgsl
