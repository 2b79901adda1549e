//! SOAP, as far as vim25 needs it: requests are written by hand, replies are read as a small tree within limits.
//!
//! No derived deserialization: a value that is a reference has two attributes of the local name `type`, one of them
//! in a namespace, and elements that repeat need not stand together. Both are told apart by [`read`] alone.

mod fault;
mod read;
mod write;

pub use fault::Fault;
pub use read::{BYTES_MAX, DEPTH_MAX, ELEMENTS_MAX, Element, SoapError, body, read};
pub use write::{Moref, Request};
