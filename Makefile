# `make help` lists what there is.

PYTHON ?= python3
BIN := .venv/bin
DEMO := --model_config configs/model_config_demo.yaml --train_config configs/train_config_demo.yaml --output_dir outputs_demo

REPLICA := --model_config configs/model_config_replicate.yaml --train_config configs/train_config_replicate.yaml

.PHONY: help demo test test-slow bench replicate lint sync clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	@touch $@

demo: .venv/installed  ## prepare a small corpus, train Q–K=V on it, evaluate and sample (5 minutes on 2 cores)
	$(BIN)/python dataset_download.py --source stdlib --tokenizer bytes --target_tokens 4_000_000 --validation_tokens 200_000 --output_dir demo_data
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 transformer_KV_1_300_M.py $(DEMO)

test: .venv/installed  ## run the test suite (8 minutes on 2 cores at most, no network, no GPU)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: .venv/installed  ## run the long tests alone
	$(BIN)/python -m pytest -m slow

bench: .venv/installed  ## run the benchmarks; they print ratios and never fail for being slow
	@for benchmark in tests/benchmarks/*.py; do echo "$$benchmark"; $(BIN)/python $$benchmark; done

# Paragraphs of the standard library, a document each, in a fixed random order and none twice. In rows of 256 tokens
# some are cut and some filled up, as documents are in the paper's rows of 2,048.
define PARAGRAPHS
import json, random, dataset_download
texts = (path.read_text(encoding="utf-8") for path in dataset_download.stdlib_files())
paragraphs = sorted({part.strip("\n") for text in texts for part in text.split("\n\n")} - {""})
for part in random.Random(0).sample(paragraphs, len(paragraphs)): print(json.dumps({"text": part}))
endef
export PARAGRAPHS

# script:alias, protocol and score_padding of every run; each of them at two seeds
RUNS := $(foreach seed,42 43,$(foreach run,KQV:kqv QK:qk KV_1:kv K:k GQA:gqa MQA:mqa QGQA:qgqa QMQA:qmqa,$(run):padded:true:$(seed)) \
    KQV:kqv:text:false:$(seed) KV_1:kv:text:false:$(seed))

replicate: .venv/installed  ## train all variants at a reduced scale, two seeds each, and tabulate them (2 hours on 2 cores)
	@mkdir -p replicate_data outputs_replicate
	@$(BIN)/python -c "$$PARAGRAPHS" > replicate_data/stdlib.jsonl
	$(BIN)/python dataset_download.py --source replicate_data/stdlib.jsonl --tokenizer bytes --target_tokens 20_000_000 --validation_tokens 100_000 --output_dir replicate_data
	@echo $(RUNS) | tr ' :' '\n ' | OMP_NUM_THREADS=1 xargs -P 2 -L 1 sh -c '\
	    to=outputs_replicate/$$1_$$2_seed$$4; echo "training $$to, log in $$to.log"; \
	    $(BIN)/python transformer_$$0_300_M.py $(REPLICA) --output_dir $$to score_padding=$$3 seed=$$4 > $$to.log 2>&1 || { tail -n 1 $$to.log; exit 1; }'
	@for run in outputs_replicate/*/; do \
	    to=results/reduced_scale/$$(basename $$run); mkdir -p $$to; cp $$run*.yaml $$run/metrics.jsonl $$to; \
	done
	$(BIN)/python results_table.py results/reduced_scale --output_dir results/reduced_scale

lint: .venv/installed  ## run ruff, and check that the training scripts are in step
	$(BIN)/ruff check .
	$(BIN)/python dev/sync_scripts.py

sync: .venv/installed  ## carry the shared text of transformer_KQV_300_M.py to the other training scripts
	$(BIN)/python dev/sync_scripts.py --write

clean:  ## remove what `make demo` wrote
	rm -rf demo_data outputs_demo
