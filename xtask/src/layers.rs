//! The layer check: who may import whom.
//!
//! Crates are listed from the ground up. A crate may import those above it in the list, that is,
//! nearer the ground; for some, single ones of those are forbidden too.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

/// All crates, ground first.
const ORDER: [&str; 19] = [
    "forkd-types",
    "forkd-proto",
    "forkd-kvm",
    "forkd-memory",
    "forkd-store",
    "forkd-jail",
    "forkd-devices",
    "forkd-vmm",
    "forkd-image",
    "forkd-net",
    "forkd-node",
    "forkd-api",
    "forkd-agent",
    "forkd-machine",
    "forkd-controller",
    "forkd-mcp",
    "forkd-cli",
    "forkd-testkit",
    "xtask",
];

/// Imports that the order would allow and that are wrong all the same, own crates and others.
const FORBIDDEN: [(&str, &[&str]); 12] = [
    ("forkd-types", &["tokio", "rustix", "libc"]),
    ("forkd-proto", &["tokio"]),
    ("forkd-kvm", &["forkd-memory", "forkd-proto", "tokio"]),
    ("forkd-memory", &["forkd-kvm", "forkd-proto", "kvm-ioctls", "kvm-bindings", "tokio"]),
    ("forkd-store", &["forkd-kvm", "kvm-ioctls", "kvm-bindings", "axum", "hyper"]),
    ("forkd-jail", &["forkd-kvm", "forkd-memory", "forkd-store", "tokio"]),
    ("forkd-devices", &["forkd-kvm", "kvm-ioctls", "kvm-bindings", "forkd-store", "tokio"]),
    ("forkd-vmm", &["tokio", "axum", "hyper", "forkd-store"]),
    ("forkd-node", &["axum", "hyper", "forkd-vmm", "forkd-kvm", "forkd-devices"]),
    ("forkd-api", &["forkd-vmm", "forkd-kvm", "forkd-devices"]),
    ("forkd-mcp", &["forkd-machine", "forkd-node", "forkd-api", "forkd-controller", "hyper"]),
    ("forkd-agent", &["forkd-kvm", "forkd-memory", "forkd-store", "forkd-devices", "forkd-vmm", "forkd-node"]),
];

/// Fails on the first run with every breach listed.
pub(crate) fn check() -> Result<()> {
    let metadata = MetadataCommand::new().exec().context("cannot read the workspace with cargo metadata")?;
    let rank: BTreeMap<&str, usize> = ORDER.iter().enumerate().map(|(rank, name)| (*name, rank)).collect();
    let mut breaches = Vec::new();
    for package in metadata.workspace_packages() {
        let name = package.name.as_str();
        let Some(own) = rank.get(name) else {
            breaches.push(format!("{name} has no place in the order; give it one in xtask/src/layers.rs"));
            continue;
        };
        let forbidden = FORBIDDEN.iter().find(|(from, _)| *from == name).map_or(&[][..], |(_, list)| list);
        for dependency in &package.dependencies {
            if dependency.kind == DependencyKind::Development {
                continue;
            }
            let to = dependency.name.as_str();
            if rank.get(to).is_some_and(|other| other >= own) {
                breaches.push(format!("{name} imports {to}, which is above it"));
            }
            if forbidden.contains(&to) {
                breaches.push(format!("{name} may not import {to}"));
            }
        }
    }
    if breaches.is_empty() {
        crate::say(&format!("layers: {} crates in order", metadata.workspace_packages().len()));
        return Ok(());
    }
    bail!("the layers are breached:\n  {}", breaches.join("\n  "));
}
