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
LDLIBS_ALL = -ljansson -lm -ldl $(CUDA_LIBS) $(LDLIBS)

# V=1 shows the commands.
Q       = $(if $(V),,@)
SAY     = @$(if $(V),:,echo '  ')

# CUDA is used where there is an nvcc; NVCC= builds without it. The kernels are compiled for ARCHS: for the GPU of this
# machine, or for all that the rungs' levels need where there is none.
ifeq ($(origin NVCC),undefined)
NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
endif
ifneq ($(NVCC),)
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(NVCC))))
ifeq ($(origin ARCHS),undefined)
# 90 becomes 90a, which alone has wgmma.
KNOWN := $(patsubst sm_90,sm_90a,$(shell $(NVCC) --list-gpu-code))
KNOWN := $(KNOWN:sm_%=%)
GPU   := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/\.//p' | sed 's/^90$$/90a/')
ARCHS := $(or $(filter $(GPU),$(KNOWN)),$(filter 75 80 90a,$(KNOWN)))
endif
CUDA_KERNELS = $(wildcard cuda/*.cu cuda/*/*.cu)
CUDA_LIBS  = -L$(CUDA_HOME)/lib64 -lcudart_static -lpthread -lrt -lstdc++
CFLAGS_ALL += -DFMOE_WITH_CUDA -isystem $(CUDA_HOME)/include
# No code beyond 90a: newer GPUs compile the sm_80 kernels' PTX when they start.
GENCODE    = $(foreach arch,$(ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch)) \
             $(foreach arch,$(filter 80,$(ARCHS)),-gencode arch=compute_$(arch),code=compute_$(arch))
# LINEINFO=1 is for profilers that show the source; it makes the programs three times as large.
NVCCFLAGS  = -std=c++17 -O3 $(if $(LINEINFO),-lineinfo) -DFMOE_WITH_CUDA -DFMOE_ARCHS='"$(ARCHS)"' $(GENCODE) \
             -Xcompiler -Wall,-Wextra,-fopenmp --Werror all-warnings
endif

REF     = $(wildcard ref_cpu/*.c)
SHARED  = $(wildcard chapters/*.c)
RUNGS   = $(filter-out %/main.c,$(wildcard chapters/*/*.c))
LADDERS = $(wildcard cuda/*/*.c)
TESTS  ?= $(filter-out tests/race.c,$(wildcard tests/*.c))
NUMBERS = 0 1 2 3 4 5 6 7 8 9

object  = $(patsubst %.c,$(BUILD)/%.o,$(1))
LIBRARY = $(call object,$(REF) $(SHARED) $(RUNGS) $(LADDERS)) $(CUDA_KERNELS:%.cu=$(BUILD)/%.cu.o)

.DEFAULT_GOAL := help
.PHONY: help clean FORCE $(NUMBERS:%=chapter%)

help: ## this list
	@grep -hE '^#?[a-zN-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^#//; s/:.*## /\t/' | expand -t 16

$(BUILD)/ref_cpu/%.o: CFLAGS += -ffp-contract=off
# The rungs may fuse (gcc would not in ISO C): they are held to a limit of error, not to bits of another build.
$(call object,$(RUNGS) chapters/gemm.c): CFLAGS += -ffp-contract=fast
$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(SAY) 'CC  $<'
	$(Q)$(CC) $(CFLAGS_ALL) -MMD -MP -c $< -o $@

$(BUILD)/%.cu.o: %.cu $(BUILD)/archs
	@mkdir -p $(@D)
	$(SAY) 'NVCC  $<'
	$(Q)$(NVCC) $(NVCCFLAGS) -MMD -MP -MF $(@:.o=.d) -c $< -o $@

# Changes when something else is asked for.
$(BUILD)/archs: FORCE
	@mkdir -p $(@D)
	@echo '$(strip $(ARCHS) $(LINEINFO:%=lineinfo))' | cmp -s - $@ || echo '$(strip $(ARCHS) $(LINEINFO:%=lineinfo))' >$@
FORCE:

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

-include $(wildcard chapters/*.mk plots/*.mk tests/*.mk tests/*/*.mk notebooks/*.mk)
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

endif
