# make quickstart   train, mark and prove a model on real MNIST
# make test         the test suite
# make test-avx2    its numerical part once more, in the instructions of an older processor
# make slow         the tests that need much room: a real Triton, a Gradio, an MLServer with PyTorch
# make lint         format, lint, docstrings, types, words
# make docs         the documentation site: site/index.html
# make examples     run the notebooks of examples/ anew and write their outputs
# make install      only .venv, with the command .venv/bin/countermark
# make study        the paper's study beside its numbers, on real MNIST and Fashion-MNIST (profile quick)
# make bench        beside torchattacks, foolbox, ART and pyautoattack: docs/performance.md, benchmarks/results.json
# make release      build the wheel and the source archive in dist/, check them, make the tag
# make first-light  the figures of docs/first-light.md: three seeds of both data sets

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
TRITON := .venv-triton
MLSERVER := .venv-mlserver
GRADIO := .venv-gradio
BENCH := .bench
# Triton's Python backend is bound to the libpython of the system; another Python's standard library does not fit it.
TRITON_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) $(PYTHON))
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# On Linux a plain "torch" is a CUDA build of several gigabytes; the CPU builds carry +cpu in their version and live in
# PyTorch's own index. Set TORCH_VERSION (for example to 2.13.0) to install another build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION ?= $(TORCH)$(if $(filter Linux,$(shell uname -s)),+cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.PHONY: quickstart study install test test-avx2 slow lint format bench first-light docs examples release clean

quickstart: install
	$(BIN)/countermark data fetch mnist
	$(BIN)/countermark quickstart

install: $(VENV)/.installed

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Countermark needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH_VERSION)"
	@$(PIP) install --constraint constraints.txt "torch==$(TORCH_VERSION)" 2>/dev/null \
		|| $(PIP) install --constraint constraints.txt --extra-index-url $(TORCH_INDEX) "torch==$(TORCH_VERSION)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing countermark"
	@$(PIP) install --constraint constraints.txt --editable '.[digits,onnx,serve,judge,study]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing the developers' tools"
	@$(PIP) install --constraint constraints.txt --editable '.[digits,parquet,onnx,serve,judge,sign,lightning,transformers,study,dev]'
	@touch $@

# MLServer wants an older web stack than ours, so it has an environment of its own; the tests ask it from outside,
# and have tritonclient ask the service.
$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	@echo "installing MLServer and tritonclient, peers of the tests"
	@$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet --quiet install "mlserver==1.7.*" "onnxruntime>=1.18" "tritonclient[http]>=2.50"
	@touch $@

test: $(VENV)/.dev $(PEERS)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

# What a processor computes in decides how training goes; no test may. oneDNN can be told to do without newer instructions.
NUMERICAL := training attacks domain folding strict guard protect thieves cleaners marking
test-avx2: $(VENV)/.dev
	ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal $(NUMERICAL:%=tests/test_%.py)

# Unlike the peer it has PyTorch and Countermark beside it, for the runtime in integrations/mlserver.py.
$(MLSERVER)/.installed:
	$(PYTHON) -m venv $(MLSERVER)
	@echo "installing MLServer with PyTorch"
	@$(MLSERVER)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --extra-index-url $(TORCH_INDEX) \
		"mlserver==1.7.*" "torch==$(TORCH_VERSION)" --editable '.[serve]'
	@touch $@

$(GRADIO)/.installed:
	$(PYTHON) -m venv $(GRADIO)
	@echo "installing Gradio, a peer that the tests ask"
	@$(GRADIO)/bin/python -m pip --disable-pip-version-check --quiet --quiet install "gradio==6.*" "onnxruntime>=1.18"
	@touch $@

slow: $(VENV)/.dev $(MLSERVER)/.installed $(GRADIO)/.installed  # a real Triton, half a gigabyte of it
	test -x $(TRITON)/bin/python || $(TRITON_PYTHON) -m venv $(TRITON)
	@$(TRITON)/bin/python -m pip --disable-pip-version-check --quiet --quiet install "nvidia-pytriton==0.7.*" "onnxruntime>=1.18"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/words.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.docs: $(VENV)/.installed
	@echo "installing what builds the documentation"
	@$(PIP) install --constraint constraints.txt --editable '.[docs]'
	@touch $@

# A link that leads nowhere is an error. Nothing is fetched.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

examples: $(VENV)/.dev
	$(BIN)/python .ci/notebooks.py

study: $(VENV)/.installed
	$(BIN)/countermark data fetch mnist
	$(BIN)/countermark data fetch fashion_mnist
	$(BIN)/countermark reproduce

# Without their dependencies, which would bring another PyTorch; what they need of them is named.
$(BENCH)/.installed: $(VENV)/.installed
	@echo "installing the peers of the benchmark"
	@$(PIP) install --target $(BENCH) --no-deps torchattacks==3.5.1 foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1 \
		"pyautoattack==0.2.*" eagerpy tqdm multiprocess dill GitPython gitdb smmap packaging six joblib
	@touch $@

bench: $(BENCH)/.installed
	$(BIN)/countermark data fetch mnist
	$(BIN)/countermark data fetch fashion_mnist
	PYTHONPATH=$(BENCH) $(BIN)/python benchmarks/bench.py

first-light: $(VENV)/.installed
	$(BIN)/countermark data fetch mnist
	$(BIN)/countermark data fetch fashion_mnist
	$(BIN)/python benchmarks/first_light.py

# A stale build/ would bring deleted files into the wheel. Nothing is pushed or uploaded.
release: VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/countermark/version.py)
release: TAG = v$(VERSION)
release: $(VENV)/.dev
	@test -z "$$(git status --porcelain)" \
		|| { echo "commit or remove what git status shows first" >&2; exit 2; }
	@grep -q "^## $(VERSION) – 20" CHANGELOG.md \
		|| { echo "CHANGELOG.md has no section $(VERSION) with a date" >&2; exit 2; }
	@grep -qx "version: $(VERSION)" CITATION.cff \
		|| { echo "CITATION.cff is of another version than $(VERSION)" >&2; exit 2; }
	@! git rev-parse --quiet --verify refs/tags/$(TAG) >/dev/null \
		|| test "$$(git rev-parse $(TAG)^{commit})" = "$$(git rev-parse HEAD)" \
		|| { echo "$(TAG) is the tag of another commit; raise the version" >&2; exit 2; }
	rm -rf build dist
	$(BIN)/python -m build --no-isolation >/dev/null
	$(BIN)/python -m twine check --strict dist/*
	@git rev-parse --quiet --verify refs/tags/$(TAG) >/dev/null \
		|| git tag --annotate $(TAG) --message "Countermark $(VERSION)"
	@echo "dist/ holds $(TAG); git push origin $(TAG) publishes the tag"

clean:
	rm -rf $(VENV) $(PEERS) $(TRITON) $(MLSERVER) $(BENCH) build dist *.egg-info src/*.egg-info
