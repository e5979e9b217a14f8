# Every target works from a fresh clone: it sets up what it needs.

.DEFAULT_GOAL := help
SHELL := /bin/sh
MAKEFLAGS += --no-print-directory

# The Python that makes .venv, 3.11 or newer, and the index of torch's CPU builds (empty: the ordinary index).
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Options (EX, ALL, SEED, … as `make help` shows them) are empty unless given, but for these.
OUT ?= gradesheet.json
SUBMISSION ?= exercises
OPTIONS := EX ALL FULL FORCE OUT SUBMISSION DEVICE GITHUB FORGET_BANKS RESTORE PROMPT MODEL DRAFT SEED BUGS END MINUTES N \
	NAME PYTHON TORCH_INDEX VENV
GIVEN := $(foreach one,$(subst \ ,_,$(MAKEOVERRIDES)),$(firstword $(subst =, ,$(one))))
MISTYPED := $(if $(filter 0,$(MAKELEVEL)),$(firstword $(filter-out $(OPTIONS),$(GIVEN))))
$(if $(MISTYPED),$(error $(MISTYPED): no such option; make help shows them, in capitals as in EX=1))

export PYTHONPATH := $(CURDIR)/checks
export PYTHONWARNINGS := ignore
export PIP_USER := 0
VENV := .venv/bin
RUN := $(VENV)/python -P
PIP := $(VENV)/python -m pip install --quiet --disable-pip-version-check
# A .venv that does not run here, because it was made outside the container or elsewhere, is made anew.
ifneq ($(filter-out help,$(or $(MAKECMDGOALS),help)),)
$(shell $(VENV)/python -P -c 'import _pytest' 2>/dev/null || rm -f .venv/ready 2>/dev/null)
endif
# pyproject.toml holds what exercises are judged by. The project's own code is held to more; torch's stubs return Any and
# re-export without saying so.
STRICT := --strict --allow-untyped-calls --no-warn-return-any --implicit-reexport --explicit-package-bases \
	--namespace-packages --no-error-summary --cache-dir build/mypy-strict

##@ Learn
.PHONY: watch
watch: .venv/ready ## judge each exercise when you save it: make watch [EX=1]
	@$(RUN) -m harness watch --ex '$(EX)'

.PHONY: check
check: .venv/ready ## judge once: make check [EX=1] [SUBMISSION=folder] [DEVICE=cuda] [ALL=1]
	@$(RUN) checks/harness/runner/client.py check --ex '$(EX)' --submission '$(SUBMISSION)' $(if $(DEVICE),--device='$(DEVICE)') $(if $(filter-out 0 no,$(ALL)),--all)

.PHONY: board
board: .venv/ready ## the board, after judging what is not yet judged: make board [EX=1] [ALL=1]
	@$(RUN) -m harness save --once --ex '$(EX)' $(if $(filter-out 0 no,$(ALL)),--all)

.PHONY: reset
reset: .venv/ready ## start one over, your work is kept: make reset EX=1
	@$(RUN) -m harness reset --ex '$(EX)'

.PHONY: attempts
attempts: .venv/ready ## what reset kept, or one of them back: make attempts EX=1 [RESTORE=2]
	@$(RUN) -m harness attempts --ex '$(EX)' --restore '$(RESTORE)'

.PHONY: hint
hint: .venv/ready ## a hint on the first open requirement, one more per attempt: make hint EX=1
	@$(RUN) -m harness hint --ex '$(EX)'

.PHONY: progress
progress: .venv/ready ## what happened so far, a table and a picture; yours alone
	@$(RUN) -m harness progress

.PHONY: answer
answer: .venv/ready ## compare with the answer: make answer EX=1 [FORCE=1]
	@$(RUN) -m harness answer --ex '$(EX)' $(if $(filter-out 0 no,$(FORCE)),--force)

.PHONY: bench
bench: $(if $(EX),.venv/bench) ## measure your code beside the answer and others: make bench EX=3 [FULL=1]
	@$(if $(EX),,echo 'make bench wants one exercise, as in: make bench EX=1'; exit 2;) $(RUN) -m harness bench --ex '$(EX)' $(if $(filter-out 0 no,$(FULL)),--full)

.PHONY: demo
demo: .venv/demo ## let a language model write with your code: make demo EX=9 [PROMPT="Once"] [MODEL=folder]
	@$(RUN) -m harness demo --ex '$(EX)' --submission '$(SUBMISSION)' --prompt="$$PROMPT" --model '$(MODEL)' \
		--draft '$(DRAFT)'

##@ Practice
# What a session is opened and ended by.
SESSION = --ex '$(EX)' --seed '$(SEED)' $(if $(filter-out 0 no,$(FORCE)),--force) $(if $(filter-out 0 no,$(END)),--end)

.PHONY: debug
debug: .venv/ready ## mend the answer, in which bugs are planted: make debug EX=1 [BUGS=2] [SEED=7] [END=1] [FORCE=1]
	@$(RUN) -m harness debug $(SESSION) --bugs '$(BUGS)'

.PHONY: optimise
optimise: $(if $(filter-out 0 no,$(END)),.venv/bench,.venv/ready) ## make right but wasteful code cheap: make optimise EX=1 [SEED=7] [END=1] [FORCE=1]
	@$(RUN) -m harness optimise $(SESSION)

.PHONY: review
review: .venv/ready ## review a change of the answer: make review EX=1 [SEED=7] [END=1] [FORCE=1]
	@$(RUN) -m harness review $(SESSION)

.PHONY: interview
interview: .venv/ready ## a mock interview, with a clock and a report: make interview EX=1 [MINUTES=45] [SEED=7] [END=1]
	@$(RUN) -m harness interview --ex '$(EX)' --minutes '$(MINUTES)' --seed '$(SEED)' $(if $(filter-out 0 no,$(END)),--end)

.PHONY: ask
ask: .venv/ready ## what you may ask in the interview, or one answer: make ask [EX=1] [N=3]
	@$(RUN) -m harness ask --ex '$(EX)' --n '$(N)'

.PHONY: practice
practice: .venv/ready ## the practice sessions and how they stand: make practice [EX=1]
	@$(RUN) -m harness practice --ex '$(EX)'

##@ Teach
.PHONY: grade
grade: .venv/ready ## write the gradesheet: make grade [EX=1] [SUBMISSION=folder] [OUT=gradesheet.json] [GITHUB=1]
	@CUDA_VISIBLE_DEVICES= $(RUN) -m harness grade --ex '$(EX)' --submission '$(SUBMISSION)' --out '$(OUT)' \
		$(if $(filter-out 0 no,$(GITHUB)),--github) $(if $(filter-out 0 no,$(FORGET_BANKS)),--forget-banks)

##@ Set up
.PHONY: setup
setup: .venv/ready ## install everything into .venv

.venv/ready: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is not there; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) checks/harness/setup/install.py '$(TORCH_INDEX)'

.PHONY: doctor
doctor: ## what works here, what does not, and what to do about it
	@command -v $(PYTHON) >/dev/null || { echo "!! Python: $(PYTHON) is not there; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) checks/harness/setup/doctor.py '$(VENV)'

.PHONY: hooks
hooks: .venv/ready ## install the git hooks of .pre-commit-config.yaml
	@$(RUN) -m pre_commit install

##@ Develop
.PHONY: test
test: .venv/test lint ## the project's own tests: answers, mistakes, variants, starters, harness
	@$(RUN) -m pytest -c checks/selftest/pytest.ini checks/selftest -n 3 --dist loadfile --no-loadscope-reorder

# All files at once: mypy's caches are then filled once for all of it.
.venv/test: requirements-bench.txt requirements-demo.txt requirements-lint.txt requirements-test.txt .venv/ready
	@$(PIP) $(patsubst %,-r %,$(wildcard requirements-*.txt))
	@$(RUN) -m harness.testing.lint && touch .venv/bench .venv/demo .venv/lint $@

.PHONY: new
new: .venv/ready ## begin an exercise: make new EX=12 NAME="Grouped query attention"
	@$(RUN) -m devtools new --ex '$(EX)' --name '$(NAME)'

.PHONY: check-exercise
check-exercise: .venv/ready ## what an exercise lacks: make check-exercise EX=12
	@$(RUN) -m devtools check-exercise --ex '$(EX)'

.PHONY: bank
bank: .venv/ready ## every mistake and variant through every check: make bank [EX=1]
	@$(RUN) -m devtools bank --ex '$(EX)'

.PHONY: test-container
test-container: .venv/ready ## the dev container, for real; needs Docker and Node
	@$(RUN) -m devtools.container

.PHONY: bench-loop
bench-loop: .venv/bench ## measure save -> board: build/bench/loop.png
	@$(RUN) -m devtools.bench_loop

.PHONY: picture
picture: .venv/bench ## render README's picture of the watch
	@$(RUN) -m devtools.screenshot

.venv/bench: requirements-bench.txt .venv/ready
	@$(PIP) -r $<
	@$(RUN) -m harness.testing.lint && touch $@

.venv/demo: requirements-demo.txt .venv/ready
	@$(PIP) -r $<
	@touch $@

.venv/lint: requirements-lint.txt .venv/ready
	@$(PIP) -r $<
	@$(RUN) -m harness.testing.lint && touch $@

.PHONY: lint
lint: .venv/lint ## ruff and mypy on everything but exercises/
	@$(VENV)/ruff check --quiet --extend-exclude exercises .
	@$(VENV)/ruff format --check --quiet --extend-exclude exercises .
	@$(RUN) -c 'from importlinter.cli import lint_imports_command as run; run()' --no-cache --no-logo >build/imports.txt || { cat build/imports.txt; exit 1; }
	@$(RUN) -m mypy $(STRICT) --exclude '/variants/|/(starter|answer)\.py$$' checks
	@$(RUN) -m devtools.spliced build/spliced
	@$(RUN) -m mypy --no-error-summary --cache-dir build/mypy answers checks/ex*/starter.py build/spliced

.PHONY: format
format: .venv/ready ## ruff's formatting and fixes, on everything but exercises/
	@$(VENV)/ruff check --fix --quiet --extend-exclude exercises . ; $(VENV)/ruff format --extend-exclude exercises .

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
