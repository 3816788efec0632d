# Each target sets up what it needs in .venv; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint bench

demo: .venv/installed
	$(BIN)/python lift_extractor.py --image_path assets/sample.jpg --output_path demo/sample.npz --load_size 448 \
		--model_type vit_mini16 --lift_path pretrained/lift_vit_mini16_attend.pth --picture demo/sample.png
	@echo "picture:  demo/sample.png (PCA colours of backbone and LiFT)"
	@echo "next:     python eval_visualize_feats.py --help, or the table in README.md"

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed-dev
	$(BIN)/python benchmarks/speed.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@ .venv/installed
