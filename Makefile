# Two commands do everything on a fresh Linux machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready-cpu
VENV_GPU := .venv-gpu
READY_GPU := $(VENV_GPU)/.ready
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: help venv gpu doctor demo picture smoke-gpu corpora test soak bench bench-gpu lint clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: $(READY)   ## the environment for CPUs (.venv), from the lock

$(READY): requirements/cpu.txt requirements/install-cpu.sh setup.cfg
	requirements/install-cpu.sh $(PYTHON) $(VENV)
	touch $@

gpu: $(READY_GPU)  ## the environment for GPUs (.venv-gpu): vLLM's CUDA build and DeepSpeed

$(READY_GPU): requirements/gpu.txt setup.cfg
	test -x $(VENV_GPU)/bin/python || $(PYTHON) -m venv $(VENV_GPU)
	$(VENV_GPU)/bin/python -m pip install -q -r requirements/gpu.txt
	$(VENV_GPU)/bin/python -m pip install -q --no-deps -e .
	touch $@

demo: $(READY)   ## the whole chain on embedded data: results in runs/demo
	$(PY) -m kun_ray.demo

picture: $(READY)  ## the README's picture of the demo's end: docs/demo.png; takes Chromium and the font Noto Sans Mono CJK
	@test -n "$(CHROMIUM)" || { echo "picture: there is no Chromium here: apt-get install chromium fonts-noto-cjk" >&2; exit 1; }
	mkdir -p build
	$(PY) -m kun_ray.demo --picture build/demo.html
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=880,1420 --screenshot=$(CURDIR)/docs/demo.png file://$(CURDIR)/build/demo.html

smoke-gpu:       ## the demo on one GPU; MODEL=<folder or hub id> takes another model
	@command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU || { echo "smoke-gpu: this machine shows no NVIDIA GPU (nvidia-smi -L)" >&2; exit 1; }
	@$(MAKE) --no-print-directory gpu
	$(VENV_GPU)/bin/python -m kun_ray.demo --gpu $(if $(MODEL),--model $(MODEL))

doctor:          ## what this machine has of what kun_ray needs; FOLDERS="/shared s3://…" tries storage, GPU=1 wants a GPU
	@$(if $(wildcard $(if $(GPU),$(VENV_GPU),$(VENV))/bin/python),$(if $(GPU),$(VENV_GPU),$(VENV))/bin/python,$(PYTHON)) -m kun_ray.doctor $(if $(GPU),--gpu) $(FOLDERS)

corpora: $(READY)  ## real Chinese text from Debian packages in the three corpora's layouts: build/corpora
	$(PY) bench/corpora.py build/corpora

test: $(READY)   ## all tests; each folder in a process of its own, for each has a Ray of its own
	$(PY) -m pytest tests/unit
	$(PY) -m pytest tests/cluster
	$(PY) -m pytest tests/real

soak: $(READY)   ## hours: 200 random kills over 100,000 rows, 20 of real vLLM: bench/results/soak.json
	$(PY) bench/soak.py

bench: $(READY)  ## all benchmarks, four hours, after make corpora: bench/results; SHORT=1 only shows that they run
	$(PY) bench/all.py $(if $(SHORT),--short) $(if $(OUT),--out $(OUT))

bench-gpu: $(if $(SMOKE),$(READY))  ## those that measure a card, under nine minutes, to OUT=<folder>; SMOKE=1 runs their path on CPUs
	$(if $(SMOKE),$(PY),$(if $(wildcard $(VENV_GPU)/bin/python),$(VENV_GPU)/bin/python,python3)) bench/all.py --gpu $(if $(SMOKE),--smoke) $(if $(ONLY),--only $(ONLY)) --out $(or $(OUT),build/$(if $(SMOKE),smoke,bench))

lint: $(READY)   ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:           ## removes the environment and everything that was made
	rm -rf $(VENV) $(VENV_GPU) build runs *.egg-info
