# make pretrain   set up, simulate three physics, train the tokenizer, pretrain the mixture of experts, evaluate, report
# make reproduce  data, tokenizer, model and the published table beside ours, in pieces of 9 minutes (SIZE=debug: a dry run)
# make test       set up and run the tests
# make check      lint, types, tests
# make faults     hundreds of damaged stores and sources, none of which may be read silently
# make exactness  divergence of thousands of decodes, which must be exactly 0
# make transfer   joint training against solo, dense, oracle and hash models over three seeds (SIZE=debug: minutes)
# make ablations  the same beside k = 2 and 4, no information loss, no parameters told, two domains; do experts specialise
# make forecast   one model whose linear experts are refined for rollouts, against persistence and a linear model
# make pairs      does the router tell apart two Reynolds numbers, two rocks, or places within one field
# make ladder     three tokenizers of different rates against the best linear codes: an hour of CPU each
# make benchmarks reading, training step, dispatch and engine against what is fastest elsewhere; what the tokenizer's parts
#                 cost; experts shared out against experts in one place; forecasts of memory against what is measured
# Every step of `make pretrain` continues where it stopped or says that it is done.

PYTHON ?= python3
SIZE ?= quickstart
GPUS := $(strip $(shell nvidia-smi -L 2>/dev/null | wc -l))
RANKS ?= $(if $(filter 1,$(GPUS)),1,2)
BIN := .venv/bin
# DeepSpeed's launcher starts one process per rank; on CPU the ranks talk through gloo. A port of our own lets two runs
# share a machine.
PORT := $(shell $(PYTHON) -c 'import random; print(random.randint(20000, 32000))')
DEEPSPEED := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --quiet --master_port $(PORT) --num_gpus $(RANKS)
ifeq ($(GPUS),0)
export DS_ACCELERATOR := cpu
export OMP_NUM_THREADS := 1
endif

.PHONY: setup pretrain reproduce reproduce-piece transfer-latents transfer ablations forecast pairs test test-slow faults exactness ladder benchmarks lint check clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

pretrain: setup
	$(BIN)/python launch/generate_data.py configs/generate_data/$(SIZE).yaml
	$(DEEPSPEED) launch/train_tokenizer.py configs/train_tokenizer/$(SIZE).yaml
	$(BIN)/python launch/cache_latents.py configs/cache_latents/$(SIZE).yaml
	$(DEEPSPEED) launch/pretrain.py configs/pretrain/$(SIZE).yaml
	$(BIN)/python launch/evaluate_model.py configs/evaluate_model/$(SIZE).yaml

# One process, so without DeepSpeed's launcher. INTERPRETER=python3 takes one that has what it needs, and sets up nothing.
INTERPRETER ?= $(BIN)/python
REPRODUCE := PYTHONPATH="$(CURDIR)" $(INTERPRETER) launch/reproduce.py configs/reproduce/$(if $(filter debug,$(SIZE)),debug,base).yaml $(SET)

reproduce: $(if $(filter $(BIN)/python,$(INTERPRETER)),setup)
	while $(REPRODUCE); code=$$?; [ $$code -eq 75 ]; do :; done; exit $$code

reproduce-piece: $(if $(filter $(BIN)/python,$(INTERPRETER)),setup)
	$(REPRODUCE) || [ $$? -eq 75 ]

TRANSFER := $(if $(filter debug,$(SIZE)),debug,transfer)

transfer-latents: setup
	$(BIN)/python launch/generate_data.py configs/generate_data/$(TRANSFER).yaml
	$(DEEPSPEED) launch/train_tokenizer.py configs/train_tokenizer/$(TRANSFER).yaml
	$(BIN)/python launch/cache_latents.py configs/cache_latents/$(TRANSFER).yaml

transfer: transfer-latents
	$(BIN)/python launch/measure_transfer.py configs/measure_transfer/$(SIZE).yaml

ablations: transfer-latents
	$(BIN)/python launch/measure_transfer.py configs/measure_transfer/$(SIZE).yaml \
	    'variants=[shodh,solo,solo_dense,dense_flops,dense_parameters,oracle,hash,untold,free,top2,top4,pair]'
	$(BIN)/python benchmarks/specialisation.py --run $(if $(filter debug,$(SIZE)),runs/debug/transfer,runs/transfer)

forecast:
	$(MAKE) transfer-latents SIZE=quickstart
	$(DEEPSPEED) launch/pretrain.py configs/pretrain/transfer.yaml
	$(BIN)/python benchmarks/forecast.py

pairs: setup
	test -f runs/quickstart/tokenizer.safetensors || $(MAKE) pretrain SIZE=quickstart
	for kind in slow fast blobs spheres; do \
	    $(BIN)/python launch/generate_data.py configs/generate_data/hard_pairs_$$kind.yaml || exit 1; done
	$(BIN)/python benchmarks/hard_pairs.py --plot docs/hard_pairs.png

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

faults: setup
	$(BIN)/python -m pytest -s -m faults

exactness: setup
	$(BIN)/python benchmarks/exactness.py

ladder: setup
	$(BIN)/python launch/generate_data.py configs/generate_data/ladder.yaml
	$(BIN)/python benchmarks/rate_ladder.py --plot docs/rate_ladder.png

benchmarks: setup
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/tokenizer.py
	$(BIN)/python benchmarks/telemetry.py
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/expert_parallel.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/plan.py

lint: setup
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

clean:
	rm -rf stores runs
