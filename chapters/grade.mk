# A kernel of one's own: make grade N=4 KERNEL=my.c
.PHONY: grade

grade: ## a verdict and a score for your kernel: make grade N=4 KERNEL=my.c [AGAINST=rung] [JSON=file]
	@$(if $(and $(N),$(KERNEL)),,echo 'make grade N=4 KERNEL=my.c: which chapter, which kernel?' >&2; exit 2)
	@$(MAKE) --no-print-directory chapter$(N)
	@./chapter$(N) --grade '$(KERNEL)' $(if $(AGAINST),--against '$(AGAINST)') $(if $(JSON),--json '$(JSON)') \
	  $(if $(QUICK),--quick)

# Where a plugin finds its headers, and what compiles it.
$(BUILD)/chapters/plugin.o: override CFLAGS += -DFMOE_SOURCE='"$(CURDIR)"' -DFMOE_CC='"$(CC)"' -DFMOE_NVCC='"$(or $(NVCC),nvcc)"'
