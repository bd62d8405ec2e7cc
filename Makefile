# make demo   install what is missing, build, fork a warmed Linux microVM into ten copies
# make test   install what is missing, run every check and every test
# make build  the programs, in target/forkd/

SHELL := /bin/bash
.DEFAULT_GOAL := build

TARGET := x86_64-unknown-linux-gnu
BIN := target/forkd
PROGRAMS := forkd forkd-controller forkd-vmm
UNIT := --workspace --locked --exclude forkd-testkit

.PHONY: demo test build check unit unit-programs vm fuzz fuzz-programs clean

demo:
	@scripts/install-dependencies run
	@$(MAKE) --no-print-directory build
	@$(BIN)/forkd quickstart --yes

test:
	@scripts/install-dependencies run test
	@$(MAKE) --no-print-directory --jobs=2 check build unit-programs fuzz-programs
	@$(MAKE) --no-print-directory unit vm fuzz

# One folder with the four programs side by side, the way they are installed.
build:
	cargo build --release --locked $(addprefix --bin ,$(PROGRAMS))
	cargo build --profile agent --locked --package forkd-agent
	@install -D -t $(BIN) $(addprefix target/$(TARGET)/release/,$(PROGRAMS)) target/$(TARGET)/agent/forkd-agent

check:
	cargo fmt --all --check
	cargo xtask layers
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --workspace --no-deps --document-private-items --locked
	cargo deny --offline check bans licenses sources

unit:
	cargo xtask test $(UNIT)

unit-programs:
	cargo test --no-run $(UNIT)

# Tests on real virtual machines, with the programs of `make build`; inside `forkd machine` where
# this host's KVM cannot run Linux.
vm:
	RUST_BACKTRACE=0 FORKD_BIN_DIR=$(CURDIR)/$(BIN) cargo test --locked --package forkd-testkit -- --test-threads=2

fuzz:
	@scripts/fuzz 15

fuzz-programs:
	@scripts/fuzz build

clean:
	cargo clean
