# The suite, and what else is held to account.
.PHONY: test mutants sanitize sanitize-cuda setup prose check check-format check-cppcheck check-tidy check-suite check-prose check-links

setup: ## install what is missing, with apt (as root or with sudo)
	@tests/setup.sh

# What limits a run reaches the test program through its environment.
export CHAPTER ONLY SEED SIZES CUDA

test: $(BUILD)/tests/run ## the suite as a text; CHAPTER=3, ONLY=3.1, CUDA=1, SEED=1, SIZES=1,2,3
	@$(BUILD)/tests/run

mutants: ## plant known bugs, one at a time: every sentence must catch one; CHAPTER=3, CUDA=1
	@python3 tests/mutants/run.py $(if $(CHAPTER),--chapter $(CHAPTER)) $(if $(filter 1,$(CUDA)),--cuda-only)

# ---- Sanitizers: tests/sanitize.sh builds these in folders of their own ----------------------------------------------

sanitize: ## the suite under ASan, LSan and UBSan, then the OpenMP code under a race detector
	@MAKE='$(MAKE)' BUILD='$(BUILD)' tests/sanitize.sh

sanitize-cuda: ## every CUDA kernel under compute-sanitizer's four tools, where there is a device
ifeq ($(NVCC),)
	@echo "compute-sanitizer: skipped, no nvcc"
else
	@MAKE='$(MAKE)' BUILD='$(BUILD)' tests/sanitize/cuda.sh

$(BUILD)/tests/sanitize/run: $(BUILD)/tests/sanitize/run.o $(BUILD)/tests/sanitize/faults.cu.o $(BUILD)/libflashmoe.a
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $^ -o $@ $(LDLIBS_ALL)
endif

# The framework with sentences that must fail.
$(BUILD)/tests/self/run: $(call object,tests/self/faults.c tests/literate.c tests/main.c) $(BUILD)/libflashmoe.a
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $^ -o $@ -lcriterion $(LDLIBS_ALL)

$(BUILD)/tests/race: $(call object,tests/race.c) $(BUILD)/libflashmoe.a
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $^ -o $@ $(LDLIBS_ALL)

# ---- What needs no run: formats, linters, texts ----------------------------------------------------------------------

FOLDERS = ref_cpu chapters chapters/* chapters/*/exercises chapters/*/solutions tests tests/* cuda cuda/*
# tests/self makes its mistakes on purpose.
C_FILES = $(filter-out tests/self/%,$(wildcard $(FOLDERS:%=%/*.c)))
FORMATTED = $(wildcard $(FOLDERS:%=%/*.c) $(FOLDERS:%=%/*.h) $(FOLDERS:%=%/*.cu) $(FOLDERS:%=%/*.cuh))
TEXTS = $(wildcard *.md */README.md */*/README.md chapters/*.md chapters/*/exercises/*.md chapters/*/solutions/*.md)
COG = PYTHONDONTWRITEBYTECODE=1 .venv/bin/cog -I plots -p "from prose import *" --verbosity=1

check: check-format check-cppcheck check-tidy check-suite check-prose check-links ## format, linters, texts

check-format:
	@clang-format --dry-run -Werror $(FORMATTED)
	@echo "ok  clang-format: $(words $(FORMATTED)) files"

# Switched off: a rung carves its workspace into arrays of several types (invalidPointerCast); shifts of negative numbers
# are arithmetic on every compiler (shiftTooManyBitsSigned); log(0) is -inf, as meant (invalidFunctionArg).
CPPCHECK = cppcheck --std=c11 --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr \
  --suppress=missingIncludeSystem --suppress=invalidPointerCast --suppress=shiftTooManyBitsSigned \
  --suppress=invalidFunctionArg -D__GNUC__ -D__x86_64__

check-cppcheck:
	@$(CPPCHECK) -j 2 $(C_FILES)
	@echo "ok  cppcheck: $(words $(C_FILES)) files"

# Each file has a stamp, so that only what changed is read again.
TIDY_STAMPS = $(C_FILES:%=$(BUILD)/tidy/%)
check-tidy:
	@+$(MAKE) --no-print-directory -j2 $(TIDY_STAMPS)
	@echo "ok  clang-tidy: $(words $(C_FILES)) files"

$(TIDY_STAMPS): $(BUILD)/tidy/%: % .clang-tidy $(filter %.h,$(FORMATTED))
	@mkdir -p $(@D)
	@clang-tidy --quiet $(CHECKS) $< -- -std=c11 -D_GNU_SOURCE -fopenmp -Wall -Wextra $(TIDY_FLAGS) >$@.log 2>/dev/null \
	  || { cat $@.log; exit 1; }
	@touch $@

# A rung asked for its workspace's size walks it with NULL, and the analyzer cannot tell the two walks apart. What a
# sentence allocates goes with its process, so a failing one need not free it.
$(RUNGS:%=$(BUILD)/tidy/%): CHECKS = --checks=-clang-analyzer-core.NullDereference,-clang-analyzer-core.NonNull*
$(BUILD)/tidy/tests/%: CHECKS = --checks=-clang-analyzer-unix.Malloc
# status.c defines what tests/tidy.h wraps.
$(BUILD)/tidy/%: TIDY_FLAGS = -include tests/tidy.h
$(BUILD)/tidy/ref_cpu/status.c: TIDY_FLAGS =

# What the suite prints for sentences that fail in every way.
check-suite: $(BUILD)/tests/self/run
	@CHAPTER=0 ONLY= SIZES= SEED=1 LITERATE_TIMEOUT=2 $< 2>&1 | diff tests/self/expected.txt -
	@echo "ok  suite: failures of every kind are reported"

.venv/bin/cog:
	@echo "no $@: run make setup"; exit 1

# Both first have to refuse a text that is wrong on purpose.
check-prose: .venv/bin/cog
	@! $(COG) --check tests/self/stale.md >/dev/null 2>&1
	@$(COG) --check --diff --check-fail-msg="run make prose" $(TEXTS)
	@echo "ok  prose: $(words $(TEXTS)) texts quote what is there"

check-links:
	@! python3 plots/prose.py tests/self/stale.md >/dev/null
	@python3 plots/prose.py $(TEXTS)
	@echo "ok  links: every file that a text links to is there"

prose: .venv/bin/cog ## put code, recorded figures and sentences into the texts again
	@$(COG) -r $(TEXTS)
