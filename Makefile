# `make help` lists what there is.

PYTHON ?= python3
BIN := .venv/bin
DEMO := --model_config configs/model_config_demo.yaml --train_config configs/train_config_demo.yaml --output_dir outputs_demo

.PHONY: help demo test test-slow bench replicate scaling conversion lint sync clean

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
	@echo
	@echo "That was Q–K=V, trained on the source of Python's standard library. A token is a byte here, so the perplexities are"
	@echo "per byte, far below those of word pieces. Samples of each checkpoint: outputs_demo/samples_step_*.txt. What to try next:"
	@echo "  the same for QKV      $(BIN)/python transformer_KQV_300_M.py $(DEMO)_kqv"
	@echo "  what the cache saves  $(BIN)/python analysis_computation_profiler.py decode --contexts 4096 --variants kqv kv"
	@echo "  use it elsewhere      $(BIN)/python export_hf.py --model kv --checkpoint outputs_demo/final_model.pt --output_dir hf_demo"

test: .venv/installed  ## run the test suite (about 7 minutes on 2 cores, no network, no GPU)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed  ## run the long tests alone
	$(BIN)/python -m pytest -m slow

bench: .venv/installed  ## run the benchmarks, which print ratios and never fail for being slow (2 hours, 24 GB)
	@failed=0; for benchmark in tests/benchmarks/*.py; do echo "$$benchmark"; $(BIN)/python $$benchmark || failed=1; done; exit $$failed

replicate: .venv/installed  ## train all variants at a reduced scale, two seeds each, and tabulate them (2 hours on 2 cores; on a text of your own, RESULTS=DIR)
	PYTHON=$(BIN)/python bash runs/replicate.sh

scaling: .venv/installed  ## learning rates, tokens per parameter and row lengths at small sizes (6 hours on 2 cores; on a text of your own, RESULTS=DIR)
	PYTHON=$(BIN)/python bash runs/scaling.sh

conversion: .venv/installed  ## convert trained models to Q–K=V and train on, after `make scaling` (8 hours on 2 cores; on a text of your own, SCALING=DIR RESULTS=DIR)
	$(BIN)/python runs/conversion.py

lint: .venv/installed  ## run ruff, and check that the training scripts are in sync
	$(BIN)/ruff check .
	$(BIN)/python dev/sync_scripts.py

sync: .venv/installed  ## copy the shared text of transformer_KQV_300_M.py to the other training scripts
	$(BIN)/python dev/sync_scripts.py --write

clean:  ## remove what `make demo` wrote, and its export
	rm -rf demo_data outputs_demo outputs_demo_kqv hf_demo
