# SPDX-License-Identifier: GPL-2.0-or-later
# Everything is built in $(FPH_CACHE), ~/.cache/free-page-hint if it is not set. "make help" lists
# the targets.

FPH_CACHE := $(or $(FPH_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/free-page-hint)
JOBS ?= $(shell nproc)
export FPH_CACHE JOBS

DEMO_OPTIONS = $(if $(STOCK),--stock) $(if $(MEM),--mem $(MEM)) $(if $(VCPUS),--vcpus $(VCPUS)) \
	$(if $(RUNS),--runs $(RUNS))
BENCH_OPTIONS = $(if $(SCENARIO),--scenario $(foreach name,$(SCENARIO),'$(name)')) $(if $(MODE),--mode $(MODE)) \
	$(if $(RUNS),--runs $(RUNS)) $(if $(MEM),--mem $(MEM)) $(if $(VCPUS),--vcpus $(VCPUS)) \
	$(if $(FRESH),--fresh)
CODE_DIRS = $(wildcard .ci scripts tests bench)
PYTHON_FILES = $(shell find $(CODE_DIRS) -name '*.py'; grep -rlI '^\#!/usr/bin/python3' $(CODE_DIRS))
SHELL_FILES = scripts/common.sh scripts/sources.sh scripts/suites.sh scripts/packages.sh packaging/guest/load-balloon packaging/guest/dkms/check-space \
	packaging/guest/dkms/dkms.conf packaging/trial/debian/qemu-system-x86-fph.postinst \
	packaging/completion/fph \
	$(shell grep -rlI '^\#!/bin/bash' $(CODE_DIRS))

TREES = qemu kernel libvirt
# The trees that the series of BASE are of: qemu=10.2 kernel=7.3 libvirt=11.3
BASES = $(foreach base,$(BASE),$(or $(patsubst %/patches/$(base),%=$(base),$(wildcard $(TREES:=/patches/$(base)))),\
	$(error there are no patches for $(base): see qemu/patches, kernel/patches and libvirt/patches)))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help deps fetch qemu qemu-stock qemu-checked qemu-debug qemu-floor kernel kernel-stock kernel-debug kernel-kvm kernel-xfs libvirt images other-guests debian-image stock-guests stock-hosts guest-deb trial-deb host-source host-deb release run migrate demo \
	bench bench-quick bench-build bench-report check test arm64 unit model test-long test-packages hostile fuzz lint patches check-patches baselines \
	clean distclean

help: ## list the targets
	@echo "make TARGET [JOBS=n] [FPH_CACHE=dir]"
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

deps: ## install the Debian packages that are missing (as root)
	@scripts/install-deps

fetch: deps ## get the sources of QEMU 10.0 and Linux 6.12 from Debian
	@scripts/fetch

qemu: fetch ## build QEMU with free page hints
	@scripts/build-qemu ours

qemu-stock: fetch ## build the unpatched QEMU, to compare with
	@scripts/build-qemu stock

qemu-checked: fetch ## build QEMU with the checks of hints, for tests
	@scripts/build-qemu checked

qemu-floor: fetch
	@scripts/build-qemu floor

qemu-debug: fetch ## build QEMU with sanitizers and all checks, for tests
	@scripts/build-qemu debug

kernel: fetch ## build the guest kernel with free page hints
	@scripts/build-kernel ours

kernel-stock: fetch ## build the unpatched guest kernel, to compare with
	@scripts/build-kernel stock

kernel-debug: fetch ## build the guest kernel with lockdep, KASAN and more, for tests
	@scripts/build-kernel debug

kernel-kvm: fetch ## build the guest kernel for tests under KVM, also where it is interpreted
	@scripts/build-kernel kvm

libvirt: deps ## build libvirt with free page hints
	@scripts/install-deps libvirt-build
	@scripts/fetch libvirt
	@scripts/build-libvirt ours

images: deps ## make the guest's initramfs and the bare-metal guest
	@scripts/make-initramfs
	@scripts/make-bare-metal

other-guests: deps ## get guests that are not ours from Debian: memtest86+, GRUB, iPXE, its kernel
	@scripts/make-other-guests

debian-image: deps ## make a Debian guest image with gcc, make and sysbench
	@scripts/make-debian-image

stock-guests: deps ## make Debian guests with their own kernels, to install the guest package in
	@scripts/make-stock-guest bookworm
	@scripts/make-stock-guest trixie
	@scripts/make-stock-guest trixie-backports

stock-hosts: deps ## make Debian hosts with libvirt, to install our QEMU in
	@scripts/make-stock-host bookworm
	@scripts/make-stock-host trixie

guest-deb: deps ## build the guest package for Debian's kernels: out/release
	@scripts/fetch-drivers
	@scripts/build-guest-deb

trial-deb: fetch ## build and pack our QEMU, to try it beside Debian's: out/release
	@scripts/install-deps trial
	@scripts/build-qemu trial
	@scripts/build-trial-deb

host-source: fetch ## make Debian's QEMU source package with our series in it: out/release
	@scripts/build-host-source

host-deb: host-source ## build Debian's QEMU packages with our series in them: out/release
	@scripts/build-host-deb

release: guest-deb trial-deb host-source ## packages, the series with cover letters, checksums: out/release
	@for base in $(subst kernel,linux,$(subst /patches/,=,$(wildcard $(TREES:=/patches/*)))); do \
		scripts/fetch $$base || true; done
	@scripts/release

run: qemu kernel images ## run a guest and get its shell
	@scripts/guest

migrate: qemu kernel images ## migrate a guest once, with hints
	@scripts/migrate

demo: qemu kernel images $(if $(STOCK),qemu-stock kernel-stock) ## migrate an 8 GiB guest with and without hints: STOCK=1 MEM=GiB VCPUS=n RUNS=n
	@scripts/demo $(strip $(DEMO_OPTIONS))

kernel-xfs: fetch
	@scripts/build-kernel xfs

bench-build: qemu qemu-stock qemu-floor kernel kernel-stock kernel-xfs images debian-image
	@bench/make-images

bench: bench-build ## all benchmarks, for hours, or a part: SCENARIO="name ..." MODE="name ..." RUNS=n FRESH=1
	@bench/bench run $(strip $(BENCH_OPTIONS))

bench-quick: bench-build ## the main benchmarks, 3 runs: 15 minutes
	@bench/bench run --quick $(strip $(BENCH_OPTIONS))

bench-report: ## the report of what was measured so far: out/bench/report.html
	@bench/bench report

unit: qemu ## run the C unit tests
	@for test in free-page-hint absent-pages; do $(FPH_CACHE)/qemu-ours/build/tests/unit/test-$$test || exit; done

# No debug kernel, none for KVM, no Debian image: what builds and boots slowly.
check: qemu qemu-checked qemu-debug qemu-stock kernel images ## ten minutes of tests: the quick ones that catch most
	@FPH_RESULTS=check.json /usr/bin/python3 -m pytest -m check tests

test: qemu qemu-checked qemu-debug qemu-stock kernel kernel-stock kernel-debug kernel-kvm libvirt images other-guests debian-image ## run all tests
	@/usr/bin/python3 -m pytest -m 'not long' tests

# All three parts, also if one of them finds something.
test-long: qemu qemu-checked qemu-debug qemu-stock kernel kernel-stock kernel-debug kernel-kvm images other-guests debian-image ## 150 migrations more, and all with sanitizers and a debug kernel: FPH_MIGRATIONS=n FPH_TRIPS=n
	@status=0; \
	FPH_RESULTS=campaigns.json /usr/bin/python3 -m pytest -v -s tests/migration/migrate/campaigns.py || status=1; \
	FPH_RESULTS=sweep.json FPH_ABSENT=1 FPH_QEMU=debug FPH_KERNEL=debug \
		/usr/bin/python3 -m pytest -m 'integrity and not long' tests || status=1; \
	FPH_RESULTS=long.json /usr/bin/python3 -m pytest -m long \
		--ignore tests/migration/model --ignore tests/migration/packages tests || status=1; \
	exit $$status

test-packages: stock-guests stock-hosts guest-deb trial-deb ## install the packages in Debian's guests and hosts, and remove them
	@FPH_RESULTS=packages.json /usr/bin/python3 -m pytest -v tests/migration/packages

# Not a part of "make test": other compilers, other builds.
arm64: fetch ## build QEMU and guests for arm64 with pages of 4 and of 64 KiB, and test them
	@scripts/install-deps arm64
	@scripts/build-qemu arm64
	@scripts/build-kernel arm64-4k
	@scripts/build-kernel arm64-64k
	@scripts/make-initramfs arm64
	@FPH_RESULTS=arm64.json /usr/bin/python3 -m pytest -v tests/migration/compat/test_arm64.py

model: fetch ## let spin try every order of the protocol's steps, and find each mutant
	@/usr/bin/python3 -m pytest -v -s tests/migration/model/test_model.py

hostile: qemu qemu-stock qemu-debug images ## let a hostile guest try longer: FPH_REPEAT=n FPH_SECONDS=s FPH_SEED=n
	@FPH_REPEAT=$${FPH_REPEAT:-20} FPH_SECONDS=$${FPH_SECONDS:-10} /usr/bin/python3 -m pytest \
		tests/migration/hostile/test_bare_metal.py tests/migration/hostile/test_hostile.py

fuzz: qemu qemu-debug ## fuzz the parser of messages, then the device: RUNS=n SECONDS=s
	@scripts/fuzz parser -runs=$(or $(RUNS),10000000) -print_final_stats=1
	@scripts/fuzz device -max_total_time=$(or $(SECONDS),3600) -print_final_stats=1

lint: deps ## check the style of scripts and Python code
	@shellcheck -x $(SHELL_FILES)
	@black --check --quiet $(PYTHON_FILES) || { black --diff --quiet $(PYTHON_FILES); exit 1; }
	@flake8 $(PYTHON_FILES)
	@pylint --score=n $(PYTHON_FILES)
	@echo "lint: clean"

patches: fetch ## export the series of QEMU and Linux for git am: out/patches; others: BASE="10.2 7.3 11.3"
	@$(if $(BASES),scripts/fetch $(subst kernel=,linux=,$(BASES)))
	@scripts/export-patches out/patches $(BASES)

check-patches: fetch ## git am and checkpatch of every patch, and a build at each: BASE="10.2 7.3 11.3"
	@$(if $(BASES),scripts/fetch $(subst kernel=,linux=,$(BASES)))
	@scripts/check-patches --build $(BASES)

baselines: deps images ## build and test the other versions of QEMU and Linux, and moves between them
	@scripts/install-deps libvirt-build
	@scripts/baselines

clean: ## remove the output of runs (out/)
	rm -rf out .pytest_cache

distclean: clean ## remove the cache too: sources, builds, images
	rm -rf -- "$(FPH_CACHE)"
