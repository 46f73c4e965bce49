.PHONY: check lint format slow lowest census bench fuzz

RESULTS := docs/results
BENCHES := $(filter-out census fuzz mutate __init__,$(basename $(notdir $(wildcard benchmarks/*.py))))

check:  ## what CI runs
	.ci/run

lint:
	uv run ruff check
	uv run pyrefly check

format:
	uv run ruff check --fix
	uv run ruff format

slow:  ## the tests that take minutes
	uv run --group census --group cluster pytest -m slow

lowest:  ## the tests on the oldest versions that pyproject.toml allows
	uv venv -q --clear .venv/lowest
	uv pip install -q --python .venv/lowest --resolution lowest-direct -e . --group dev --group census
	.venv/lowest/bin/pytest -q -o "filterwarnings=default"

census:  ## every architecture: traced, cut, proved, saved, loaded
	uv run --group census python -m benchmarks.census --json $(RESULTS)/census.json

bench:  ## every other benchmark, each beside the peer it names
	set -e; for name in $(BENCHES); do \
		uv run --group census python -m benchmarks.$$name --json $(RESULTS)/$$name.json; done

fuzz:  ## 5,000 mutated checkpoints and recipes
	uv run --group census python -m benchmarks.fuzz --json $(RESULTS)/fuzz.json
