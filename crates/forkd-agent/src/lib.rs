//! PID 1 and agent inside a guest.
