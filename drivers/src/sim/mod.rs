//! The built-in simulated hypervisor.
