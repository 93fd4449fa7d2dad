//! Reference outputs of Transformers, on the CPU backend.

use super::check::{Expected, REL_MAX, check};
use super::cpu::CpuDevice;
use super::session::{Session, SessionOptions};
use super::testing::{checkpoint, shared};
use crate::store::DType;

fn run(name: &str, batch: usize) {
    let Some(dir) = shared(&format!("goldens/{name}")) else { return };
    let model = checkpoint(&dir, |_| DType::Bf16);
    let expected = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = Expected::parse(&expected).unwrap();
    let options = SessionOptions { context: Some(96), batch, ..SessionOptions::default() };
    let mut session = Session::new(&model, &CpuDevice, &options).unwrap();
    let report = check(&mut session, &expected).unwrap();
    println!("{name}, batch {batch}: {report:?}");
    assert!(report.rel <= REL_MAX && report.passes(), "{name}, batch {batch}: {report:?}");
}

macro_rules! goldens {
    ($($test:ident: $name:literal),+ $(,)?) => {$(
        #[test]
        fn $test() {
            run($name, 64);
            run($name, 7);
            run($name, 1);
        }
    )+};
}

goldens! {
    llama3: "llama3",
    llama3_tied: "llama3-tied",
    mistral_with_a_window: "mistral",
    qwen3: "qwen3",
    mixtral: "mixtral",
    mixtral_256: "mixtral-256",
    qwen3_moe: "qwen3-moe",
}
