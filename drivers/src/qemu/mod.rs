//! QEMU/KVM on disk images of this host.
