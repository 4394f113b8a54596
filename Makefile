# Each target makes .venv first, with plain `python3 -m venv` and pip, if that has not been done for these pins.
PYTHON ?= python3
# Processes among which pytest divides the tests.
WORKERS ?= 2
# And those of the Triton leg where there is a GPU: most of their time goes into compiling kernels, side by side.
GPU_WORKERS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nproc | awk '{ print $$1 < 8 ? $$1 : 8 }' || echo $(WORKERS))
# Where the machine has an NVIDIA driver, CuPy comes too, for the CUDA of torch's own build.
EXTRAS ?= dev$(shell command -v nvidia-smi >/dev/null 2>&1 && echo ,cuda13)

# A file of hashes: pip then takes only the files that it names, and nothing beside. CI has .ci/requirements.lock.
LOCK ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all quick test-cpu test-gpu fuzz mutants sanitize audit evidence processors docs lint clean

# The training is shown whatever `verify` finds, and the status tells what it found.
demo: $(INSTALLED)
	@status=0; $(BIN)/hw3gpu verify || status=$$?; $(BIN)/hw3gpu train || status=$$?; exit $$status

# Both legs run whatever the first one finds.
test: $(INSTALLED)
	@cpu=0; gpu=0; \
	$(MAKE) --no-print-directory test-cpu || cpu=1; \
	$(MAKE) --no-print-directory test-gpu || gpu=1; \
	if [ $$cpu$$gpu != 00 ]; then echo "make test: failed (cpu kernels: $$cpu, Triton kernels: $$gpu)"; exit 1; fi

# For the loop of someone who edits: a case of each test, both kinds of kernels at once, without what starts processes or
# compiles for a GPU.
QUICK = --sample 1 $(patsubst %,--ignore tests/test_%.py,$(NOT_QUICK))
NOT_QUICK := architecture batch_norm_graphs benchmarks blas_threads command cpu_threads cross_entropy_graphs distributed evidence examples \
	faults gpu_benchmark guard_pages internals interrupts kernels_hub large_means launches linear_cross_entropy losses_are_torchs packaging pool \
	portability processors safety site spoilt_arguments supervisor traffic training_page

quick: export OMP_NUM_THREADS ?= 1
quick: $(INSTALLED)
	@$(BIN)/python -m pytest -q --kernels gpu $(QUICK) > .quick.log 2>&1 & gpu=$$!; \
	$(BIN)/python -m pytest -q --kernels cpu $(QUICK); cpu=$$?; \
	wait $$gpu; gpu=$$?; cat .quick.log; rm .quick.log; exit $$((cpu | gpu))

# With the tests marked `slow` too.
test-all:
	$(MAKE) --no-print-directory test PYTEST_OPTIONS=--slow

# The workers are the parallelism; PyTorch's and LAPACK's own threads would wait for each other.
test-cpu test-gpu: export OMP_NUM_THREADS ?= 1
# Every worker and a hundred processes that tests start import the sources: compiled once, even where the shell says never to keep it.
test-cpu test-gpu quick: export PYTHONDONTWRITEBYTECODE :=

test-cpu: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --kernels cpu $(PYTEST_OPTIONS)

# On a GPU where there is one, else in Triton's interpreter.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -n $(GPU_WORKERS) --dist worksteal --kernels gpu $(PYTEST_OPTIONS)

# Drawn calls for MINUTES: of every function against the answer sheet, anew with each seed, and with arguments spoilt at random.
MINUTES ?= 20
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(INSTALLED)
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); seed=$$(date +%s); \
	while [ $$(date +%s) -lt $$end ]; do \
		echo "make fuzz: seed $$seed"; \
		HW3GPU_EXAMPLES=200 $(BIN)/python -m pytest -q --hypothesis-seed $$seed tests/test_properties.py || exit 1; \
		$(BIN)/python tests/spoilt_arguments.py --inputs 40000 --seed $$seed || exit 1; \
		seed=$$((seed + 1)); \
	done

# Small faults put into a copy of the sources, N a file: which of them the tests see. Some ten seconds each, a few minutes each that
# no test sees. What was found is kept in out/mutants.jsonl.
N ?= 10
mutants: $(INSTALLED)
	$(BIN)/python tests/mutants.py kernels/gpu --jit --each $(N)
	$(BIN)/python tests/mutants.py kernels/cpu --jit --each $(N)
	$(BIN)/python tests/mutants.py hw3gpu --each $(N)

# The CPU kernels under valgrind, which has to be installed: half an hour and more a dtype.
sanitize: export OMP_NUM_THREADS ?= 1
sanitize: $(INSTALLED)
	$(BIN)/python tests/memcheck.py

# The packages of the lock in the advisories that PyPI keeps; one that is not found there is an error.
audit: $(INSTALLED)
	$(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --disable-pip --require-hashes --strict --requirement .ci/requirements.lock

# Every plan compiled for every architecture: 24 minutes on two cores, where all are stale. Writes evidence.json and the tables.
evidence: $(INSTALLED)
	$(BIN)/python -m benchmarks evidence

# `verify` and the tests of the CPU kernels on every processor that this machine can play; docs/processors.md has its table.
processors: $(INSTALLED)
	$(BIN)/python -m benchmarks processors

# The site, in out/site; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check hw3gpu kernels tests benchmarks integrations examples
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt $(LOCK)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--require-hashes --requirement $(LOCK),--constraint constraints.txt setuptools)
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--no-deps,--constraint constraints.txt) --no-build-isolation --editable '.[$(EXTRAS)]'
	$(BIN)/python -m pip check
	touch $@

clean:
	rm -rf .venv .venv-audit build dist out *.egg-info
