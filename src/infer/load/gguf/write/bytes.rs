//! A GGUF header as bytes: metadata, the list of tensors, and where each tensor begins.

/// A metadata value that is written.
#[derive(Debug, Clone, PartialEq)]
pub enum Meta {
    Number(u32),
    Float(f32),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Numbers(Vec<i32>),
}

impl Meta {
    /// The format's number of its type.
    const fn kind(&self) -> u32 {
        match self {
            Self::Number(_) => 4,
            Self::Float(_) => 6,
            Self::Flag(_) => 7,
            Self::Text(_) => 8,
            Self::Texts(_) | Self::Floats(_) | Self::Numbers(_) => 9,
        }
    }
}

/// A tensor as a header lists it: name, shape with the outermost dimension first, type, bytes.
pub type Listed = (String, Vec<u64>, u32, u64);

/// The header of a file of version 3 with these tensors, padded to `alignment`; each tensor's place behind it; and the bytes of the whole file.
pub fn header(
    metadata: &[(String, Meta)],
    tensors: &[Listed],
    alignment: u64,
) -> (Vec<u8>, Vec<u64>, u64) {
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(value.kind().to_le_bytes());
        self::value(&mut out, value);
    }
    let (mut offsets, mut end) = (Vec::with_capacity(tensors.len()), 0_u64);
    for (name, shape, kind, bytes) in tensors {
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|dim| out.extend(dim.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        let offset = end.next_multiple_of(alignment);
        out.extend(offset.to_le_bytes());
        offsets.push(offset);
        end = offset + bytes;
    }
    out.resize(out.len().next_multiple_of(alignment as usize), 0);
    let bytes = out.len() as u64 + end;
    (out, offsets, bytes)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn value(out: &mut Vec<u8>, value: &Meta) {
    let mut list = |kind: u32, count: usize| {
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Meta::Number(number) => out.extend(number.to_le_bytes()),
        Meta::Float(float) => out.extend(float.to_le_bytes()),
        Meta::Flag(flag) => out.push(u8::from(*flag)),
        Meta::Text(value) => text(out, value),
        Meta::Texts(texts) => {
            list(8, texts.len());
            texts.iter().for_each(|one| text(out, one));
        }
        Meta::Floats(floats) => {
            list(6, floats.len());
            floats.iter().for_each(|one| out.extend(one.to_le_bytes()));
        }
        Meta::Numbers(numbers) => {
            list(5, numbers.len());
            numbers.iter().for_each(|one| out.extend(one.to_le_bytes()));
        }
    }
}
