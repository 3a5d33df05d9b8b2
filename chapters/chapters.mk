# What runs the chapters: all of them, their ceilings, their figures, their records.
.PHONY: ceilings demo plots record

# The FMA ceiling is one of fused multiply-adds.
$(BUILD)/chapters/ceilings.o: CFLAGS += -ffp-contract=fast

ceilings: chapter0 ## measure this machine's ceilings again: copy, gather, FMA, fork and join
	./chapter0 --ceilings
