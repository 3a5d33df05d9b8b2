"""Makes the book, the project's texts as one site of plain pages: python3 chapters/book/build.py FOLDER

The site mirrors the repository: chapters/3-topk/README.md becomes chapters/3-topk/index.html, a notebook becomes a page,
every source that a text links to becomes a page of highlighted code, a picture is copied. So relative links stay as they
are but for their endings. pandoc reads and writes; in between this program goes over what it read (pandoc's JSON).
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.dont_write_bytecode = True
sys.path[:0] = [str(HERE), str(ROOT / "plots")]

import figures  # noqa: E402
import prose  # noqa: E402

LANGUAGES = {".c": "c", ".h": "c", ".cu": "cpp", ".cuh": "cpp", ".py": "python", ".sh": "bash", ".json": "json"}
PICTURES = (".svg", ".png")


class BookError(Exception):
    pass


# ---- Pages ----------------------------------------------------------------------------------------------------------


def found(pattern):
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def page_path(source):
    """Where in the book a file or folder of the repository lies."""
    if (ROOT / source).is_dir():
        return source / "index.html"
    if source.name == "README.md":
        return source.with_name("index.html")
    if source.suffix in (".md", ".ipynb"):
        return source.with_suffix(".html")
    return source if source.suffix in PICTURES else source.with_name(source.name + ".html")


def title_of(source):
    text = (ROOT / source).read_text()
    if source.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    return re.search(r"^# (.*)", text, re.MULTILINE)[1].replace("`", "")


class Page:
    """source: what it is made of. group: its heading in the list of contents, None to leave it out. text: its Markdown,
    where it is made here and no file has it."""

    def __init__(self, source, group=None, short=None, title=None, text=None):
        self.source, self.group, self.text = Path(source), group, text
        self.path = self.source if text is not None else page_path(self.source)
        self.title = title or title_of(self.source)
        self.short = short or self.title
        self.sections = []  # (level, anchor, heading), once it is converted


def pages_in_order():
    """What previous and next walk through."""
    chapters = []
    for source in found("chapters/[0-9]-*/README.md"):
        page = Page(source, "Chapters")
        page.number = int(source.parent.name[0])
        page.short = re.sub(r"Chapter (\d+): (.)", lambda m: f"{m[1]}. {m[2].upper()}", page.title)
        chapters.append(page)
    pages = [Page("README.md", "", "flashmoe.c"), *chapters]
    pages.append(Page("exercises.html", "Beside them", title="Exercises", text=exercises(chapters)))
    pages += [Page(source) for page in chapters for source in found(f"{page.source.parent}/exercises/*.md")]
    pages += [Page(source, "Beside them") for source in found("chapters/*.md")]
    pages.append(Page("sentences.html", "Beside them", title="What the tests promise", text=sentences(chapters)))
    pages.append(Page("plots/README.md", "Beside them", "Recorded figures", title="Recorded figures"))
    pages.append(Page("cuda/README.md", "Beside them", "The CUDA kernels", title="The CUDA kernels"))
    pages.append(Page("notebooks/README.md", "Notebooks", "About them", title="Notebooks"))
    pages += [Page(source, "Notebooks") for source in found("notebooks/*.ipynb")]
    return pages


def list_sentences(chapter):
    """The chapter's sentences, why, and against what, by number."""
    matches = (match for path in sorted(ROOT.glob("tests/*.c")) for match in prose.SENTENCE.finditer(path.read_text()))
    return {int(m[2]): [prose.c_string(m[i]) for i in (3, 4, 5)] for m in matches if int(m[1]) == chapter}


def sentences(chapters):
    """The page of every test sentence, each with its number as an anchor."""
    text, count = [], 0
    for chapter in chapters:
        text.append(f"\n## {chapter.title}\n")
        listed = list_sentences(chapter.number)
        for n, (sentence, why, against) in sorted(listed.items()):
            number = f"{chapter.number}.{n}"
            text.append(f'* <span id="s{number}">**{number}**</span> {sentence} *Why:* {why}. *Against:* {against}.')
        count += len(listed)
    written = sum(len(re.findall(r"^\w*SENTENCE\(", path.read_text(), re.MULTILINE)) for path in ROOT.glob("tests/*.c"))
    if count != written:
        raise BookError(f"the tests have {written} sentences, their page has {count}")
    head = (
        "Every test is a sentence with a number in its chapter, a reason, and something independent that it is checked "
        f"against. These are the {count} sentences of the suite. `make test` runs them and prints them in this order, "
        "`make test ONLY=3.1` runs one. `make mutants` plants known bugs, one at a time: every sentence has to catch one."
    )
    return "\n".join([head, *text])


def exercises(chapters):
    """The page that leads to each chapter's exercises: in the text, and what lies in its folder of exercises."""
    text = ["Every chapter ends in exercises, from a change of one constant to a kernel of one's own.\n"]
    for chapter in chapters:
        headings = re.findall(r"^## (Exercises.*)", (ROOT / chapter.source).read_text(), re.MULTILINE)
        if not headings:
            raise BookError(f"{chapter.source} has no exercises")
        text.append(f"\n## {chapter.title}\n\n* [In the chapter]({chapter.source}#{headings[-1].lower().replace(' ', '-')})")
        folder = chapter.source.parent / "exercises"
        text += [f"* [{title_of(source)}]({source})" for source in found(f"{folder}/*.md")]
        starters = [source for source in found(f"{folder}/*") if source.suffix in (".c", ".cu", ".py")]
        text += ["* To start from: " + ", ".join(f"[{source.name}]({source})" for source in starters)] if starters else []
    return "\n".join(text)


# ---- pandoc's elements ----------------------------------------------------------------------------------------------


def element(kind, *content):
    return {"t": kind, "c": content[0] if len(content) == 1 else list(content)}


def plain_text(x):
    if isinstance(x, list):
        return "".join(map(plain_text, x))
    if not isinstance(x, dict):
        return ""
    if x["t"] in ("Space", "SoftBreak"):
        return " "
    return x["c"] if x["t"] == "Str" else x["c"][1] if x["t"] == "Code" else plain_text(x.get("c"))


def table_rows(part):
    """The cells, row by row, of a table's head, bodies or foot as pandoc nests them."""
    if isinstance(part, list) and len(part) == 2 and isinstance(part[1], list) and part[1] and is_cell(part[1][0]):
        return [[cell[4] for cell in part[1]]]
    return [row for x in part for row in table_rows(x)] if isinstance(part, list) else []


def is_cell(x):
    return isinstance(x, list) and len(x) == 5 and isinstance(x[1], dict) and str(x[1].get("t")).startswith("Align")


def link_to(name, url):
    return element("Link", ["", [], []], [element("Str", name)], [url, ""])


def scrolling(blocks, *classes):
    return element("Div", ["", ["scroll", *classes], []], blocks)


def picture(source, shows, caption=""):
    shows, caption = html.escape(shows), html.escape(caption)
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    image = f'<div class="scroll"><img src="{source}" alt="{shows}"></div>'
    return element("RawBlock", "html", f"<figure>{image}{caption}</figure>")


def plain_brackets(math):
    """pandoc lets every bracket grow; here only those grow that were written with \\left."""
    return math[0] if "\\left" in math[0] else math[0].replace('stretchy="true"', 'stretchy="false"')


def read_formulas():
    """The plain blocks of formulas.txt and their TeX."""
    formulas = {}
    for entry in (HERE / "formulas.txt").read_text().split("\n\n"):
        lines = [line.rstrip() for line in entry.splitlines() if not line.startswith("#")]
        plain = "\n".join(line[4:] for line in lines if line.startswith("    "))
        if plain:
            formulas[plain] = "\n".join(line for line in lines if not line.startswith("    "))
    return formulas


class Book:
    def __init__(self, out):
        self.out = Path(out).resolve()
        self.pages = pages_in_order()
        self.template = Template((HERE / "page.html").read_text())
        self.formulas = read_formulas()
        self.unused = {*self.formulas, *(name for name, *_ in figures.FIGURES)}
        self.wanted = {page.source for page in self.pages}  # what has a page, and what pages link to
        self.numbers = {f"{p.number}.{n}" for p in self.pages if hasattr(p, "number") for n in list_sentences(p.number)}

    # ---- Changes to a page, from the outside in. A handler returns the elements that take the place of one ----

    def walk(self, x, page):
        if isinstance(x, dict):
            return {**x, "c": self.walk(x["c"], page)} if "c" in x else x
        if not isinstance(x, list):
            return x
        result, word = [], ""
        for y in x:
            if not isinstance(y, dict) or "t" not in y:
                result.append(self.walk(y, page))
            elif y["t"] == "Str":
                result.append(self.sentence_number(y, word, page))
                word = y["c"]
            else:
                handler = getattr(self, f"on_{y['t']}", None)
                result += handler(y, page) if handler else [self.walk(y, page)]
                word = word if y["t"] in ("Space", "SoftBreak") else ""
        return result

    def on_RawBlock(self, x, page):  # cog's comments
        return [] if re.fullmatch(r"\s*(<!--.*?-->\s*)+", x["c"][1], re.DOTALL) else [x]

    on_RawInline = on_RawBlock

    def on_Header(self, x, page):
        level, (anchor, *_), heading = x["c"]
        if level in (2, 3):
            page.sections.append((level, anchor, plain_text(heading)))
        return [self.walk(x, page)]

    def on_Table(self, x, page):
        rows = [row for part in x["c"][3:] for row in table_rows(part)]
        short = max(len(plain_text(cell)) for row in rows for cell in row) <= 48  # of figures: no cell needs two lines
        x["c"][0][1] += ["short"] if short else []
        return [scrolling([self.walk(x, page)])]

    def on_Para(self, x, page):
        if len(x["c"]) == 1 and x["c"][0]["t"] == "Image":
            _, shows, (url, _) = x["c"][0]["c"]
            return [picture(self.link(url, page), plain_text(shows))]
        return [self.walk(x, page)]

    def on_CodeBlock(self, x, page):
        attributes, text = x["c"]
        if text in self.formulas or attributes[1] == ["math"]:
            self.unused.discard(text)
            tex = self.formulas.get(text, text)
            parts = [tex] if "\\begin" in tex else tex.split("\\qquad")  # what may stand in lines of its own on a phone
            return [scrolling([element("Para", [element("Math", {"t": "DisplayMath"}, part) for part in parts])], "formula")]
        for name, line, caption, _ in figures.FIGURES:
            if line.strip() in map(str.strip, text.splitlines()):
                self.unused.discard(name)
                return [picture(self.relative(Path(f"figures/{name}.svg"), page), caption, caption)]
        if attributes[1] == ["cuda"]:
            attributes = [attributes[0], ["cpp"], attributes[2]]
        return [element("CodeBlock", attributes, text)]

    def on_Link(self, x, page):
        attributes, text, (url, title) = x["c"]
        return [element(x["t"], attributes, self.walk(text, page), [self.link(url, page), title])]

    on_Image = on_Link

    def sentence_number(self, x, word, page):
        """`sentence 3.1`, and in chapter 3 `(3.1)`, lead to the sentence."""
        match = re.fullmatch(r"(\(?)(\d\.\d+)(\)?[.,;:)]*)", x["c"])
        if not match or match[2] not in self.numbers or page.path.name == "sentences.html":
            return x
        own = f"/{match[2][0]}-" in f"/{page.source.parent.name}" and match[1] and match[3].startswith(")")
        if own or re.fullmatch(r"\(?sentences?", word, re.IGNORECASE):
            url = f"{self.relative(Path('sentences.html'), page)}#s{match[2]}"
            around = [element("Str", match[1]), link_to(match[2], url), element("Str", match[3])]
            return element("Span", ["", [], []], around)
        return x

    # ---- Links ----

    @staticmethod
    def relative(path, page):
        return os.path.relpath(path, page.path.parent)

    def link(self, url, page):
        if re.match(r"[a-z]+:|#", url):
            return url
        if url.startswith(f"{page.path.with_suffix('')}/"):  # a notebook's figure, just unpacked
            return self.relative(Path(url), page)
        name, _, anchor = url.partition("#")
        source = Path(os.path.normpath(page.source.parent / name))
        if not (ROOT / source).exists():
            raise BookError(f"{page.source} links to {url}, which is not there")
        self.wanted.add(source)
        return self.relative(page_path(source), page) + (f"#{anchor}" if anchor else "")

    # ---- Writing ----

    def pandoc(self, *arguments, text):
        command = ["pandoc", "--fail-if-warnings", *arguments]
        return subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True, cwd=self.out).stdout

    def read(self, page):
        """The page's elements."""
        if page.text is not None:
            markdown = f"# {page.title}\n\n{page.text}"
        elif page.source.suffix == ".ipynb":
            folder = f"--extract-media={page.path.with_suffix('')}"
            return self.pandoc("-f", "ipynb", "-t", "json", folder, text=(ROOT / page.source).read_text())
        elif (ROOT / page.source).is_dir():
            files = [path.name for path in sorted((ROOT / page.source).iterdir()) if path.is_file()]
            markdown = f"# {page.title}\n\n" + "\n".join(f"* [{name}]({page.source.name}/{name})" for name in files)
        elif page.source.suffix == ".md":
            markdown = (ROOT / page.source).read_text()
        else:
            fence, language = "`" * 8, "makefile" if page.source.name == "Makefile" else LANGUAGES.get(page.source.suffix, "")
            text = (ROOT / page.source).read_text(errors="replace").rstrip()
            markdown = f"# `{page.source}`\n\n{fence}{language}\n{text}\n{fence}"
        return self.pandoc("-f", "gfm", "-t", "json", text=markdown)

    def write(self, page, before=None, after=None):
        target = self.out / page.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.path.suffix in PICTURES:
            shutil.copyfile(ROOT / page.source, target)
            return
        document = json.loads(self.read(page))
        document["blocks"] = self.walk(document["blocks"], page)
        body = self.pandoc("-f", "json", "-t", "html5", "--mathml", text=json.dumps(document))
        body = re.sub(r"<math.*?</math>", plain_brackets, body, flags=re.DOTALL)
        body = re.sub(r'<a href="#cb[\d-]+" aria-hidden="true"[^>]*></a>', "", body)  # a link a line of code
        fields = {
            "title": html.escape(page.title),
            "root": self.relative(Path("."), page) + "/",
            "contents": self.contents(page),
            "body": body,
            "previous": self.neighbour(before, page, "prev", "←"),
            "next": self.neighbour(after, page, "next", "→"),
        }
        target.write_text(self.template.substitute(fields))

    def neighbour(self, other, page, rel, mark):
        if not other:
            return ""
        name = html.escape(other.short)
        name = f"{mark} {name}" if rel == "prev" else f"{name} {mark}"
        return f'<a rel="{rel}" href="{self.relative(other.path, page)}">{name}</a>'

    def contents(self, page):
        """The list of pages, with this page's sections."""
        lines, group = ["<ul>"], ""
        for other in self.pages:
            if other.group is None:
                continue
            if other.group != group:
                group = other.group
                lines.append(f'</ul><p class="group">{group}</p><ul>')
            here = ' aria-current="page"' if other is page else ""
            lines.append(f'<li><a href="{self.relative(other.path, page)}"{here}>{html.escape(other.short)}</a>')
            if other is page and page.sections:
                lines.append("<ul>")
                for level, anchor, heading in page.sections:
                    lines.append(f'<li class="level{level}"><a href="#{anchor}">{html.escape(heading)}</a></li>')
                lines.append("</ul>")
            lines.append("</li>")
        return "\n".join([*lines, "</ul>"])

    def build(self):
        if self.out.exists():
            shutil.rmtree(self.out)
        (self.out / "figures").mkdir(parents=True)
        for name, _, _, draw in figures.FIGURES:
            (self.out / "figures" / f"{name}.svg").write_text(draw().svg())
        shutil.copyfile(HERE / "book.css", self.out / "book.css")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            row = self.pages
            done = {page.source for page in row}
            list(pool.map(self.write, row, [None, *row], [*row[1:], None]))
            while more := self.wanted - done:  # sources, and what lists of folders lead to
                done |= more
                list(pool.map(self.write, [Page(source, title=str(source)) for source in sorted(more)]))
        if self.unused:
            lost = "\n  ".join(sorted(self.unused))
            raise BookError(f"what stands in no text any more (see figures.py and formulas.txt):\n  {lost}")
        return len(row), len(done)


if __name__ == "__main__":
    try:
        pages, files = Book(sys.argv[1]).build()
    except BookError as error:
        sys.exit(f"book: {error}")
    print(f"{sys.argv[1]}/index.html: {pages} pages, and {files - pages} sources and pictures that they link to")
