#!/usr/bin/env python3
"""Plants known bugs one at a time and runs the chapter's sentences on each.

A bug that no sentence catches, and a sentence that catches no bug, are failures: a test that cannot fail teaches
nothing. The bugs are in chapterN.txt beside this file, separated by blank lines:

    mutant: the staircase leaves out its diagonal
    file: ref_cpu/topk.c
    old: (a + 1) * (b + 1) <= K
    new: (a + 1) * (b + 1) < K

`old` must occur exactly once in the file. Repeated `old` or `new` lines are joined by a newline; one space after the
colon is dropped, the rest is kept. A line that starts with # is a comment.
"""

import argparse
import concurrent.futures
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRATCH = ROOT / "build" / "mutants"
WORKERS = 2
# -O1 compiles quickly; without -march=native an illegal instruction cannot be mistaken for a catch.
FLAGS = ["OPT=-O1", "CFLAGS=-O1 -w", "BUILD=build"]


class Mutant:
    def __init__(self, chapter, where, fields):
        self.chapter = chapter
        self.where = where
        self.name = " ".join(fields.get("mutant", []))
        self.file = "".join(fields.get("file", []))
        self.old = "\n".join(fields.get("old", []))
        self.new = "\n".join(fields.get("new", []))

    def problem(self):
        """Why it cannot be planted, or None."""
        if not (self.name and self.file and self.old):
            return "needs mutant:, file:, old: and new:"
        if self.old == self.new:
            return "old and new are the same"
        path = ROOT / self.file
        if not path.is_file():
            return f"no file {self.file}"
        count = path.read_text().count(self.old)
        return None if count == 1 else f"old text occurs {count} times in {self.file}"


def read_mutants(path):
    chapter = int(re.search(r"\d+", path.stem).group())
    mutants, fields, first = [], {}, 0
    for number, line in enumerate([*path.read_text().splitlines(), ""], 1):
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                mutants.append(Mutant(chapter, f"{path.name}:{first}", fields))
            fields = {}
            continue
        match = re.match(r"(mutant|file|old|new): ?(.*)$", line)
        if not match:
            sys.exit(f"{path.name}:{number}: not a field: {line}")
        if not fields:
            first = number
        fields.setdefault(match[1], []).append(match[2])
    return mutants


def copy_tree(target):
    shutil.copytree(
        ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", ".venv", "chapter[0-9]", "golden")
    )
    (target / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")


def build(tree, jobs=1):
    make = ["make", "-s", f"-j{jobs}", *FLAGS, "build/tests/run"]
    # Not this make's own variables: a job server or a BUILD given to it is not for the copy.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "BUILD", "TESTS", "CFLAGS")}
    done = subprocess.run(make, cwd=tree, env=environment, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr


def run(tree, chapter, sentence_limit, limit):
    """The sentences' results, {"3.1": "ok"}: ok, FAILED, skipped or hangs; None if the whole run hangs."""
    environment = {k: v for k, v in os.environ.items() if k not in ("ONLY", "SIZES")}
    environment |= {
        "CHAPTER": str(chapter),
        "SEED": "1",
        "LITERATE_TIMEOUT": str(sentence_limit),
        "LITERATE_SHRINK": "0",
    }
    process = subprocess.Popen(
        ["build/tests/run"],
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    results, current = {}, None
    for line in text.splitlines():
        match = re.match(r"(ok|FAILED|skipped) (\d+\.\d+)  ", line)
        if match:
            current = match[2]
            results[current] = match[1]
        elif current and results[current] == "FAILED" and line.strip().startswith("no result after"):
            results[current] = "hangs"
    return results


def by_number(sentences):
    return sorted(sentences, key=lambda s: [int(part) for part in s.split(".")])


class Tester:
    """Two copies of the tree, each with one bug at a time."""

    def __init__(self):
        shutil.rmtree(SCRATCH, ignore_errors=True)
        SCRATCH.mkdir(parents=True)
        first = SCRATCH / "0"
        copy_tree(first)
        errors = build(first, os.cpu_count() or 1)
        if errors:
            sys.exit(f"the tree does not build:\n{errors}")
        self.trees = queue.Queue()
        self.trees.put(first)
        for i in range(1, WORKERS):
            shutil.copytree(first, SCRATCH / str(i), symlinks=True)
            self.trees.put(SCRATCH / str(i))
        self.seconds = {}

    def baseline(self, chapter):
        """The chapter's results without a bug; they must all be ok."""
        tree = self.trees.get()
        start = time.monotonic()
        results = run(tree, chapter, 120, 600) or {}
        self.seconds[chapter] = time.monotonic() - start
        self.trees.put(tree)
        return results

    def try_mutant(self, mutant):
        """(results or None, error text or None)"""
        tree = self.trees.get()
        path = tree / mutant.file
        sound = path.read_text()
        try:
            path.write_text(sound.replace(mutant.old, mutant.new))
            errors = build(tree)
            if errors:
                return None, errors
            seconds = self.seconds[mutant.chapter]
            return run(tree, mutant.chapter, 10 + 3 * seconds, 60 + 10 * seconds), None
        finally:
            path.write_text(sound)
            self.trees.put(tree)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chapter", type=int, help="only this chapter's bugs and sentences")
    only = parser.parse_args().chapter
    start = time.monotonic()
    failures = []

    files = sorted(Path(__file__).parent.glob("chapter[0-9].txt"))
    mutants = [m for f in files for m in read_mutants(f) if only is None or m.chapter == only]
    for mutant in mutants:
        problem = mutant.problem()
        if problem:
            failures.append(f"{mutant.where}: {mutant.name}: {problem}")
    mutants = [m for m in mutants if not m.problem()]

    tester = Tester()
    sentences = {}
    for chapter in range(10) if only is None else [only]:
        results = tester.baseline(chapter)
        failed = by_number(s for s, result in results.items() if result not in ("ok", "skipped"))
        if failed:
            sys.exit(f"without any bug, these sentences fail: {', '.join(failed)}")
        sentences[chapter] = {s for s, result in results.items() if result == "ok"}
        if not sentences[chapter]:
            failures.append(f"chapter {chapter} has no sentence")
        if not any(m.chapter == chapter for m in mutants):
            failures.append(f"chapter {chapter} has no bug to catch: no tests/mutants/chapter{chapter}.txt")

    caught_something = set()
    shown = None
    # Bugs of one file follow each other in the files, which spares the copies a rebuild.
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for mutant, (results, errors) in zip(mutants, pool.map(tester.try_mutant, mutants)):
            if mutant.chapter != shown:
                shown = mutant.chapter
                print(f"Chapter {shown}: {len(sentences[shown])} sentences, {tester.seconds[shown]:.1f} s a run")
            if errors:
                failures.append(f"{mutant.where}: {mutant.name}: does not compile")
                print(f"  DOES NOT COMPILE  {mutant.name}\n{errors}", flush=True)
                continue
            if results is None:
                print(f"  {mutant.name}: caught, the run hangs", flush=True)
                continue
            # A sentence whose line is missing died with the run.
            catchers = by_number(s for s in sentences[shown] if results.get(s, "FAILED") not in ("ok", "skipped"))
            caught_something |= set(catchers)
            if catchers:
                words = [s + (" (hangs)" if results.get(s) == "hangs" else "") for s in catchers]
                print(f"  {mutant.name}: caught by {', '.join(words)}", flush=True)
            else:
                failures.append(f"{mutant.where}: {mutant.name}: NOT CAUGHT")
                print(f"  {mutant.name}: NOT CAUGHT", flush=True)

    for chapter, numbers in sentences.items():
        idle = by_number(numbers - caught_something)
        if idle:
            failures.append(f"sentences that caught nothing: {', '.join(idle)}")

    minutes = (time.monotonic() - start) / 60
    print(f"\n{len(mutants)} bugs planted in {minutes:.1f} minutes")
    if failures:
        print("\n".join(failures))
        sys.exit(1)
    print("every bug was caught, and every sentence caught one")


if __name__ == "__main__":
    main()
