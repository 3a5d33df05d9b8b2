"""Opens every page of the book in a headless browser: python3 tests/book.py FOLDER

A page fails for a link that leads nowhere in the book, a picture that did not load, a message of the browser's console, a
resource that is missing, or a width that makes a phone scroll sideways. Before that, a page with one of each has to fail.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

from playwright.sync_api import sync_playwright

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

LOOK = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    anchors: [...document.querySelectorAll('[id]')].map(e => e.id),
    pictures: [...document.images].map(i => ({source: i.getAttribute('src'), width: i.naturalWidth})),
    heading: document.querySelectorAll('h1').length,
})"""
WIDTH = "() => [document.documentElement.scrollWidth, innerWidth]"


def browser_path():
    for name in ("chromium-headless-shell", "chromium", "google-chrome"):
        if path := shutil.which(name):
            return path
    sys.exit("book: no Chromium; run make setup-book")


def look_at(browser, folder):
    """What is wrong with each page under folder, by page, and how much there was to see."""
    wrong, seen, counts = {}, {}, {"links": 0, "pictures": 0}
    tab = browser.new_page(viewport=PHONE)
    messages = []
    tab.on("console", lambda m: messages.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: messages.append(f"script: {error}"))
    tab.on("requestfailed", lambda request: messages.append(f"not loaded: {request.url.removeprefix(folder.as_uri())}"))
    for path in sorted(folder.rglob("*.html")):
        messages.clear()
        tab.set_viewport_size(PHONE)
        tab.goto(path.as_uri(), wait_until="load")
        seen[path] = tab.evaluate(LOOK)
        wrong[path] = list(messages)
        wrong[path] += [f"missing picture: {p['source']}" for p in seen[path]["pictures"] if not p["width"]]
        if seen[path]["heading"] != 1:
            wrong[path].append(f"{seen[path]['heading']} headings of the first level")
        for view in (PHONE, DESK):
            tab.set_viewport_size(view)
            needs, has = tab.evaluate(WIDTH)
            if needs > has:
                wrong[path].append(f"{needs} pixels wide where there are {has}")
        counts["pictures"] += len(seen[path]["pictures"])
    tab.close()
    for path, found in seen.items():
        for link in dict.fromkeys(found["links"]):
            if urlparse(link).scheme != "file":
                continue
            counts["links"] += 1
            url, anchor = urldefrag(link)
            target = Path(unquote(urlparse(url).path))
            if not target.is_file() or folder not in target.parents:
                wrong[path].append(f"broken link: {os.path.relpath(target, path.parent)}")
            elif anchor and unquote(anchor) not in seen.get(target, {"anchors": ()})["anchors"]:
                wrong[path].append(f"broken link: {os.path.relpath(target, path.parent)} has no #{unquote(anchor)}")
    return {path: list for path, list in wrong.items() if list}, len(seen), counts


FAULTS = {
    '<a href="nowhere.html">x</a>': "broken link: nowhere.html",
    '<a href="#nowhere">x</a>': "has no #nowhere",
    '<a href="../outside.html">x</a>': "broken link: ../outside.html",
    '<img src="missing.svg" alt="">': "missing picture: missing.svg",
    '<script>console.error("planted")</script>': "console: planted",
    '<script>planted()</script>': "script: planted is not defined",
    '<link rel="stylesheet" href="missing.css">': "not loaded: /missing.css",
    '<div style="width:391px">x</div>': "pixels wide where there are 390",
    "<h1>x</h1>": "2 headings",
}


def check_the_check(browser, page):
    """Plants each fault in a page that has none, and wants it reported, and nothing for the page as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve() / "book"
        folder.mkdir()
        (folder.parent / "outside.html").write_text("<h1>outside</h1>")
        text = page.read_text()
        start, end = text.index("<body>") + len("<body>"), text.index("</body>")
        clean = text[:start] + "<h1 id='here'>clean</h1><a href='#here'>here</a>" + text[end:]
        shutil.copy(page.parent / "book.css", folder)
        (folder / "index.html").write_text(clean)
        wrong, _, _ = look_at(browser, folder)
        if wrong:
            sys.exit(f"book: a clean page was refused: {wrong}")
        for fault, report in FAULTS.items():
            (folder / "index.html").write_text(clean.replace("</h1>", "</h1>" + fault, 1))
            wrong, _, _ = look_at(browser, folder)
            if not any(report in line for lines in wrong.values() for line in lines):
                sys.exit(f"book: nobody noticed {fault}: {wrong}")


def main():
    folder = Path(sys.argv[1]).resolve()
    with sync_playwright() as playwright:
        # As root, as in a container, Chromium starts without its sandbox only. It opens nothing but these files.
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        check_the_check(browser, folder / "index.html")
        wrong, pages, counts = look_at(browser, folder)
        browser.close()
    for path, lines in wrong.items():
        for line in lines:
            print(f"{path.relative_to(folder)}: {line}")
    if wrong or not pages:
        sys.exit(f"book: {len(wrong)} of {pages} pages are wrong")
    print(f"ok  book: {pages} pages, {counts['links']} links, {counts['pictures']} pictures; {len(FAULTS)} planted faults were seen")


main()
