//! Model families: each file turns a checkpoint's config into the op list.
