//! The CPU backend: one twin a kernel, same name, same bindings.
