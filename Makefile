# Each target sets up what it needs in .venv by itself. `make test args="-k adam -x"` hands args on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Tests on all cores; `make test args=-n0` runs them in one process. Each takes up to 2 GB.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
# Tests are chosen by their marks: `make test args=--markers` tells what each stands for.
SIMULATED := NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest tests/cuda
args ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all docs-test docs docs-serve examples bench bench-against asv asv-check lint format types oracles
.PHONY: build wheel portable oldest newest reproducible audit clean distclean
.PHONY: sanitize sanitize-threads attack attack-files fuzz fuzz-guided big
.PHONY: test-cuda test-gpu bench-gpu

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo ## train a network on handwritten digits, over the tree and over the flat vector
	@$(BIN)/python examples/digits.py $(args)

test: $(VENV)/test ## run the tests, but for those that build the library anew
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(args)

test-all: $(VENV)/oracles $(VENV)/test $(VENV)/demo $(VENV)/bench $(VENV)/cuda ## run all tests, beside the libraries we compare with and with CUDA simulated; measure what they reach
	@$(SIMULATED) -m "simulated and not slow" -q $(PARALLEL) --cov --cov-report= --cov-fail-under=0
	@$(BIN)/python -m pytest tests/cuda -m "compiled and not slow" -q $(PARALLEL) --cov --cov-append --cov-report= --cov-fail-under=0
	@$(BIN)/python -m pytest $(PARALLEL) --peers=required --cov --cov-append --cov-report=term $(args)

test-cuda: $(VENV)/test $(VENV)/cuda ## run the tests of CUDA kernels without a GPU: simulated, and compiled
	@$(SIMULATED) -m simulated $(PARALLEL) $(args)
	@$(BIN)/python -m pytest tests/cuda -m compiled $(PARALLEL) $(args)

test-gpu: $(VENV)/test ## run the tests of CUDA kernels on a GPU, with the extra cuda12 or cuda13
	@$(BIN)/python -m pytest tests/cuda -m "gpu or simulated" $(args)

docs-test: $(VENV)/test ## run the examples in the docstrings, in README.md and in docs/
	@$(BIN)/python -m pytest --doctest-modules --doctest-ignore-import-errors optimisers tests/package/test_readme.py $(args)

examples: $(VENV)/demo ## run every example on a small size
	@mkdir -p build
	@set -e; for example in examples/*.py; do \
	    printf '\n%s\n' "$$example"; \
	    $(BIN)/python -W error "$$example" --quick --out "build/$$(basename "$$example" .py).png"; \
	done

docs: $(VENV)/docs $(VENV)/demo $(VENV)/oracles ## build the site in build/docs, and look at what it loads and links
	@$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs $(args)
	@$(BIN)/python tools/check_site.py build/docs

docs-serve: docs ## show the site on port 8000 of this machine
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs $(or $(args),8000)

bench: $(VENV)/bench $(VENV)/oracles ## time everything beside NumPy, PyTorch, optax: docs/benchmarks/benchmarks.md
	@$(BIN)/python asv_bench/side_by_side.py $(args)

bench-against: $(VENV)/bench ## build the revision REV and this one, time both in turn, and say which rows are slower
	@$(BIN)/python tools/bench_against.py $(REV) $(args)

asv: $(VENV)/bench $(VENV)/oracles ## time every row of the goals with asv, for a history; published in build/published/asv
	@mkdir -p build
	@set -e; cd asv_bench; PATH="$(CURDIR)/$(BIN):$$PATH"; asv machine --yes > ../build/asv.log; \
	    asv run --python=same --set-commit-hash=$$(git rev-parse HEAD) $(args); asv publish
	@$(BIN)/python tools/asv_pages.py build/published/asv

asv-check: $(VENV)/bench ## see whether asv takes the benchmarks
	@mkdir -p build/home; cd asv_bench; HOME=$(CURDIR)/build/home $(CURDIR)/$(BIN)/asv check -E existing

bench-gpu: $(VENV)/built ## time updates on a GPU, beside a copy and PyTorch's Adam
	@$(BIN)/python asv_bench/gpu.py $(args)

lint: $(VENV)/dev ## check style: ruff, cython-lint
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint optimisers/*.pyx optimisers/*/*.pyx optimisers/_cpu/*.pxi

format: $(VENV)/dev ## mend style where ruff can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

types: $(VENV)/dev ## check types: mypy on the package, pyright on a user's code
	@$(BIN)/mypy
	@$(BIN)/pyright --pythonpath $(BIN)/python

sanitize: build/address,undefined/built ## run the tests of the kernels under GCC's checks of memory and of undefined behaviour
	@$(ALONE) PYTHONPATH=build/address,undefined PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    $(BIN)/python -m pytest -m sanitized $(PARALLEL) -p no:cacheprovider $(or $(args),tests)

sanitize-threads: build/thread/built ## look for races: first where there are some, two threads on one model, then where none may be
	@! $(RACES) -m racy > build/thread/races 2>&1
	@grep -q "ThreadSanitizer: data race .*_loop$$" build/thread/races
	@$(RACES) -m races $(args)

attack: $(VENV)/test ## repeat many times what may break things: damaged files, code of users, threads, forks, kills, ...
	@$(BIN)/python -m pytest $(PARALLEL) --attack -m attack $(args)

fuzz: $(VENV)/test ## of these: throw 20,000 random trees, states and gradients at the engine
	@$(BIN)/python -m pytest $(PARALLEL) --attack tests/engine/test_fuzz.py $(args)

attack-files: $(VENV)/test ## of these: damage and forge files 20,000 times, kill and interrupt 2,000 saves
	@$(BIN)/python -m pytest $(PARALLEL) --attack -m attack tests/io $(args)

GUIDED = PYTHONPATH=tools:tests $(BIN)/python tests/engine/guided_fuzz.py
fuzz-guided: $(VENV)/test $(VENV)/fuzz ## the same for some minutes, chosen by atheris by what code they reach
	@mkdir -p build/fuzz
	@set -e; for test in $$($(GUIDED) --list); do \
	    mkdir -p build/fuzz/$$test; echo $$test; \
	    $(GUIDED) $$test build/fuzz/$$test -artifact_prefix=build/fuzz/ \
	        -verbosity=0 -print_final_stats=1 -len_control=0 -max_len=4096 $(or $(args),-max_total_time=120); \
	done

big: $(VENV)/test ## update arrays of more than 2^31 numbers; needs 18 GB
	@$(BIN)/python -m pytest --big -m big $(args)

oracles: $(VENV)/oracles ## install PyTorch, JAX, optax, ... so that the tests compare with them

build: $(VENV)/test ## make the source archive and the wheel in dist/
	@$(BIN)/python -m build --outdir dist

wheel: $(VENV)/test $(VENV)/wheel ## build a wheel for this Linux and others, and test it in a venv of its own
	@rm -rf build/wheel && mkdir -p build/wheel
	@$(BIN)/python -m build --no-isolation --wheel --outdir build/wheel/made > build/wheel/log
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/made/*.whl
	@$(PYTHON) -m venv build/wheel/venv
	@cd build/wheel; wheel=$$(ls -t ../../dist/*manylinux*.whl | head -1); \
	venv/bin/python -m pip install -qq --disable-pip-version-check "$$wheel[test]"; \
	venv/bin/python -P -m optimisers; \
	venv/bin/pytest -q $(PARALLEL) -c ../../pyproject.toml -m elsewhere ../../tests $(args)

portable: $(VENV)/portable ## compile the extensions for Windows, macOS and ARM, without running them
	@$(BIN)/python tools/portable.py build/portable

oldest: ## install and test the library beside the oldest versions of what it needs
newest: ## the same beside the newest; PYTHON=python3.14 takes another Python
# As a user gets it: built from the source archive with the newest NumPy, and run with another.
oldest newest: $(VENV)/test
	@rm -rf build/$@
	@$(BIN)/python -m build --no-isolation --sdist --outdir build/$@ > $(VENV)/sdist.log
	@$(PYTHON) -m venv build/$@/venv
	@$(BIN)/python tools/floors.py $@ > build/$@/floors.txt
	@set -e; cd build/$@; archive=$$(echo $$PWD/*.tar.gz); \
	digest=$$(venv/bin/python -m pip hash "$$archive" | sed -n 's/^--hash=sha256://p'); \
	venv/bin/python -m pip install -qq --disable-pip-version-check --constraint floors.txt \
	    "optimisers[test] @ file://$$archive#sha256=$$digest"; \
	venv/bin/python -P -m optimisers; \
	venv/bin/pytest -q $(PARALLEL) -c ../../pyproject.toml -m elsewhere ../../tests $(args)

reproducible: $(VENV)/test ## build the archives in two places, under other circumstances; compare
	@$(BIN)/python tools/reproducible.py build/reproducible

audit: $(VENV)/audit ## ask which of the libraries in .venv have known vulnerabilities
	@mkdir -p build
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > build/audited.txt
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r build/audited.txt || { \
	    echo "audit: not passed. Either the list above names vulnerabilities, or the service that" \
	         "knows them could not be reached, and then nothing is known."; exit 1; }

clean: ## remove what was built, keep .venv
	rm -rf build dist htmlcov *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f optimisers/*.so optimisers/*/*.so optimisers/_steps.pxi $(VENV)/built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# --- what the targets stand on: empty files in .venv say what was done there, and when -----------

$(VENV)/made: pyproject.toml
	@echo "making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("$<", "rb"))["build-system"]["requires"])' | xargs $(PIP)
	@touch $@

# A change in the rules that leaves the formulas alone leaves this file, and so the kernels, alone.
FORMULAS := optimisers/words.py $(sort $(wildcard optimisers/rules/[a-z]*.py))
optimisers/_steps.pxi: $(FORMULAS) optimisers/_steps/grammar.py tools/emit_steps.py
	@$(PYTHON) tools/emit_steps.py $(FORMULAS) $@.new
	@cmp -s $@ $@.new && rm $@.new || mv $@.new $@

$(VENV)/built: $(VENV)/made pyproject.toml setup.py optimisers/_steps.pxi $(wildcard optimisers/*.pyx optimisers/*/*.pyx optimisers/_cpu/*)
	@echo "building optimisers, which takes about a minute"
	@$(PIP) --no-build-isolation --check-build-dependencies --editable .
	@touch $@

# The library with kernels under the checks that the folder is named after, and how it is run there.
ALONE := env PYTHONSAFEPATH=1 OPTIMISERS_ISA=baseline
RACES = $(ALONE) PYTHONPATH=build/thread TSAN_OPTIONS=die_after_fork=0 \
    LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
    $(BIN)/python -m pytest -s -p no:cacheprovider

build/%/built: setup.py $(wildcard optimisers/*.py optimisers/*/*.py optimisers/*.pyx optimisers/*/*.pyx optimisers/_cpu/*) optimisers/_steps.pxi | $(VENV)/test
	@echo "building optimisers under -fsanitize=$*"
	@OPTIMISERS_SANITIZE=$* $(BIN)/python -W ignore setup.py -q build --build-lib build/$* --build-temp build/$*/temp
	@grep -q "__asan_init\|__tsan_init" build/$*/optimisers/_kernels*.so
	@touch $@

# The extra that `make demo`, `make test`, ... names, read from what was just installed.
$(VENV)/demo $(VENV)/test $(VENV)/docs $(VENV)/wheel $(VENV)/portable $(VENV)/cuda $(VENV)/bench $(VENV)/dev $(VENV)/oracles $(VENV)/audit $(VENV)/fuzz: $(VENV)/%: $(VENV)/built pyproject.toml
	@test $@ -nt pyproject.toml || { echo "installing optimisers[$*]" && $(PIP) "optimisers[$*]"; }
	@touch $@
