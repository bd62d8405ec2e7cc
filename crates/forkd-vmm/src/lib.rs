//! One virtual machine: boot, vCPU threads, quiesce, save, restore, fork.
