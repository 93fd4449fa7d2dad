//! Weight formats: to and from f32, row by row. A format a file.
