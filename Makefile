# Everything a newcomer needs: Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PICTURE := 960,1575

GPU_TESTS := tests/gpu/test_recipes.py tests/gpu/test_tuned_models.py tests/bigmodel/test_quantization_devices.py tests/gpu/test_placed_models.py
ON_GPU = PYTHONPATH=$(CURDIR)/build/gpu timeout --signal INT $(1) $(or $(GPU_PYTHON),$(BIN)/python)

.PHONY: quickstart test browser check types layers docs picture format bench slow fault cluster attack exports gpu reference snapshot clean

quickstart: $(VENV)/.ready  ## run the main job on the model that ships with the repository
	$(BIN)/bigpipe run manifests/quickstart.yaml

test: $(VENV)/.ready-dev  ## the fast test suite, a worker for each core; FILES="tests/test_cli.py" for less, with one
	$(BIN)/python -m pytest -q $(or $(FILES),-n auto --dist worksteal)

browser: $(VENV)/.ready-dev  ## the page in a real browser; skipped where Chromium or axe-core cannot be had
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	-command -v chromium chromium-browser google-chrome > /dev/null || { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install --no-install-recommends chromium > /dev/null; }
	$(BIN)/python -m pytest -q -m browser -rs tests/webpage

slow: $(VENV)/.ready-dev  ## tests that take minutes
	$(BIN)/python -m pytest -q -m slow --timeout 3600

fault: $(VENV)/.ready-dev  ## kills, broken disks and lost power at full numbers; BIGPIPE_SEED repeats a run
	$(BIN)/python -m pytest -q -m fault --timeout 7200

cluster: $(VENV)/.ready-dev  ## recipes on Ray, two machines on this one's loopback device, and one of them lost at twenty moments
	$(BIN)/python -m pytest -q -m "fault or not fault" --timeout 7200 tests/cluster

attack: $(VENV)/.ready-dev  ## hostile servers, files and arguments at full numbers; BIGPIPE_SEED repeats a run
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'  # else the fuzzing is skipped
	$(BIN)/python -m pytest -q -m attack --timeout 7200

exports: $(VENV)/.ready-dev build/airflow/.ready build/mlflow/.ready  ## exports in a real Airflow and in an image's environment, runs on a real server of MLflow
	AIRFLOW=build/airflow/bin/airflow MLFLOW=build/mlflow/bin/mlflow $(BIN)/python -m pytest -q -m exports -rs --timeout 1800 tests/exports

build/airflow/.ready build/mlflow/.ready: build/%/.ready: constraints-exports.txt
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet $$(grep "^[a-z-]*$*==" constraints-exports.txt)
	touch $@

gpu: $(if $(GPU_PYTHON),,$(VENV)/.ready-dev)  ## tests and benchmarks on one NVIDIA GPU, in 8 minutes; see CONTRIBUTING.md
	rm -rf build/gpu
	$(if $(GPU_PYTHON),,$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gpu]')
	$(or $(GPU_PYTHON),$(BIN)/python) -m pip install --quiet --no-deps --no-build-isolation --target build/gpu .
	$(if $(WHEELS),$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/gpu $(WHEELS)/*.whl)
	begun=$$(date +%s); \
	$(call ON_GPU,300) -m pytest -q -m gpu -W default --timeout 240 -n 8 --dist worksteal $(GPU_TESTS); tests=$$?; \
	$(call ON_GPU,$$((480 + begun - $$(date +%s)))) benchmarks/gpu.py --out build/gpu.json $(BENCH) || [ $$? = 124 ] || exit 1; exit $$tests

check: types layers  ## formatting, lint, types, layers, layout, the site of the docs; -j 2 does them side by side

types: $(VENV)/.ready-dev
	MYPYPATH=src $(BIN)/mypy -p bigpipe

layers: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_layout.py
	@if $(BIN)/python -c 'import material' 2> /dev/null; then NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict; \
	else echo "docs: NOT BUILT: pip install 'bigpipe-ml[docs]'"; fi

docs: $(VENV)/.ready-dev  ## the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

picture: $(VENV)/.ready-dev  ## the README's picture of a report, by Chromium
	BIGPIPE_HOME=build/picture $(BIN)/bigpipe run manifests/quickstart.yaml
	BIGPIPE_HOME=build/picture $(BIN)/bigpipe report last -o build/report.html
	chromium $$([ "$$(id -u)" = 0 ] && echo --no-sandbox) --headless --hide-scrollbars --window-size=$(PICTURE) \
	  --screenshot=docs/report.png build/report.html
	$(BIN)/python -c 'from PIL import Image; name = "docs/report.png"; \
	  Image.open(name).convert("RGB").quantize(64).save(name, optimize=True)'  # a third of the bytes

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready-dev  ## every benchmark, both sides, as tables; BENCH="--size 7B --only reshard" for less or more
	$(BIN)/python benchmarks/run.py $(BENCH)

reference: $(VENV)/.ready-dev  ## regenerate what is generated: pages of the reference and the JSON schemas
	$(BIN)/python docs/generated.py
	$(BIN)/bigpipe schema > schema/bigpipe.schema.json
	$(BIN)/bigpipe schema --outputs > schema/outputs.schema.json

snapshot: $(VENV)/.ready-dev  ## what the installed transformers builds of common families, so that sizes need no torch
	$(BIN)/python models/architectures.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bigpipe needs Python 3.11 or newer; make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[run]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
