//! Compiles `proto/` and validates `kernels/`; emits Rust for both into OUT_DIR. Tells
//! the crate its commit.

#[path = "build/commit.rs"]
mod commit;
#[path = "build/kernels.rs"]
mod kernels;
#[path = "build/proto.rs"]
mod proto;

fn main() {
    proto::compile();
    kernels::compile();
    commit::emit();
}
