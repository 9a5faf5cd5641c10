# Python >= 3.11, git and make are all that a machine needs: every target sets up .venv itself.
PYTHON ?= python3
# processes that share the tests (pytest -n), each a part of the files, so that what a file's tests
# have in common is set up once; 0 is one process, without pytest-xdist
WORKERS ?= 2

# of `make lowest`: the extras that are installed; what uv takes torch for (auto, cpu, cu124), or
# nothing, where only PyPI can be reached
LOWEST := fast,plot,maps,pipelines,dataset,export,train
TORCH_BACKEND ?= cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SETUP := .venv/.installed

.PHONY: help setup demo docs test lowest lint check clean

help:
	@echo "make demo    a photo through the tiny networks: there and back, compared, its feature maps; into out/"
	@echo "make docs    the documentation's pictures and site, into out/site"
	@echo "make test    the ordinary tests"
	@echo "make lowest  the ordinary tests with the oldest versions that pyproject.toml allows"
	@echo "make check   format, lint, types and tests"
	@echo "make clean   remove what the other targets left, except .venv and .venv-lowest"

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "sdconv needs \
	Python 3.11 or newer; %s is %d.%d. Name another one: make PYTHON=python3.12" % \
	(sys.executable, *v[:2]))'
	@echo "setting up .venv (minutes, once)"
	@$(PYTHON) -m venv .venv
	@# first torch, as pinned: asked for by a range only, a build for CUDA could come; and what builds
	@# sdconv, pinned too, in place of the newest that pip would put into a build environment
	@$(PIP) torch hatchling editables
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(SETUP)
	@mkdir -p out
	$(BIN)/sdconv reconstruct weights/photo.jpg --model weights/tiny-vae.safetensors \
		--out out/reconstruct.png --force
	$(BIN)/sdconv check weights/tiny-vae.safetensors
	$(BIN)/sdconv anatomy weights/tiny-vae.safetensors --plot out/anatomy.png --force
	$(BIN)/sdconv features weights/photo.jpg --model weights/tiny-vae.safetensors --out out/vae-maps --force
	$(BIN)/sdconv features weights/photo.jpg --model weights/tiny-unet.safetensors \
		--vae weights/tiny-vae.safetensors --out out/unet-maps --force
	@echo "made: out/reconstruct.png out/anatomy.png out/vae-maps/report.html out/unet-maps/report.html"

# mkdocs-material prints a notice about a successor, which is not a warning of ours
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(SETUP)
	$(BIN)/python -m scripts.docs.pictures
	$(BIN)/python -m scripts.docs.architecture
	$(BIN)/python -m scripts.docs.snippets
	$(BIN)/python -m mkdocs build --strict
	@echo "made: out/site/index.html"

test: $(SETUP)
	$(BIN)/python -m pytest -n $(WORKERS) $(if $(filter-out 0,$(WORKERS)),--dist worksteal)

# in an environment of its own, with torch's build for CPUs; the oldest versions warn of each other
lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal -o filterwarnings=default

.venv-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		$(addprefix --torch-backend=,$(TORCH_BACKEND)) --editable '.[$(LOWEST)]' \
		'pytest>=9.0' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
	@touch $@

lint: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
