//! R: whether a machine runs.
