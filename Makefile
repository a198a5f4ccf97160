# make demo    a request becomes a picture, compressed beside uncompressed, in demo-out/
# make test    the tests                    make lint    ruff and mypy
# make test-optimum   what export --layout optimum writes, in the real optimum, which has an environment of its own
# make test-rtx   graphs compiled by the real TensorRT-for-RTX builder (x86-64 Linux), without a GPU
# make gate    two gallery checkpoints against gallery/gate/baselines.json
# make check   lint, then tests             make clean   what the others made, .venv too
#
# Each of them makes .venv with PYTHON (3.11 or newer) and installs what constraints.txt names, once.
# TORCH_PIP goes to the pip call that installs torch. On Linux pip takes a CUDA build of torch, which runs on a CPU too
# and is a few gigabytes; the "CPU" choice of PyTorch's install page gives the option for the small one:
#   make demo TORCH_PIP='--index-url ...'

PYTHON ?= python3
TORCH_PIP ?=
OUT ?= demo-out
PYTEST ?= -q -n 2 --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
# Two workers with one thread each; more threads would only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
STAMP := .venv/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

# optimum pins an older transformers than ours, so it cannot live in .venv.
OPTIMUM := .venv-optimum
OPTIMUM_LIST := tests/optimum/constraints.txt
OPTIMUM_STAMP := $(OPTIMUM)/installed-$(shell cat pyproject.toml $(OPTIMUM_LIST) | cksum | cut -d' ' -f1)

# The S3 server that tests talk to, moto's, wants an older python-dateutil than ours.
S3 := .venv-s3
S3_LIST := tests/s3_constraints.txt
S3_STAMP := $(S3)/installed-$(shell cksum < $(S3_LIST) | cut -d' ' -f1)

# TensorRT for RTX's builder, of which ctypes opens two libraries: what else the wheel wants is not needed.
RTX := .venv-rtx
RTX_LIST := tests/rtx_constraints.txt
RTX_STAMP := $(RTX)/installed-$(shell cksum < $(RTX_LIST) | cut -d' ' -f1)
RTX_LIBRARIES = $(CURDIR)/$(RTX)/lib/python*/site-packages/onnxruntime_ep_nv_tensorrt_rtx

# $(call venv,FOLDER): a virtual environment there, unless it is there already.
venv = test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { \
	echo "make: cannot make $(1); install Python's venv module (Debian, Ubuntu: python3-venv)" >&2; exit 1; }

.PHONY: demo test test-optimum test-rtx lint gate check clean install
.DEFAULT_GOAL := check

demo: install
	$(BIN)/personalq demo --out $(OUT)

test: install $(S3_STAMP)
	$(TEST_ENV) PERSONALQ_MOTO_SERVER=$(CURDIR)/$(S3)/bin/moto_server $(BIN)/python -m pytest $(PYTEST)

test-optimum: install $(OPTIMUM_STAMP)
	$(TEST_ENV) PERSONALQ_OPTIMUM_PYTHON=$(OPTIMUM)/bin/python $(BIN)/python -m pytest -q -m optimum tests/exporters

test-rtx: install $(RTX_STAMP)
	$(TEST_ENV) TRT_RTX_DIR=$$(echo $(RTX_LIBRARIES)) $(BIN)/python -m pytest $(PYTEST) -m 'trt and not gpu' tests/exporters

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gate: install
	$(TEST_ENV) $(BIN)/python -m gallery.gate

check: lint test

install: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make: Python 3.11 or newer is needed, got $$($(PYTHON) --version 2>&1 | head -n 1); run: make PYTHON=python3.12" >&2; \
		exit 1; }
	@$(call venv,.venv)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_PIP) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,openvino,serve,export,ray,store,dev]'
	@rm -f .venv/installed-*
	@touch $@

$(OPTIMUM_STAMP):
	@$(call venv,$(OPTIMUM))
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OPTIMUM_LIST) $(TORCH_PIP) torch
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OPTIMUM_LIST) -e '.[cpu,optimum]'
	@rm -f $(OPTIMUM)/installed-*
	@touch $@

$(S3_STAMP):
	@$(call venv,$(S3))
	$(S3)/bin/python -m pip install --quiet --disable-pip-version-check -c $(S3_LIST) 'moto[server]'
	@rm -f $(S3)/installed-*
	@touch $@

$(RTX_STAMP):
	@$(call venv,$(RTX))
	$(RTX)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(RTX_LIST)
	@rm -f $(RTX)/installed-*
	@touch $@

clean:
	rm -rf .venv $(OPTIMUM) $(S3) $(RTX) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(OUT)
