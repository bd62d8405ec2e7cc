//! The processor that guests of this host see, as far as `/proc/cpuinfo` tells.

use forkd_store::CpuFacts;

/// Flags that tell how many processors the host has and how they are arranged. They are no abilities:
/// a guest is told of its own topology.
const TOPOLOGY: [&str; 5] = ["amd_dcm", "cmp_legacy", "ht", "nodeid_msr", "xtopology"];

/// What this host's first processor is and can do.
pub(crate) fn host() -> std::io::Result<CpuFacts> {
    Ok(parse(&std::fs::read_to_string("/proc/cpuinfo")?))
}

/// Features that `needed` has and `host` lacks, sorted. Snapshots may list topology flags too.
pub(crate) fn missing<'a>(needed: &'a CpuFacts, host: &CpuFacts) -> Vec<&'a str> {
    let lacks = |feature: &&String| !host.features.contains(feature) && is_ability(feature);
    needed.features.iter().filter(lacks).map(String::as_str).collect()
}

fn is_ability(flag: &str) -> bool {
    !TOPOLOGY.contains(&flag)
}

fn parse(cpuinfo: &str) -> CpuFacts {
    let mut facts = CpuFacts::default();
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    for (key, value) in first.lines().filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match key.trim() {
            "vendor_id" => value.clone_into(&mut facts.vendor),
            "cpu family" => facts.family = value.parse().unwrap_or_default(),
            "model" => facts.model = value.parse().unwrap_or_default(),
            "stepping" => facts.stepping = value.parse().unwrap_or_default(),
            "flags" => {
                let abilities = value.split_ascii_whitespace().filter(|flag| is_ability(flag));
                facts.features = abilities.map(str::to_owned).collect();
            }
            _ => {}
        }
    }
    facts.features.sort();
    facts.features.dedup();
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processor_is_described() {
        let text = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: EPYC\n\
                    stepping\t: 1\nflags\t\t: sse2 avx2 fpu\n\nprocessor\t: 1\nvendor_id\t: Other\nflags\t: none\n";
        let facts = parse(text);
        assert_eq!((facts.vendor.as_str(), facts.family, facts.model, facts.stepping), ("AuthenticAMD", 25, 17, 1));
        assert_eq!(facts.features, ["avx2", "fpu", "sse2"]);
        let host = CpuFacts { features: vec!["fpu".into(), "sse2".into()], ..CpuFacts::default() };
        assert_eq!(missing(&facts, &host), ["avx2"]);
    }

    #[test]
    fn how_many_processors_the_host_has_is_neither_recorded_nor_compared() {
        let facts = parse("vendor_id\t: AuthenticAMD\nflags\t\t: fpu ht cmp_legacy xtopology\n");
        assert_eq!(facts.features, ["fpu"]);
        // As snapshots have recorded it.
        let recorded = CpuFacts { features: ["cmp_legacy", "fpu", "ht"].map(str::to_owned).into(), ..facts.clone() };
        assert_eq!(missing(&recorded, &facts), Vec::<&str>::new());
        assert_eq!(missing(&recorded, &CpuFacts::default()), ["fpu"]);
    }
}
