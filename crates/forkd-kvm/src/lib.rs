//! The KVM calls a monitor uses, with their set-up order enforced by types.
