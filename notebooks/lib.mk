# The C library, what installs it, and the notebooks that stand on it.
.PHONY: lib install uninstall notebooks test-lib

# libflashmoe is the reference and the last rungs of the CPU ladders, libflashmoe_cuda the kernels.
# $(BUILD)/libflashmoe.a is another thing: all that the chapters are made of.
LIB        = $(BUILD)/lib
VERSION_OF = $(shell sed -n 's/^.define FMOE_VERSION_$(1) *//p' ref_cpu/fmoe_version.h)
LIB_MAJOR := $(call VERSION_OF,MAJOR)
VERSION   := $(LIB_MAJOR).$(call VERSION_OF,MINOR).$(call VERSION_OF,PATCH)
# While the first number is 0 the second one says what fits together.
ABI       := $(if $(filter 0,$(LIB_MAJOR)),0.$(call VERSION_OF,MINOR),$(LIB_MAJOR))
LIB_NAMES  = flashmoe $(if $(NVCC),flashmoe_cuda)
SHARED_LIB = $(LIB)/lib$(1).so.$(VERSION)
LIB_FILES  = $(foreach name,$(LIB_NAMES),$(LIB)/lib$(name).a $(call SHARED_LIB,$(name)))

lib: $(LIB_FILES) ## the C library: build/lib/libflashmoe (.a, .so), and libflashmoe_cuda where there is an nvcc

# Code that a shared library can hold has objects of its own; the kernels' are the same ones, since nvcc takes minutes.
NVCCFLAGS += -Xcompiler -fPIC
FAST = $(wildcard chapters/[1-6]-*/cpu.c) chapters/gemm.c chapters/openblas.c
PIC  = $(patsubst %.c,$(LIB)/%.o,$(REF) $(FAST) chapters/fmoe_cpu.c)

$(LIB)/%.o: CFLAGS += -fPIC
$(LIB)/ref_cpu/%.o: CFLAGS += -ffp-contract=off
$(FAST:%.c=$(LIB)/%.o): CFLAGS += -ffp-contract=fast
$(LIB)/%.o: %.c
	@mkdir -p $(@D)
	$(SAY) 'CC  $<, for the library'
	$(Q)$(CC) $(CFLAGS_ALL) -MMD -MP -c $< -o $@

$(LIB)/libflashmoe.a: $(PIC)
	$(SAY) 'AR  $@'
	@rm -f $@
	$(Q)ar rcs $@ $^

# The names that a linker and a loader look for lie beside the file.
LINK_NAMES = for end in '' .$(ABI); do ln -sf $(@F) $(@:.$(VERSION)=)$$end; done
SHARED_FLAGS = -shared -Wl,-soname,lib$(1).so.$(ABI) -Wl,--version-script,ref_cpu/exports.map -Wl,--no-undefined

$(call SHARED_LIB,flashmoe): $(PIC) ref_cpu/exports.map
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $(call SHARED_FLAGS,flashmoe) $(PIC) -o $@ -ljansson -lm -ldl
	@$(LINK_NAMES)

ifneq ($(NVCC),)
# All kernels but those that only measure. The shared library takes what the header's functions call, and nothing else.
LIB_KERNELS = $(filter-out cuda/machine/%,$(CUDA_KERNELS))
OPEN       := (
ENTRIES     = $(shell grep -oE 'fmoe_cuda_\w+[$(OPEN)]' cuda/fmoe_cuda.h | tr -d '$(OPEN)' | sort -u)

$(LIB)/libflashmoe_cuda.a: $(LIB_KERNELS:%.cu=$(BUILD)/%.cu.o)
	@mkdir -p $(@D)
	$(SAY) 'AR  $@'
	@rm -f $@
	$(Q)ar rcs $@ $^

$(call SHARED_LIB,flashmoe_cuda): $(LIB)/libflashmoe_cuda.a $(call SHARED_LIB,flashmoe) cuda/fmoe_cuda.h
	$(SAY) 'LD  $@'
	$(Q)$(CC) $(CFLAGS_ALL) $(call SHARED_FLAGS,flashmoe_cuda) -Wl,-rpath,'$$ORIGIN' \
	    $(ENTRIES:%=-Wl,--require-defined=%) -o $@ $< -L$(LIB) -lflashmoe $(CUDA_LIBS) -ldl -lm
	@$(LINK_NAMES)
endif

# ---- Installing ------------------------------------------------------------------------------------------------------

PREFIX     ?= /usr/local
INCLUDEDIR ?= $(PREFIX)/include
LIBDIR     ?= $(PREFIX)/lib
INTO_INCLUDE = $(DESTDIR)$(INCLUDEDIR)/flashmoe
INTO_LIB     = $(DESTDIR)$(LIBDIR)
FILL_IN = sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|' -e 's|@LIBDIR@|$(LIBDIR)|' \
              -e 's|@VERSION@|$(VERSION)|' -e 's|@CUDA_LIBDIR@|$(CUDA_HOME)/lib64|'
PUBLIC_HEADERS = ref_cpu/fmoe.h ref_cpu/fmoe_version.h chapters/fmoe_cpu.h $(if $(NVCC),cuda/fmoe_cuda.h)
PC_FILES       = ref_cpu/flashmoe.pc.in $(if $(NVCC),cuda/flashmoe_cuda.pc.in)

# Installed, the headers lie in one folder.
install: lib ## headers, libraries and pkg-config files into PREFIX (/usr/local); DESTDIR is respected
	@mkdir -p $(INTO_INCLUDE) $(INTO_LIB)/pkgconfig
	@for header in $(PUBLIC_HEADERS); do \
	    sed 's|"\.\./ref_cpu/|"|' $$header >$(INTO_INCLUDE)/$${header##*/} || exit 1; done
	@for pc in $(PC_FILES); do name=$${pc##*/}; $(FILL_IN) $$pc >$(INTO_LIB)/pkgconfig/$${name%.in} || exit 1; done
	@for name in $(LIB_NAMES); do \
	    install -m 644 $(LIB)/lib$$name.a $(INTO_LIB) && install -m 755 $(LIB)/lib$$name.so.$(VERSION) $(INTO_LIB) && \
	    ln -sf lib$$name.so.$(VERSION) $(INTO_LIB)/lib$$name.so.$(ABI) && \
	    ln -sf lib$$name.so.$(VERSION) $(INTO_LIB)/lib$$name.so || exit 1; done
	@echo "installed flashmoe $(VERSION) in $(DESTDIR)$(PREFIX); a system folder needs an ldconfig now"

uninstall: ## what make install put into PREFIX
	@rm -rf $(INTO_INCLUDE)
	@for name in flashmoe flashmoe_cuda; do \
	    rm -f $(INTO_LIB)/lib$$name.a $(INTO_LIB)/lib$$name.so $(INTO_LIB)/lib$$name.so.* \
	        $(INTO_LIB)/pkgconfig/$$name.pc; done

# ---- Testing and notebooks -------------------------------------------------------------------------------------------

PYTHON ?= .venv/bin/python

test-lib: lib ## install into a scratch folder, compile tests/lib/example.c as a user would, try the Python module
	@MAKE='$(MAKE)' BUILD='$(BUILD)' CC='$(CC)' PYTHON='$(PYTHON)' tests/lib/run.sh

notebooks: $(LIB_FILES) ## execute every notebook into build/notebooks; KEEP=1 keeps the output in notebooks/
	@FLASHMOE_LIB=$(abspath $(LIB)) $(PYTHON) notebooks/execute.py $(if $(KEEP),notebooks,$(BUILD)/notebooks)

# The example includes the headers as they lie once installed.
$(BUILD)/tidy/tests/lib/%: TIDY_FLAGS = -Iref_cpu
