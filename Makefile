# make help lists the targets.
PYTHON ?= python3
BIN := .venv/bin
OUT := results/quickstart
DATA := data/fashion_mnist
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal  # a process for each core, of one thread

# The digits at 32 x 32 in patches of 4 x 4: small enough for a CPU, and for one thread of it.
DIGITS := --model avit_micro_patch4_32 --data-set DIGITS --input-size 32 --num_workers 0
ACT := OMP_NUM_THREADS=1 $(BIN)/python main_act.py

.PHONY: help quickstart evidence pictures test test-slow lint
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/installed  ## train, fine-tune, evaluate and draw on scanned digits, in under 4 minutes
	$(ACT) @recipes/digits_static.args --output_dir $(OUT)/static
	$(ACT) @recipes/digits_adaptive.args --pretrained-path $(OUT)/static/checkpoint.pth --output_dir $(OUT)/adaptive
	$(ACT) $(DIGITS) --no-halting --eval --finetune $(OUT)/static/checkpoint.pth --output_dir $(OUT)/static
	$(ACT) $(DIGITS) --eval --finetune $(OUT)/adaptive/checkpoint.pth --output_dir $(OUT)/adaptive
	$(ACT) $(DIGITS) --demo --finetune $(OUT)/adaptive/checkpoint.pth --output_dir $(OUT)/adaptive
	@$(BIN)/python compare.py $(OUT)/static $(OUT)/adaptive
	@echo "Token depths: $(OUT)/adaptive/token_act_visualization/"

evidence: .venv/installed  ## measure on Fashion-MNIST (DATA=folder) and on cluttered pictures of it
	PYTHON=$(BIN)/python experiments/fashion_mnist/run.sh $(DATA)
	PYTHON=$(BIN)/python experiments/fashion_mnist/baselines.sh $(DATA)
	PYTHON=$(BIN)/python experiments/cluttered/run.sh $(DATA)

pictures: .venv/installed $(OUT)/adaptive/eval.json  ## remake example_images/ with the network of the quickstart
	$(ACT) $(DIGITS) --demo --demo-by random --finetune $(OUT)/adaptive/checkpoint.pth \
	  --demo-dir $(OUT)/pictures
	$(BIN)/python visualize.py $(OUT)/pictures/class8_ref.jpg --finetune $(OUT)/adaptive/checkpoint.pth --size 128 \
	  --output-dir $(OUT)/pictures
	cp $(addprefix $(OUT)/pictures/,teaser.png class4_combined.jpg class8_combined.jpg class9_combined.jpg) example_images/
	cp $(OUT)/pictures/class8_ref_panel.png example_images/panel.png
	cp $(OUT)/pictures/class8_ref_halting.gif example_images/halting.gif

$(OUT)/adaptive/eval.json:
	$(MAKE) quickstart

test: .venv/installed-dev  ## the everyday tests
	$(PYTEST)

test-slow: .venv/installed-dev  ## the slow tests
	$(PYTEST) -m slow

lint: .venv/installed-dev  ## style and mistakes that can be seen without running
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
