# The exercises, from both sides: a student's and a teacher's.
.PHONY: exercise grade-all course test-course

COURSE = BUILD='$(BUILD)' CC='$(CC)' NVCC='$(NVCC)' chapters/course.sh

exercise: ## try one exercise: make exercise FILE=chapters/3-topk/exercises/1-block.c [AGAINST=rung] [CASE=case]
	@$(if $(FILE),,echo 'make exercise FILE=chapters/3-topk/exercises/1-block.c: which file?' >&2; exit 2)
	@$(MAKE) --no-print-directory $(BUILD)/chapter$(firstword $(subst -, ,$(patsubst chapters/%,%,$(FILE))))
	@$(COURSE) try '$(FILE)' $(if $(AGAINST),--against '$(AGAINST)') $(if $(CASE),--case '$(CASE)') $(if $(QUICK),--quick)

grade-all: $(NUMBERS:%=$(BUILD)/chapter%) ## compile and grade all exercises and solutions; CHAPTER=3
	@$(COURSE) grade $(CHAPTER)

course: ## pack the course without its solutions: build/flashmoe-course.tar.gz
	@$(COURSE) pack '$(BUILD)/flashmoe-course.tar.gz'
	@echo '$(BUILD)/flashmoe-course.tar.gz'

# The pack as a student meets it.
test-course: course
	@MAKE='$(MAKE)' tests/course.sh '$(BUILD)/flashmoe-course.tar.gz'

# The exercises include chapters' headers, and rungs, as a reader's plugin does.
EXERCISES = $(wildcard chapters/*/exercises/*.c chapters/*/solutions/*.c)
$(EXERCISES:%=$(BUILD)/tidy/%): TIDY_FLAGS = -include tests/tidy.h -Ichapters
$(EXERCISES:%=$(BUILD)/tidy/%): CHECKS = --checks=-clang-analyzer-core.NullDereference,-clang-analyzer-core.NonNull*
