//! From files to weights: Hugging Face checkpoints in, RDRR out, and back in.
