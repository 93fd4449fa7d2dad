//! Families: shapes, names and refusals.
