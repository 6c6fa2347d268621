# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
OUT := results/quickstart
DATA := data/fashion_mnist
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal  # one process per core, one thread each

# Scanned digits at 32 x 32 with patches of 4 x 4: small enough to train on one CPU core.
DIGITS := --model avit_micro_patch4_32 --data-set DIGITS --input-size 32 --num-workers 0
ACT := OMP_NUM_THREADS=1 $(BIN)/python main_act.py

.PHONY: help quickstart experiments evidence example-images pictures test test-slow lint
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

quickstart: .venv/installed  ## train, fine-tune, evaluate and draw a model of scanned digits (4 to 10 minutes on one CPU core)
	$(ACT) @recipes/digits_static.args --output-dir $(OUT)/static
	$(ACT) @recipes/digits_adaptive.args --pretrained-path $(OUT)/static/checkpoint.pth --output-dir $(OUT)/adaptive
	$(ACT) $(DIGITS) --no-halting --eval --finetune $(OUT)/static/checkpoint.pth --output-dir $(OUT)/static
	$(ACT) $(DIGITS) --eval --finetune $(OUT)/adaptive/checkpoint.pth --output-dir $(OUT)/adaptive
	$(ACT) $(DIGITS) --demo --finetune $(OUT)/adaptive/checkpoint.pth --output-dir $(OUT)/adaptive
	@$(BIN)/python compare.py $(OUT)/static $(OUT)/adaptive
	@echo "Token depths: $(OUT)/adaptive/token_act_visualization/"

experiments: .venv/installed  ## run the pipelines of experiments/ (DATA=folder of Fashion-MNIST); recorded stages are skipped
	PYTHON=$(BIN)/python experiments/fashion_mnist/run.sh $(DATA)
	PYTHON=$(BIN)/python experiments/fashion_mnist/baselines.sh $(DATA)
	PYTHON=$(BIN)/python experiments/cluttered/run.sh $(DATA)

evidence: experiments  # the former name

example-images: .venv/installed $(OUT)/adaptive/eval.json  ## draw example_images/ again with the model of the quickstart
	$(ACT) $(DIGITS) --demo --demo-by random --finetune $(OUT)/adaptive/checkpoint.pth \
	  --demo-dir $(OUT)/images
	$(BIN)/python visualize.py experiments/clipart/results/depths/class9_ref.jpg \
	  --finetune experiments/clipart/avit_mini_clipart.pth --output-dir $(OUT)/images
	cp $(addprefix $(OUT)/images/,teaser.png class4_combined.jpg class8_combined.jpg class9_combined.jpg) example_images/
	cp $(OUT)/images/class9_ref_panel.png example_images/panel.png
	cp $(OUT)/images/class9_ref_halting.gif example_images/halting.gif

pictures: example-images  # the former name

$(OUT)/adaptive/eval.json:
	$(MAKE) quickstart

test: .venv/installed-dev  ## run the everyday tests (times: CONTRIBUTING.md)
	$(PYTEST)

test-slow: .venv/installed-dev  ## run the slow tests
	$(PYTEST) -m slow

lint: .venv/installed-dev  ## check style and formatting (seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@
