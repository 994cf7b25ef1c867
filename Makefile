# Every target sets up what it needs in .venv; a fresh machine needs python3 (with venv), make and a network for packages.
PYTHON ?= python3
BENCH  ?= --quick
PIP     = .venv/bin/python -m pip --disable-pip-version-check
READY   = .venv/.ready

help:            ## show the targets
	@sed -n 's/^\([a-z-]*\):[^#]*##\(.*\)/  make \1\t\2/p' Makefile | expand -t 22

$(READY): pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint deploy/constraints.txt --editable '.[test,lint]'
	touch $(READY)

demo: $(READY)   ## the main job on the scan that ships: ingest, segment, evaluate, picture
	.venv/bin/haloseg demo build/demo

serve: $(READY)  ## Prefect server, Dask and the scheduled flows on this machine; SERVE='--archive FOLDER --model FILE'
	.venv/bin/python deploy/serve.py $(SERVE)

test: $(READY)   ## the test suite, under 10 minutes on 2 cores
	.venv/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## the tests that take minutes each
	.venv/bin/python -m pytest -m slow

test-newest:     ## the test suite on the newest of every dependency, in .venv-newest; PYTHON= for another python3
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	.venv-newest/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)   ## ruff and mypy --strict
	.venv/bin/ruff check pipeline flows tests deploy
	.venv/bin/mypy

.venv/.bench: $(READY)
	$(PIP) install --quiet --constraint deploy/constraints.txt --editable '.[bench]'
	$(PIP) uninstall --quiet --yes argparse # batchgenerators asks for the module of Python 2.6, which Prefect's server would find first
	touch .venv/.bench

bench: .venv/.bench ## seconds, memory and exactness beside peers, small cases (minutes); BENCH= for the large ones
	.venv/bin/python tests/benchmarks/bench_peers.py $(BENCH)

bench-scale: $(READY) ## how a run scales: workers, voxels, columns
	.venv/bin/python tests/benchmarks/bench_scale.py

bench-archive: $(READY) ## what an archive's workers do between scans, and what very many blocks cost
	.venv/bin/python tests/benchmarks/bench_archive.py

bench-train: $(READY) ## how much of a training's speed its loader costs
	.venv/bin/python tests/benchmarks/bench_train.py

bench-memory: $(READY) ## a scan of 16 GiB through processes of under 2 GiB
	.venv/bin/python tests/benchmarks/bench_memory.py

demo-model: $(READY) ## make the demo's scan and model again (needs HALOSEG_DATA)
	.venv/bin/python -m pipeline.demo.make

clean:           ## remove what the targets made
	rm -rf .venv .venv-newest build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help demo serve test test-slow test-newest lint bench bench-scale bench-archive bench-train bench-memory demo-model clean
