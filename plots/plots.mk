# What is measured against other programs.
.PHONY: compare

# The first Python that has both; Debian's own often has PyTorch where another one on the path has not.
COMPARE_PYTHON ?= $(shell for p in python3 /usr/bin/python3; do \
    $$p -c 'import numpy, torch' 2>/dev/null && echo $$p && exit; done; echo python3)

$(BUILD)/memory: $(BUILD)/plots/memory.o $(BUILD)/libflashmoe.a
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $^ -o $@ $(LDLIBS_ALL)

compare: chapter0 chapter1 chapter3 chapter5 chapter6 $(BUILD)/memory ## our best CPU rungs against NumPy, PyTorch and OpenBLAS on two threads, in one run
	@folder=plots/data/$$(./chapter0 --slug) && mkdir -p $$folder && \
	    $(COMPARE_PYTHON) plots/compare.py --memory $(BUILD)/memory --csv $$folder/compare.csv
