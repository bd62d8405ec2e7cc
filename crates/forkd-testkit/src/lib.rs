//! Tests on real virtual machines, written as prose.
