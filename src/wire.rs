//! The prost types of `proto/` and their conversions, nothing else.
