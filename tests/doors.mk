# The sentences about plugins start a chapter's program as their worker.
$(BUILD)/tests/run: | $(BUILD)/chapter0

# Plugins include plugin.h as a reader's would.
$(BUILD)/tidy/tests/plugins/%: TIDY_FLAGS = -include tests/tidy.h -Ichapters
