//! The weight formats that kernels are made for, and the functions that shared/pieces.wgsl needs
//! for the formats of one kernel.
//!
//! The table itself is the store's (src/store/formats.rs). A format's number in a kernel is its
//! index there.

use std::fmt::Write as _;

#[path = "../../store/formats.rs"]
mod table;

/// A row of the table.
struct Format {
    variant: &'static str,
    file: &'static str,
    block_len: u32,
    block_bytes: u32,
}

macro_rules! rows {
    ($($kind:ident {
        $($(#[$doc:meta])* $variant:ident $file:ident $name:literal $rdrr:literal $len:literal $bytes:literal,)*
    })*) => {
        const FORMATS: &[Format] = &[$($(Format {
            variant: stringify!($variant),
            file: stringify!($file),
            block_len: $len,
            block_bytes: $bytes,
        },)*)*];
    };
}

crate::formats!(rows);

macro_rules! pairs {
    ($($first:ident $second:ident,)*) => {
        const TOGETHER: &[[&str; 2]] = &[$([stringify!($first), stringify!($second)],)*];
    };
}

crate::formats_together!(pairs);

/// Stands for all formats, in a kernel that looks at the matrix's format.
const ANY: &str = "any";

/// Every format's name, as in the names of its files and kernels.
pub fn each() -> Vec<String> {
    FORMATS.iter().map(|format| format.file.to_owned()).collect()
}

/// What `//!for quantised` stands for: the formats that come in blocks.
pub fn quantised() -> Vec<String> {
    FORMATS.iter().filter(|f| f.block_len > 1).map(|f| f.file.to_owned()).collect()
}

/// What `//!for mixture` stands for: every format, and every pair that occurs together.
pub fn each_and_pairs() -> Vec<String> {
    let pairs = TOGETHER.iter().map(|pair| pair.map(|variant| of(variant).file).join("_"));
    each().into_iter().chain(pairs).collect()
}

/// What `//!for formats` stands for: those, and "any".
pub fn each_and_together() -> Vec<String> {
    each_and_pairs().into_iter().chain([ANY.to_owned()]).collect()
}

/// Sections to include for a choice of `each_and_together`, and WGSL that chooses among them.
pub fn pieces(choice: &str) -> (Vec<String>, String) {
    let among: Vec<(usize, &Format)> =
        FORMATS.iter().enumerate().filter(|(_, format)| is_among(choice, format)).collect();
    assert!(!among.is_empty(), "//!pieces {choice}: no such format");
    let sections = among.iter().map(|(_, format)| format!("formats/{}.wgsl#pieces", format.file));
    let width = among.iter().map(|(number, format)| (*number, format!("{}u", width(format))));
    let item = |(number, format): &(usize, &Format)| {
        (*number, format!("times_{0}(taken_{0}(m, row, i), a)", format.file))
    };
    let mut text = String::new();
    choose(&mut text, "fn width_of(m: Pieces) -> u32", width);
    let header = "fn item(m: Pieces, row: u32, i: u32, a: Acts) -> f32";
    choose(&mut text, header, among.iter().map(item));
    (sections.collect(), text)
}

/// Of each format of a choice the name, and WGSL that chooses among their functions `sums_FORMAT`
/// (shared/rows_sums.wgsl).
pub fn sums(choice: &str) -> (Vec<&'static str>, String) {
    let among = FORMATS.iter().enumerate().filter(|(_, format)| is_among(choice, format));
    let among: Vec<(usize, &Format)> = among.collect();
    let call = |(number, format): &(usize, &Format)| {
        (*number, format!("sums_{}(m, n, rows, x_stride, first, step)", format.file))
    };
    let mut text = String::new();
    let header = "fn sums(m: Pieces, n: Pieces, rows: vec4<u32>, x_stride: u32, first: u32, step: u32) -> Sums";
    choose(&mut text, header, among.iter().map(call));
    (among.iter().map(|(_, format)| format.file).collect(), text)
}

/// Writes a function whose value depends on the matrix's format. If all formats agree, it does not
/// look.
fn choose(text: &mut String, header: &str, values: impl Iterator<Item = (usize, String)>) {
    let mut cases: Vec<(String, Vec<String>)> = Vec::new();
    for (number, value) in values {
        match cases.iter_mut().find(|(known, _)| *known == value) {
            Some((_, numbers)) => numbers.push(format!("{number}u")),
            None => cases.push((value, vec![format!("{number}u")])),
        }
    }
    let (last, _) = cases.pop().expect("a kernel has a format");
    writeln!(text, "\n{header} {{").unwrap();
    if !cases.is_empty() {
        writeln!(text, "    switch m.format {{").unwrap();
        for (value, numbers) in cases {
            writeln!(text, "        case {}: {{", numbers.join(", ")).unwrap();
            writeln!(text, "            return {value};\n        }}").unwrap();
        }
        writeln!(text, "        default: {{\n        }}\n    }}").unwrap();
    }
    writeln!(text, "    return {last};\n}}").unwrap();
}

fn is_among(choice: &str, format: &Format) -> bool {
    let pair = |pair: &&[&str; 2]| pair.map(|variant| of(variant).file).join("_") == choice;
    let in_pair = |pair: &[&str; 2]| pair.contains(&format.variant);
    choice == ANY || choice == format.file || TOGETHER.iter().find(pair).is_some_and(in_pair)
}

fn of(variant: &str) -> &'static Format {
    let named = FORMATS.iter().find(|format| format.variant == variant);
    named.unwrap_or_else(|| panic!("formats_together! names {variant}, which is no format"))
}

/// Weights that an invocation takes at once: a piece, or for plain formats and FP8 those of a vec4.
fn width(format: &Format) -> u32 {
    match format.variant {
        "Fp8" => 16,
        _ if format.block_len > 1 => 32,
        _ => 16 / format.block_bytes,
    }
}
