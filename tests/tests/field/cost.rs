//! C: cost that must not grow with what ever happened.
