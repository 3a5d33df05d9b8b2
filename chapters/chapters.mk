# What runs the chapters: all of them, their ceilings, their figures, their records.
.PHONY: ceilings demo plots record

# The FMA ceiling is one of fused multiply-adds.
$(BUILD)/chapters/ceilings.o: CFLAGS += -ffp-contract=fast

ceilings: chapter0 ## measure this machine's ceilings again: copy, gather, FMA, fork and join
	@./chapter0 --ceilings

demo: $(NUMBERS:%=chapter%) ## run every chapter at small sizes: tables, figures, CSV files
	@for n in $(NUMBERS); do ./chapter$$n --quick || exit 1; echo; done
	@echo "All chapters ran and every rung passed its check. Measurements and figures:"
	@ls build/results/chapter*.csv build/results/chapter*.svg | sed 's/^/  /'

plots: ## draw plots/chapterN.svg from the recorded measurements; DEVICE=amd-epyc-2t picks the machine
	@plots/draw_recorded.sh $(DEVICE)

record: $(NUMBERS:%=chapter%) ## run every chapter at its full sizes and keep the measurements in plots/data
	@folder=plots/data/$$(./chapter0 --slug) && mkdir -p $$folder && \
	for n in $(NUMBERS); do \
	    ./chapter$$n --csv build/record/chapter$$n.csv && cp build/record/chapter$$n.csv $$folder/ || exit 1; \
	done; echo "recorded in $$folder"
