# flashmoe.c. `make help` lists the targets.
#
# Everything built lands in $(BUILD), except the chapter programs, which lie here at the top.
ifneq ($(and $(filter setup,$(MAKECMDGOALS)),$(filter-out setup,$(MAKECMDGOALS))),)

# `make setup test`: setup first, whatever -j says; then the rest, by a make that sees what was installed.
AFTER = $(filter-out setup,$(MAKECMDGOALS))
.PHONY: setup after-setup $(AFTER)
setup:
	@tests/setup.sh
after-setup: setup
	@+$(MAKE) --no-print-directory $(AFTER)
$(AFTER): after-setup
	@:

else

BUILD  ?= build
CC     ?= cc
OPT    ?= -O3 -march=native
# -ffp-contract=off: a fused multiply-add in one build and not in another would give different bits.
CFLAGS ?= $(OPT) -g
CFLAGS_ALL = -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -fopenmp $(CFLAGS)
LDLIBS_ALL = -ljansson -lm -ldl $(LDLIBS)

# V=1 shows the commands.
Q       = $(if $(V),,@)
SAY     = @$(if $(V),:,echo '  ')

REF     = $(wildcard ref_cpu/*.c)
SHARED  = $(wildcard chapters/*.c)
RUNGS   = $(filter-out %/main.c,$(wildcard chapters/*/*.c))
TESTS  ?= $(filter-out tests/race.c,$(wildcard tests/*.c))
NUMBERS = 0 1 2 3 4 5 6 7 8 9

object  = $(patsubst %.c,$(BUILD)/%.o,$(1))
LIBRARY = $(call object,$(REF) $(SHARED) $(RUNGS))

.DEFAULT_GOAL := help
.PHONY: help clean $(NUMBERS:%=chapter%)

help: ## this list
	@grep -hE '^#?[a-zN-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^#//; s/:.*## /\t/' | expand -t 16

$(BUILD)/ref_cpu/%.o: CFLAGS += -ffp-contract=off
# The rungs may fuse (gcc would not in ISO C): they are held to a limit of error, not to bits of another build.
$(call object,$(RUNGS) chapters/gemm.c): CFLAGS += -ffp-contract=fast
$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(SAY) 'CC  $<'
	$(Q)$(CC) $(CFLAGS_ALL) -MMD -MP -c $< -o $@

$(BUILD)/libflashmoe.a: $(LIBRARY)
	$(SAY) 'AR  $@'
	@rm -f $@
	$(Q)ar rcs $@ $^

#chapterN: ## build one chapter's program, N from 0 to 9: make chapter3 && ./chapter3
# Always asked, never rebuilt without need: the program lies at the top, its parts in $(BUILD).
$(NUMBERS:%=chapter%): chapter%: $(BUILD)/chapter%
	@cp -u $< $@
.SECONDEXPANSION:
$(NUMBERS:%=$(BUILD)/chapter%): $(BUILD)/chapter%: $$(call object,$$(wildcard chapters/%-*/main.c)) $(BUILD)/libflashmoe.a
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $^ -o $@ $(LDLIBS_ALL)

$(BUILD)/tests/run: $(call object,$(TESTS)) $(BUILD)/libflashmoe.a
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $^ -o $@ -lcriterion $(LDLIBS_ALL)

clean: ## remove everything that was built
	rm -rf $(BUILD) $(NUMBERS:%=chapter%)

-include $(wildcard chapters/*.mk plots/*.mk tests/*.mk tests/*/*.mk)
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

endif
