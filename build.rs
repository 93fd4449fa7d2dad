//! Compiles `proto/` and validates `kernels/`; emits Rust for both into OUT_DIR.

#[path = "build/kernels.rs"]
mod kernels;
#[path = "build/proto.rs"]
mod proto;

fn main() {
    proto::compile();
    kernels::compile();
}
