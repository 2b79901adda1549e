//! M: what a machine consists of.
