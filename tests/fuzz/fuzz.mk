# libFuzzer comes with clang. The kept corpus is copied first: what a run adds stays in $(BUILD).
FUZZ_SECONDS ?= 300
FUZZ_CC      ?= clang
FUZZ_DIR      = $(BUILD)/fuzz

.PHONY: fuzz
fuzz: $(FUZZ_DIR)/safetensors ## fuzz the file reader with ASan and UBSan (FUZZ_SECONDS=300)
	@mkdir -p $(FUZZ_DIR)/corpus && cp tests/fuzz/corpus/* $(FUZZ_DIR)/corpus
	$(FUZZ_DIR)/safetensors -max_total_time=$(FUZZ_SECONDS) -timeout=10 -max_len=4096 -print_final_stats=1 \
	    -dict=tests/fuzz/safetensors.dict -artifact_prefix=$(FUZZ_DIR)/ $(FUZZ_DIR)/corpus

# The whole reference: the reader needs little of it, but that little may move.
$(FUZZ_DIR)/safetensors: tests/fuzz/safetensors.c $(REF) ref_cpu/fmoe.h ref_cpu/check.h
	@mkdir -p $(@D)
	$(FUZZ_CC) -std=c11 -D_GNU_SOURCE -O1 -g -fopenmp -Wall -Wextra -Wno-pass-failed -Werror \
	    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $(filter %.c,$^) -o $@ -ljansson -lm
