//! Composes the WGSL kernels of `kernels/`, validates them and writes a table of them.
//!
//! A kernel file is plain WGSL; comment lines direct its composition (build/compose.rs):
//! - `//!for NAME in A B C`: one kernel for each choice; its name gets the suffix `_A`, in the
//!   order of these lines, and `{NAME}` becomes `A` in the kernel's text. Without such a
//!   line there is one kernel, named after the file.
//!   A choice `-A` stands for `A` too, but the kernel's name gets no suffix.
//! - `//!for format`: one kernel for each weight format of the table (src/store/formats.rs).
//!   `//!for quantised`: for each that comes in blocks.
//!   `//!for mixture`: also one for each pair of formats that occur together. `//!for formats`: also
//!   one that reads any format.
//! - `//!needs coopmat f16`: the kernel uses cooperative matrices of f16. It is created only on
//!   adapters that have them, and may use the 48 KiB of workgroup memory that such adapters offer.
//! - `//!include PATH`: inserts the text of `kernels/PATH`, once per kernel however often it is
//!   named. Included files may include others. `PATH#NAME` is the part of the file after its line
//!   `//!section NAME`, up to the next such line.
//! - `//!pieces {formats}`: inserts the `pieces` sections of the formats named, and functions that
//!   choose among them by the matrix's format (build/formats.rs).
//! - `//!sums {formats}`: inserts shared/rows_sums.wgsl, for each format named a function of
//!   shared/rows_sums_of.wgsl with the format's name for `{each}`, and one that chooses among them.
//! - `//!repeat NAME in COUNT` to `//!end`: the lines in between for each `{NAME}` from 0 to
//!   COUNT - 1. They may contain other repetitions, but no other directives.
//! - `//!needs subgroups`, in the kernel's file or an included one: the kernel may use subgroup
//!   operations, and is created only on adapters that have them.
//!
//! Every other kernel must pass naga's validation with no other extension
//! (the portable WebGPU core), keep to the portable limits, and follow the binding
//! convention: group 0 holds the step (0) and the kernel's parameters (1), both
//! uniform; group 1 holds storage buffers numbered from 0. Anything else fails the build.
//!
//! The uniforms' structs are emitted as Rust (`build/params.rs`). `Params` is named after the file
//! that declares it.

#[path = "build/compose.rs"]
mod compose;
#[path = "build/formats.rs"]
mod formats;
#[path = "build/params.rs"]
mod params;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, StorageAccess};

use compose::{Composed, compose_all};
use params::Structs;

/// WebGPU's default `maxStorageBuffersPerShaderStage`.
const STORAGE_BUFFERS_MAX: usize = 8;
/// WebGPU's default `maxComputeInvocationsPerWorkgroup`.
const WORKGROUP_MAX: u32 = 256;
/// WebGPU's default `maxComputeWorkgroupStorageSize`.
const WORKGROUP_BYTES_MAX: u32 = 16 << 10;
/// What kernels on cooperative matrices may take (`COOPERATIVE_BYTES` in src/infer/gpu/device.rs).
const COOPERATIVE_BYTES_MAX: u32 = 48 << 10;
/// One slot of the parameter arena (`ARENA_SLOT` in src/infer/gpu/params.rs).
const PARAMS_MAX: u32 = 256;

/// `unpack2x16float` is WebGPU core; naga makes it a capability for WebGL's sake.
const PORTABLE: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

/// What `//!needs coopmat f16` adds.
const COOPERATIVE: Capabilities = Capabilities::COOPERATIVE_MATRIX
    .union(Capabilities::SHADER_FLOAT16)
    .union(Capabilities::SHADER_INT16);

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../kernels");
    println!("cargo:rerun-if-changed={}", root.display());
    let mut files: Vec<PathBuf> = fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("kernels: {e}"))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "wgsl"))
        .collect();
    files.sort();
    let mut table =
        String::from("/// Every kernel, by rising name.\npub static KERNELS: &[Kernel] = &[\n");
    let mut structs = Structs::default();
    let mut composed: Vec<Composed> =
        files.iter().flat_map(|file| compose_all(&root, file)).collect();
    composed.sort_by(|a, b| a.name.cmp(&b.name));
    for kernel in &composed {
        emit(&mut table, &mut structs, kernel);
    }
    table.push_str("];\n");
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    fs::write(out.join("kernels.rs"), table).unwrap();
    fs::write(out.join("params.rs"), structs.text()).unwrap();
}

/// Validates one kernel, and appends its entry of the table and the structs of its uniforms.
fn emit(table: &mut String, structs: &mut Structs, kernel: &Composed) {
    let Composed { name, source, subgroups, cooperative, .. } = kernel;
    let module = naga::front::wgsl::parse_str(source)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    let (mut capabilities, workgroup_bytes_max) = if *cooperative {
        (PORTABLE | COOPERATIVE, COOPERATIVE_BYTES_MAX)
    } else {
        (PORTABLE, WORKGROUP_BYTES_MAX)
    };
    capabilities.set(Capabilities::SUBGROUP, *subgroups);
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    drop(info);
    assert_eq!(module.entry_points.len(), 1, "{name}: one entry point");
    let entry = &module.entry_points[0];
    assert_eq!(entry.name, "main", "{name}: the entry point is main");
    let workgroup: u32 = entry.workgroup_size.iter().product();
    assert!(workgroup <= WORKGROUP_MAX, "{name}: a workgroup of {workgroup}");
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();

    let mut storage: Vec<(u32, String, bool)> = Vec::new();
    let (mut params, mut params_name) = (0, String::new());
    let mut workgroup_bytes = 0;
    for (_, global) in module.global_variables.iter() {
        if global.space == AddressSpace::WorkGroup {
            workgroup_bytes += layouter[global.ty].size.next_multiple_of(16);
        }
        let Some(binding) = global.binding else { continue };
        let label = global.name.clone().unwrap_or_default();
        match (binding.group, binding.binding, global.space) {
            (0, 0 | 1, AddressSpace::Uniform) => {
                let uniform = structs.take(&module, &layouter, &kernel.structs, global.ty);
                if binding.binding == 1 {
                    (params, params_name) = (layouter[global.ty].size, uniform);
                }
            }
            (1, index, AddressSpace::Storage { access }) => {
                storage.push((index, label, access.contains(StorageAccess::STORE)));
            }
            (group, index, space) => {
                panic!("{name}: {label} at group {group}, binding {index} in {space:?}")
            }
        }
    }
    storage.sort();
    assert!(workgroup_bytes <= workgroup_bytes_max, "{name}: {workgroup_bytes} bytes of workgroup");
    assert!((1..=PARAMS_MAX).contains(&params), "{name}: {params} bytes of parameters");
    assert!(storage.len() <= STORAGE_BUFFERS_MAX, "{name}: {} storage buffers", storage.len());
    for (place, (index, label, _)) in storage.iter().enumerate() {
        assert_eq!(place, *index as usize, "{name}: {label} leaves a gap in group 1");
    }
    writeln!(table, "    Kernel {{\n        name: {name:?},\n        source: {source:?},").unwrap();
    writeln!(table, "        cooperative: {cooperative},\n        subgroups: {subgroups},")
        .unwrap();
    writeln!(table, "        params: {params_name:?},\n        params_bytes: {params},").unwrap();
    writeln!(table, "        storage: &[").unwrap();
    for (_, label, write) in &storage {
        writeln!(table, "            Storage {{ name: {label:?}, write: {write} }},").unwrap();
    }
    writeln!(table, "        ],\n    }},").unwrap();
}
