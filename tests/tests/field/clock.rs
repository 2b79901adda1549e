//! T: clocks that are wrong, and clocks that leap.
