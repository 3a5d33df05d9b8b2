# The texts as one site of pages.
.PHONY: setup-book book check-book

setup-book: ## setup, and what make book and make check-book need: pandoc, a headless Chromium
	@tests/setup.sh book

book: ## the texts, notebooks and the sources they link to as one site of HTML pages: build/book/index.html
	@command -v pandoc >/dev/null || { echo "make book needs pandoc: make setup-book installs it"; exit 1; }
	@python3 chapters/book/build.py $(BUILD)/book

check-book: book ## open every page of the book in a browser: links, pictures, the width of a phone
	@$(PYTHON) tests/book.py $(BUILD)/book
