# The suite, and what else is held to account.
.PHONY: test mutants

# What limits a run reaches the test program through its environment.
export CHAPTER ONLY SEED SIZES

test: $(BUILD)/tests/run ## the suite as a text; CHAPTER=3, ONLY=3.1, SEED=1, SIZES=1,2,3
	@$(BUILD)/tests/run

mutants: ## plant known bugs, one at a time: every sentence must catch one; CHAPTER=3
	@python3 tests/mutants/run.py $(if $(CHAPTER),--chapter $(CHAPTER))
