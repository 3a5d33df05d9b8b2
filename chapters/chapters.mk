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

# The figures that chapters have besides their ladders.
FIGURES_0 = gather
FIGURES_7 = crossover
FIGURES_8 = breakdown

plots: ## draw plots/chapterN.svg from the recorded measurements; DEVICE=amd-epyc-2t picks the machine
	@$(foreach n,$(NUMBERS),$(foreach s,$(if $(filter 0,$n),,ladder) $(FIGURES_$n),\
	    csv=$$(ls plots/data/$(or $(DEVICE),*)/chapter$n.csv 2>/dev/null | head -n 1); \
	    svg=plots/chapter$n$(if $(filter ladder,$s),,-$s).svg; \
	    title=$$(sed -n '1s/^#* *//p' chapters/$n-*/README.md 2>/dev/null); \
	    if [ -n "$$csv" ]; then \
	        gnuplot -e "csv='$$csv'; svg='$$svg'; title='$$title'" plots/$s.gp && echo "$$svg from $$csv"; \
	    fi;))

record: $(NUMBERS:%=chapter%) ## run every chapter at its full sizes and keep the measurements in plots/data
	@folder=plots/data/$$(./chapter0 --slug) && mkdir -p $$folder && \
	for n in $(NUMBERS); do \
	    ./chapter$$n --csv build/record/chapter$$n.csv && cp build/record/chapter$$n.csv $$folder/ || exit 1; \
	done; echo "recorded in $$folder"
