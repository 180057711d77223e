PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow test-spark test-loggers test-foreign test-floor test-floor-torch test-312 test-313 test-benchmarks check docs format bench benchmark-peers train evidence published clean

help:
	@echo "make demo       train, monitor, catch a drift, see it in MLflow (about 5 minutes with the installation)"
	@echo "make test       the test suite, README included"
	@echo "make check      lint, format, types and the documentation"
	@echo "make docs       the documentation, into build/docs"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-spark a detector on Spark, in an environment of its own (needs Java 17)"
	@echo "make test-loggers alerts in TensorBoard and Weights & Biases, in an environment of its own"
	@echo "make test-foreign norms of other packages' models, and what they cost, in an environment of its own"
	@echo "make test-floor the suite on the oldest releases that are supported, in an environment of its own"
	@echo "make test-floor-torch the same with the oldest torch too, whose only build is gigabytes of CUDA"
	@echo "make test-313   the suite on Python 3.13, in an environment of its own; test-312 likewise"
	@echo "make test-benchmarks quick runs of the benchmarks that take longest"
	@echo "make bench      what the library costs, measured here into docs/performance.md (about an hour)"
	@echo "make evidence   what it claims of detection, with two pages (hours, and data that each part says how to get)"
	@echo "make published  the same of models that packages carry, in an environment of its own (half an hour)"
	@echo "make train      the models of the evidence, whose weights are committed (hours)"

install: $(INSTALLED)

# The stamp is written last, so an interrupted installation starts again.
$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[all,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/digits_demo.py

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal

# Whose detectors are all given a method, or that have nothing to do with one: `make test` has run
# them as they would run again.
SAYS_ITS_METHOD := '*/test_methods.py' '*/diffusers/test_replay.py' '*/test_situations.py' \
	'*/test_cases.py' '*/test_reading.py' '*/test_returned.py' \
	'*/test_origin.py' '*/test_budget.py' '*/test_changes.py' '*/test_sizes.py' \
	'*/test_adapters.py' '*/test_rebinding.py' '*/test_indices.py' '*/test_handover.py' \
	'*/test_telling.py' '*/test_predictions.py' '*/test_monitored.py' \
	'*/test_own_calls.py' '*/test_plan.py' '*/test_custom.py' '*/test_experts.py'
test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'slow and not long' -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --method gradient_norms \
		-m 'not slow or both_methods' \
		tests/integrations/lightning tests/integrations/mlflow tests/integrations/diffusers \
		$(addprefix --ignore-glob=,$(SAYS_ITS_METHOD))

# Quick runs of those benchmarks that take longest.
test-benchmarks: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long -n 2 --dist worksteal

# In an environment of its own: with Spark beside it MLflow and other packages behave differently.
test-spark: .venv-spark/.installed
	OMP_NUM_THREADS=1 .venv-spark/bin/pytest -m slow tests/integrations/mlflow/test_spark.py

# Likewise: Lightning takes TensorBoard for its logger where it is installed.
test-loggers: .venv-loggers/.installed
	OMP_NUM_THREADS=1 .venv-loggers/bin/pytest -m slow tests/integrations/lightning/test_foreign_loggers.py \
		tests/integrations/accelerate/test_foreign_trackers.py

# Likewise: some of these packages register plugins of others. What it measures is committed.
test-foreign: .venv-foreign/.installed
	OMP_NUM_THREADS=1 .venv-foreign/bin/pytest tests/foreign
	.venv-foreign/bin/python -m benchmarks.cost.foreign --json benchmarks/results/foreign.json
	.venv-foreign/bin/python -m benchmarks.cost.performance

# Those packages without their dependencies, after all else and with torch held.
.venv-foreign/.installed .venv-published/.installed: .venv-%/.installed: pyproject.toml requirements.lock requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[all,dev]'
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock --no-deps \
		--requirement requirements-$*.txt
	touch $@

# On the oldest releases that pyproject.toml admits, but for torch, whose CPU build is the lock's.
test-floor: .venv-floor/.installed
	OMP_NUM_THREADS=1 .venv-floor/bin/pytest --floor -n 2 --dist worksteal

.venv-floor/.installed: pyproject.toml requirements-floor.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint requirements-floor.lock \
		--editable '.[lightning,diffusers,mlflow,prometheus,accelerate,plots,dev]'
	touch $@

# Torch too, of a build with CUDA: there is no other of that release. It pins sympy itself.
test-floor-torch: .venv-floor-torch/.installed
	OMP_NUM_THREADS=1 .venv-floor-torch/bin/pytest --floor -n 2 --dist worksteal

.venv-floor-torch/.installed: pyproject.toml requirements-floor.lock
	$(PYTHON) -m venv $(@D)
	sed -e 's/^torch==.*/torch==2.6.0/' -e '/^sympy==/d' requirements-floor.lock > $(@D)/floor.lock
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint $(@D)/floor.lock \
		--editable '.[lightning,diffusers,mlflow,prometheus,accelerate,plots,dev]'
	touch $@

# The locked set on later Pythons. Where these are not on the path: make test-313 PYTHON=/where/it/is
test-312: PYTHON = python3.12
test-313: PYTHON = python3.13
test-312 test-313: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n 2 --dist worksteal

.venv-312/.installed .venv-313/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[all,dev]'
	touch $@

.venv-%/.installed: pyproject.toml requirements.lock requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		--editable '.[all,dev]' --requirement requirements-$*.txt
	touch $@

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

# All pages anew each time: Sphinx says nothing again of a page that it has read before.
docs: $(INSTALLED)
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going \
		--doctree-dir build/doctrees docs build/docs

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: benchmark-peers .venv-foreign/.installed
	$(BIN)/python -m benchmarks.integrations.lightning --json benchmarks/results/lightning.json
	$(BIN)/python -m benchmarks.integrations.transformers --json benchmarks/results/transformers.json
	$(BIN)/python -m benchmarks.integrations.diffusers --part latency --json benchmarks/results/diffusers_latency.json
	$(BIN)/python -m benchmarks.integrations.real_sizes --scale 0.1 --model 'SD 1.5' --rounds 3 \
		--json benchmarks/results/real_sizes.json
	$(BIN)/python -m benchmarks.cost.factor_forms --json benchmarks/results/factor_forms.json
	$(BIN)/python -m benchmarks.cost.gradient_norms --json benchmarks/results/gradient_norms.json \
		--figure docs/gradient-norms-cost.png
	.venv-foreign/bin/python -m benchmarks.cost.foreign --json benchmarks/results/foreign.json
	$(BIN)/python -m benchmarks.drift.e_detector --json benchmarks/results/drift.json --figure docs/drift.png
	$(BIN)/python -m benchmarks.cost.performance

# DATA holds the images and the text, RECORDINGS speech; each benchmark says how to get them.
DATA ?= ../shared/data
RECORDINGS ?= $(DATA)/free-spoken-digits
EVIDENCE = --data-dir $(DATA) --json benchmarks/results
train: $(INSTALLED)
	$(BIN)/python -m benchmarks.detection.train --data-dir $(DATA)
	$(BIN)/python -m benchmarks.detection.no_law --data-dir $(DATA) --train runs/no-law
	$(BIN)/python -m benchmarks.detection.kinds --data-dir $(DATA)
	$(BIN)/python -m benchmarks.detection.colour_glow --data-dir $(DATA) --train runs/colour-glow
	$(BIN)/python -m benchmarks.detection.reserved --data-dir $(DATA) --train runs/reserved
	$(BIN)/python -m benchmarks.detection.domains --data-dir $(DATA) --train runs/domains
	$(BIN)/python -m benchmarks.detection.audio --recordings $(RECORDINGS) --train runs/audio

evidence: benchmark-peers
	$(BIN)/python -m benchmarks.detection.evidence $(EVIDENCE)/evidence.json
	$(BIN)/python -m benchmarks.detection.paper $(EVIDENCE)/paper.json --figures docs
	$(BIN)/python -m benchmarks.detection.colour_glow $(EVIDENCE)/colour_glow.json --figures docs
	$(BIN)/python -m benchmarks.detection.questions $(EVIDENCE)/questions.json --figures docs
	$(BIN)/python -m benchmarks.detection.forward $(EVIDENCE)/forward.json
	$(BIN)/python -m benchmarks.detection.no_law $(EVIDENCE)/no_law.json
	$(BIN)/python -m benchmarks.detection.reserved $(EVIDENCE)/reserved.json
	$(BIN)/python -m benchmarks.detection.domains $(EVIDENCE)/domains.json
	$(BIN)/python -m benchmarks.detection.audio --recordings $(RECORDINGS) --json benchmarks/results/audio.json
	$(BIN)/python -m benchmarks.detection.denoisers $(EVIDENCE)/denoisers.json
	$(BIN)/python -m benchmarks.detection.one_level $(EVIDENCE)/one_level.json
	$(BIN)/python -m benchmarks.detection.tables --json benchmarks/results/tables.json
	$(BIN)/python -m benchmarks.detection.chosen_by --json benchmarks/results/chosen_by.json
	$(BIN)/python -m benchmarks.detection.known_data $(EVIDENCE)/known_data.json
	$(BIN)/python -m benchmarks.detection.shifts $(EVIDENCE)/shifts.json
	$(BIN)/python -m benchmarks.drift.real_streams $(EVIDENCE)/real_streams.json
	$(BIN)/python -m benchmarks.detection.statements $(EVIDENCE)/statements.json
	$(BIN)/python -m benchmarks.detection.evidence_page
	$(BIN)/python -m benchmarks.detection.text --data-dir $(DATA) --steps 999 --json benchmarks/results/text.json
	$(BIN)/python -m benchmarks.detection.paper_page
	$(BIN)/python -m benchmarks.drift.history --json benchmarks/results/drift_history.json
	$(BIN)/python -m benchmarks.drift.correlation --json benchmarks/results/drift_correlation.json
	$(BIN)/python -m benchmarks.drift.since --json benchmarks/results/drift_since.json
	$(BIN)/python -m benchmarks.alerts.arrive --json benchmarks/results/arrive.json
	$(BIN)/python -m benchmarks.integrations.chosen_weights --json benchmarks/results/chosen_weights.json
	$(BIN)/python -m benchmarks.integrations.own_calls --json benchmarks/results/own_calls.json
	$(BIN)/python -m benchmarks.integrations.sizes --json benchmarks/results/sizes.json
	$(BIN)/python -m benchmarks.detection.densities --data-dir $(DATA) --pipeline $(DATA)/../models/ddpm-fashion-mnist \
		--json benchmarks/results/densities.json
	$(BIN)/python -m benchmarks.integrations.diffusers --part detection --data-dir $(DATA) \
		--model $(DATA)/../models/ddpm-fashion-mnist --json benchmarks/results/diffusers_detection.json
	$(BIN)/python -m benchmarks.detection.noise_levels --data-dir $(DATA) --json benchmarks/results/noise_levels.json

# Of models and data that packages carry; neither is ever committed. What is measured is kept in
# runs/published, so that a run goes on where it was interrupted.
published: .venv-published/.installed runs/published/.downloaded
	OMP_NUM_THREADS=1 .venv-published/bin/python -m benchmarks.detection.published.galaxies \
		--json benchmarks/results/galaxies.json
	OMP_NUM_THREADS=1 .venv-published/bin/python -m benchmarks.drift.real_series \
		--json benchmarks/results/real_series.json
	OMP_NUM_THREADS=1 .venv-published/bin/python -m benchmarks.detection.published.antibodies \
		--sources runs/published --json benchmarks/results/antibodies.json
	.venv-published/bin/python -m benchmarks.detection.evidence_page

# Only the source distributions of these packages hold sequences.
runs/published/.downloaded: .venv-published/.installed
	$(<D)/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary antpack,abstar,biopython \
		--dest $(@D) antpack==0.3.8.6.1 abstar==0.8.0 biopython==1.88
	touch $@

# Without their dependencies: what they need is here, and some pull torchvision in.
benchmark-peers: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-benchmarks.txt

clean:
	rm -rf $(VENV) .venv-* build dist runs .mypy_cache .pytest_cache .ruff_cache
