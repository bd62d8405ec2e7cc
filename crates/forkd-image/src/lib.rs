//! Root disks, guest kernels and initramfs images from what a user has.
