//! The devices a guest sees; every guest-fed parser is small, pure and fuzzed.
