//! N: one name, one owner.

mod by_hand;
