# `make help` lists what there is to make. Everything a target needs, it installs.
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO          ?= go
PREFIX      ?= /usr/local
DESTDIR     ?=
OUT         ?= out
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

LDFLAGS     := -X github.com/drafter-vm/drafter/internal/version.set=$(VERSION)

# The tools that the one host binary also answers to, each as drafter-TOOL.
TOOLS       := blueprint snapshotter packager peer terminator mounter serve registry push pull run ctl nat forwarder connections

GOTESTFLAGS ?= -count 1 -timeout 30m

# Packages with real VMs and networks are tested one after another: they must not compete for the two cores of a small machine, or timeouts measure
# the neighbour. Within one of them, tests that can bear a neighbour say so by t.Parallel.
ALONE       := $(addprefix ./,cmd/drafter internal/backends internal/bench internal/e2e internal/faults internal/testguest internal/testnet internal/hosttest \
               pkg/blueprint pkg/expose pkg/flow pkg/forward pkg/nat pkg/nat/rule pkg/ram pkg/vmm/qemu)

# For make test-faults: -seed N, -seeds N, -log.
FAULTFLAGS  ?=

# For the command behind make bench: -run REGEXP, -quick, -samples N, -list.
BENCHFLAGS  ?=

# For make unpack/oci, pack/oci and build/oci: which image, for which architecture, and the host name of its container.
OCI_IMAGE_URI          ?= docker://valkey/valkey:latest
OCI_IMAGE_ARCHITECTURE ?= amd64
OCI_IMAGE_HOSTNAME     ?= drafterguest

.DEFAULT_GOAL := help
.PHONY: help depend build install unpack/oci pack/oci build/oci test test-faults test-vfio test-kvm test-desktop test-unit lint bench bench-micro demo fuzz clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z\/-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

depend: ## Install what building, testing and the demo need (Debian 12; root, or nothing missing)
	@scripts/depend

build: ## Build bin/drafter and the static guest command bin/drafter-agent
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/drafter ./cmd/drafter
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w $(LDFLAGS)' -o bin/drafter-agent ./cmd/drafter-agent
	ln -sf drafter-agent bin/drafter-liveness
	for tool in $(TOOLS); do ln -sf drafter bin/drafter-$$tool; done

install: build ## Install the commands, drafter-TOOL links to them, manual pages and shell completion below PREFIX (/usr/local)
	install -D -m 0755 bin/drafter $(DESTDIR)$(PREFIX)/bin/drafter
	install -D -m 0755 bin/drafter-agent $(DESTDIR)$(PREFIX)/bin/drafter-agent
	ln -sf drafter-agent $(DESTDIR)$(PREFIX)/bin/drafter-liveness
	for tool in $(TOOLS); do ln -sf drafter $(DESTDIR)$(PREFIX)/bin/drafter-$$tool; done
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || date +%s) bin/drafter man $(DESTDIR)$(PREFIX)/share/man/man1
	mkdir -p $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	bin/drafter completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/drafter
	bin/drafter completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_drafter
	bin/drafter completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/drafter.fish
	bin/drafter-agent completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/drafter-agent
	bin/drafter-agent completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_drafter-agent
	bin/drafter-agent completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/drafter-agent.fish
	ln -sf drafter-agent $(DESTDIR)$(PREFIX)/share/bash-completion/completions/drafter-liveness
	ln -sf drafter-agent.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/drafter-liveness.fish
	for tool in $(TOOLS); do \
		ln -sf drafter $(DESTDIR)$(PREFIX)/share/bash-completion/completions/drafter-$$tool; \
		ln -sf drafter.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/drafter-$$tool.fish; \
	done

unpack/oci: build ## Unpack OCI_IMAGE_URI to the bundle out/oci-runtime-bundle, in place of the one that is there
	bin/drafter oci unpack --overwrite --architecture $(OCI_IMAGE_ARCHITECTURE) --hostname $(OCI_IMAGE_HOSTNAME) --output $(OUT)/oci-runtime-bundle $(OCI_IMAGE_URI)

pack/oci: build ## Make the disk out/blueprint/oci.ext4 of that bundle
	bin/drafter oci pack --output $(OUT)/blueprint/oci.ext4 $(OUT)/oci-runtime-bundle

build/oci: unpack/oci pack/oci ## Both (OCI_IMAGE_URI=docker://…, OCI_IMAGE_ARCHITECTURE=…, OCI_IMAGE_HOSTNAME=…)

test: depend build lint ## Everything: unit tests with the race detector, root-only tests, real VMs end to end
	@# By all cores: what go test -p 1 finds uncompiled it compiles one package at a time.
	$(GO) build -race ./...
	cd internal/tests3/versitygw && CGO_ENABLED=0 $(GO) tool -n versitygw >/dev/null # the S3 server of tests
	cd internal/testregistry/registry && CGO_ENABLED=0 $(GO) tool -n registry >/dev/null # the OCI registry of tests
	@trap 'exit 130' INT; failed=0; \
	$(GO) test -race $(GOTESTFLAGS) $$($(GO) list ./... | grep -vxFf <($(GO) list $(ALONE))) || failed=1; \
	$(GO) test -race -p 1 $(GOTESTFLAGS) $(ALONE) || failed=1; \
	[ -n "$${FIRECRACKER_BIN-}" ] || command -v firecracker >/dev/null || echo "SKIPPED, not tested: Firecracker itself, as there is none; name one in FIRECRACKER_BIN, and its jailer in JAILER_BIN" >&2; \
	exit $$failed

test-faults: depend build ## Faults: links cut at every frame, hosts killed in every state, real peers too (hours; FAULTFLAGS=-seed N, …)
	$(GO) test -p 1 -count 1 -timeout 6h -v ./internal/faults -args -long $(FAULTFLAGS)
	$(GO) test -p 1 -count 1 -timeout 1h -v ./internal/e2e -args -long
	$(GO) test -p 1 -count 1 -timeout 1h -v ./pkg/flow -run TestRandomMoves -args -long

test-vfio: depend build ## A device that is passed through, on an emulated host with an emulated IOMMU (15 minutes)
	$(GO) test -count 1 -timeout 1h -v ./internal/hosttest -run TestPassthrough -args -long

test-kvm: depend build ## Guests under KVM, with Firecracker (FIRECRACKER_BIN, JAILER_BIN) and QEMU, on an emulated host (hours)
	$(GO) test -count 1 -timeout 5h -v ./internal/hosttest -run TestKVM -args -long

test-desktop: depend build ## A desktop that is looked at by VNC while it moves (minutes; screenshots in out/desktop)
	$(GO) test -p 1 -count 1 -timeout 30m -v ./internal/e2e -run TestDesktopMoves -args -long -screenshots $(abspath $(OUT))/desktop

test-unit: ## The quick part of the tests: no root, no VMs
	$(GO) test -short ./...

lint: ## gofmt, go vet and staticcheck, of the module and of that of the examples
	@unformatted=$$(gofmt -l cmd examples internal pkg); if [ -n "$$unformatted" ]; then echo "gofmt needed: $$unformatted" >&2; exit 1; fi
	$(GO) vet ./...
	$(GO) -C examples vet ./...
	$(GO) tool staticcheck ./...
	staticcheck=$$($(GO) tool -n staticcheck) && cd examples && $$staticcheck ./...

bench: depend build ## Measure docs/promises.md beside references: table, docs/bench.svg, out/bench.json (BENCHFLAGS=-list, -quick, …)
	@$(GO) run ./internal/bench -out $(OUT) $(BENCHFLAGS)

bench-micro: depend build ## The Go benchmarks of the packages
	$(GO) test -run '^$$' -bench . -benchmem ./...

demo: depend build ## A Valkey server in a VM moves A → B → A → B while a client writes to it
	@$(GO) run ./internal/demo -out $(OUT)

fuzz: ## Run each fuzz target for a minute
	@scripts/fuzz 1m

clean: ## Remove bin/ and out/
	rm -rf bin $(OUT)
