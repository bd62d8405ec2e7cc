//! The kernel command line that the machine needs.

/// What every guest gets:
/// - the serial console, because there is no other, with one port so that no time goes into probing;
/// - `panic=-1` and `reboot=t`: a panic ends the machine at once instead of leaving it hanging;
/// - `pci=off`: there is no PCI bus to look for;
/// - `random.trust_cpu=on`: the generator is seeded before the agent starts;
/// - `tsc=reliable no_timer_check`: there is no second clock to check the counter against;
/// - `rcupdate.rcu_expedited=1`: namespaces and mounts come and go fast on a machine of few vCPUs;
/// - an idle guest sleeps: KFENCE's sampling (ten wake-ups a second, each patching kernel code), proactive
///   compaction (two) and per-second statistics are what a hundred idle copies would spend their
///   host's time on.
const BASE: &str = "console=ttyS0 8250.nr_uarts=1 panic=-1 reboot=t pci=off random.trust_cpu=on tsc=reliable \
                    no_timer_check rcupdate.rcu_expedited=1 cryptomgr.notests kfence.sample_interval=0 \
                    sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=10";

/// Tells the agent where the root file system is.
const ROOT: &str = "forkd.root=/dev/vda forkd.rootfstype=ext4";

/// The whole command line; `extra` comes last, so that it wins.
pub(super) fn compose(extra: &str, has_disk: bool) -> String {
    let parts = [BASE, if has_disk { ROOT } else { "" }, extra.trim()];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_adds_comes_last() {
        assert_eq!(compose(" quiet ", false), format!("{BASE} quiet"));
        assert_eq!(compose("", true), format!("{BASE} {ROOT}"));
    }
}
