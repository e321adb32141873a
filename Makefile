# Everything a newcomer needs. Python 3.11 or later and make are all that must be on the machine.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test slow clusters wheel-test clean-install oldest docs fuzz lint format secrets audit constraints sbom screenshots

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml
	@echo "installing lift_ray into .venv (once; PyTorch makes it minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "installing the tools of the tests into .venv (once)"
	@$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

quickstart: .venv/.installed  ## search for the best way to fine-tune a ViT-S/14, on this machine, in minutes
	@$(BIN)/python -m lift_ray.tune search_spaces/quickstart.yaml

test: .venv/.installed-dev  ## run the tests, save those of the next two targets
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not cluster"

slow: .venv/.installed-dev  ## run the long tests: whole runs on workers and killed ones, every kind of export, the tutorial
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

clusters: .venv/.installed-dev  ## run the tests that start clusters, lose their nodes and wait for new ones
	@$(BIN)/python -m pytest -m cluster

wheel-test: .venv/.installed-dev  ## build the wheel, and run verbs from another folder with nothing but its files; also part of `make slow`
	@$(BIN)/python -m pytest tests/test_wheel.py

clean-install: .venv/.installed-dev  ## install the wheel into a fresh environment elsewhere, and run the quickstart and init there; 10 minutes, 6 GB
	@$(BIN)/python -m pytest -s tests/clean_install.py

# The parts that meet Ray, PyTorch, Arrow, Optuna, pydantic, typer and the others: half of `make test`.
OLDEST := patches session capacity layers cli text settings schema samplers space tables table_files trial_rows open convert decode \
	augment weights_file backbone towers hosted tuners tuners_on_towers text_side run worker workspace device portable predict evaluate export report_page live trainer \
	tune serve_http api engine

oldest:  ## run half of the tests with the lowest versions that pyproject.toml allows, in .venv-oldest; 15 to 25 minutes
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --upgrade pip uv
	@.venv-oldest/bin/python -m uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
		-e '.[search,dashboard,export,serve,report,s3]'
	@.venv-oldest/bin/python -m uv pip install --quiet --python .venv-oldest/bin/python \
		pytest pytest-timeout hypothesis hatchling 'datasets==4.0.*'
	@.venv-oldest/bin/python -m uv pip list --python .venv-oldest/bin/python 2>/dev/null | grep -E '^(numpy|optuna|pyarrow|ray|torch|torchvision) '
	@PYTHONPATH=. .venv-oldest/bin/python -m pytest -m "not slow and not cluster" -k "not object_storage" $(OLDEST:%=tests/test_%.py)

.venv/.installed-docs: .venv/.installed
	@echo "installing the tools of the documentation into .venv (once)"
	@$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

docs: .venv/.installed-docs  ## build the documentation into site/, and check its links; site/index.html needs no server
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "documentation: $(CURDIR)/site/index.html"

fuzz: .venv/.installed-dev  ## read 10,000 damaged images, tables, settings, checkpoints and requests; 10 minutes, or FUZZ_INPUTS=N
	@FUZZ_INPUTS=$${FUZZ_INPUTS:-10000} $(BIN)/python -m pytest -s tests/test_fuzz.py

lint: .venv/.installed-dev  ## ruff and mypy, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict lift_ray

format: .venv/.installed-dev  ## rewrite the code in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

secrets: .venv/.installed-dev  ## look for keys and passwords in the files
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-files '^benchmarks/results/|/manifest\.json$$' --exclude-lines '^ *(sourceImage: |"image/jpeg": )'

audit: .venv/.installed-dev  ## look the installed packages up in a database of known vulnerabilities; says where none can be reached
	@$(BIN)/python .ci/audit.py

constraints: .venv/.installed-dev  ## write docker/constraints.txt: the versions in .venv, for images and nodes
	@$(BIN)/python .ci/constraints.py

sbom: .venv/.installed-dev  ## write dist/lift_ray-VERSION.cdx.json, a bill of materials (CycloneDX)
	@$(BIN)/python .ci/sbom.py

screenshots: .venv/.installed-dev  ## take the screenshots in docs/ again; needs Chromium, 20 minutes
	@$(BIN)/python tests/screenshots.py
