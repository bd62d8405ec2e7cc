//! Prints the verdict on this host's KVM.

fn main() {
    let started = std::time::Instant::now();
    let verdict = forkd_machine::probe::kvm();
    #[allow(clippy::print_stdout)]
    {
        println!("{verdict:?} after {:?}", started.elapsed());
    }
}
