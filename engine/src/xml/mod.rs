//! libvirt's `<domainsnapshot>`, in and out.
