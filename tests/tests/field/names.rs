//! N: one name, one owner.
