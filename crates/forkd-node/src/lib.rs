//! Every sandbox of this host: zygotes, lifecycle, state database, adoption.
