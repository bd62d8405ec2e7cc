//! A Linux machine under QEMU with nested KVM, for hosts without usable KVM.
