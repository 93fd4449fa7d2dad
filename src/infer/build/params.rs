//! Rust structs for the kernels' uniforms, with the names, types and padding that naga gives them.
//!
//! One `#[repr(C)]` struct a WGSL struct; `Params` is named after the file that declares it
//! (`decode_linear.wgsl`: `DecodeLinear`; `shared/linear_params.wgsl`: `Linear`). Refuses what our
//! kernels do not need: matrices, arrays with padded elements, types other than 32-bit numbers.
//! Invariant: structs of the same name are the same struct.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use naga::proc::Layouter;
use naga::{ArraySize, Handle, Module, ScalarKind, Type, TypeInner};

/// The structs seen so far: their Rust text, by name.
#[derive(Default)]
pub struct Structs(BTreeMap<String, String>);

impl Structs {
    /// Adds a uniform's struct and the structs within it. Returns its name in Rust. `files` says
    /// where each struct is declared.
    pub fn take(
        &mut self,
        module: &Module,
        layouter: &Layouter,
        files: &BTreeMap<String, String>,
        ty: Handle<Type>,
    ) -> String {
        let within = Within { module, layouter, files };
        assert!(
            matches!(module.types[ty].inner, TypeInner::Struct { .. }),
            "a uniform is a struct"
        );
        self.rust(within, ty)
    }

    /// All of them.
    pub fn text(&self) -> String {
        self.0.values().flat_map(|text| [text.as_str(), "\n"]).collect()
    }

    /// The Rust type with the same memory layout.
    fn rust(&mut self, within: Within<'_>, ty: Handle<Type>) -> String {
        match &within.module.types[ty].inner {
            TypeInner::Scalar(scalar) => number(*scalar).to_owned(),
            TypeInner::Vector { size, scalar } => {
                format!("[{}; {}]", number(*scalar), *size as usize)
            }
            TypeInner::Array { base, size: ArraySize::Constant(count), stride } => {
                assert_eq!(within.layouter[*base].size, *stride, "an array of padded elements");
                format!("[{}; {count}]", self.rust(within, *base))
            }
            TypeInner::Struct { members, span } => self.structure(within, ty, members, *span),
            other => panic!("a uniform holds {other:?}, which Rust has no plain type for"),
        }
    }

    fn structure(
        &mut self,
        within: Within<'_>,
        ty: Handle<Type>,
        members: &[naga::StructMember],
        span: u32,
    ) -> String {
        let declared = within.module.types[ty].name.as_deref().unwrap_or_default();
        let file = &within.files[declared];
        let name = if declared == "Params" { type_name(file) } else { declared.to_owned() };
        let mut text = format!(
            "/// `{declared}` of kernels/{file}\n\
             #[derive(Debug, Clone, Copy, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]\n\
             #[repr(C)]\npub struct {name} {{\n",
        );
        let (mut at, mut pads) = (0, 0);
        let mut pad = |text: &mut String, from: u32, to: u32| {
            if to > from {
                writeln!(text, "    pub pad_{pads}: [u32; {}],", (to - from) / 4).unwrap();
                pads += 1;
            }
        };
        for member in members {
            let field = member.name.as_deref().expect("a field has a name");
            pad(&mut text, at, member.offset);
            writeln!(text, "    pub {field}: {},", self.rust(within, member.ty)).unwrap();
            at = member.offset + within.layouter[member.ty].size;
        }
        pad(&mut text, at, span);
        text.push_str("}\n");
        if declared == "Params" {
            let of = format!("impl Params for {name} {{\n    const NAME: &str = {name:?};\n}}\n");
            text.push_str(&of);
        }
        if let Some(known) = self.0.insert(name.clone(), text.clone()) {
            assert_eq!(known, text, "two structs are called {name}");
        }
        name
    }
}

/// Where the types of one kernel are looked up.
#[derive(Clone, Copy)]
struct Within<'a> {
    module: &'a Module,
    layouter: &'a Layouter,
    files: &'a BTreeMap<String, String>,
}

fn number(scalar: naga::Scalar) -> &'static str {
    match (scalar.kind, scalar.width) {
        (ScalarKind::Uint, 4) => "u32",
        (ScalarKind::Sint, 4) => "i32",
        (ScalarKind::Float, 4) => "f32",
        _ => panic!("a uniform holds {scalar:?}, which is not a 32-bit number"),
    }
}

/// A file as a type's name: `decode_linear.wgsl` is `DecodeLinear`, `shared/linear_params.wgsl` `Linear`.
fn type_name(file: &str) -> String {
    let stem = file.rsplit('/').next().unwrap_or(file).trim_end_matches(".wgsl");
    let stem = stem.strip_suffix("_params").unwrap_or(stem);
    let word = |word: &str| {
        let (first, rest) = word.split_at(word.len().min(1));
        first.to_ascii_uppercase() + rest
    };
    stem.split('_').map(word).collect()
}
