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

The bugs in chapterN-NAME.txt are tried on the chapter's sentences in tests/NAME.c alone, which no other bug is tried on:
for sentences that are slow.

A bug in a file under cuda/, or one with `needs: device`, is planted where there is a GPU; the sentences run on it are
the ones about the GPU. The other bugs are planted in a build without CUDA.
"""

import argparse
import concurrent.futures
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRATCH = ROOT / "build" / "mutants"
WORKERS = 2
GPU_WORKERS = 8  # compile at once,
GPU_TURNS = 4  # and run; chapter 0's sentences, which time the GPU, have it to themselves
# -O1 compiles quickly; without -march=native an illegal instruction cannot be mistaken for a catch.
FLAGS = ["OPT=-O1", "CFLAGS=-O1 -w", "BUILD=build"]
WITHOUT_CUDA = ["NVCC="]


class Mutant:
    def __init__(self, chapter, part, where, fields):
        self.chapter = chapter
        self.part = part
        self.where = where
        self.name = " ".join(fields.get("mutant", []))
        self.file = "".join(fields.get("file", []))
        self.old = "\n".join(fields.get("old", []))
        self.new = "\n".join(fields.get("new", []))
        self.gpu = self.file.startswith("cuda/") or fields.get("needs") == ["device"]

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
    chapter, _, part = path.stem.removeprefix("chapter").partition("-")
    chapter = int(chapter)
    mutants, fields, first = [], {}, 0
    for number, line in enumerate([*path.read_text().splitlines(), ""], 1):
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                mutants.append(Mutant(chapter, part, f"{path.name}:{first}", fields))
            fields = {}
            continue
        match = re.match(r"(mutant|file|needs|old|new): ?(.*)$", line)
        if not match:
            sys.exit(f"{path.name}:{number}: not a field: {line}")
        if not fields:
            first = number
        fields.setdefault(match[1], []).append(match[2])
    return mutants


def copy_tree(target):
    shutil.copytree(
        ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(".git", ".dev", "build", ".venv", "chapter[0-9]", "golden")
    )
    (target / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")


def build(tree, gpu, jobs=1):
    make = ["make", "-s", f"-j{jobs}", *FLAGS, *([] if gpu else WITHOUT_CUDA), "build/tests/run"]
    # Not this make's own variables: a job server or a BUILD given to it is not for the copy.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "BUILD", "TESTS", "CFLAGS")}
    done = subprocess.run(make, cwd=tree, env=environment, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr


def no_device():
    """Why GPU bugs cannot be planted here, or None."""
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file()):
        return "no nvcc"
    if not shutil.which("nvidia-smi"):
        return "no device"
    names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return None if names.returncode == 0 and names.stdout.strip() else "no device"


def sentences_of(part, chapter):
    text = (ROOT / "tests" / f"{part}.c").read_text()
    return {f"{chapter}.{n}" for n in re.findall(rf"SENTENCE\({chapter}, (\d+),", text)}


def run(tree, chapter, gpu, sentence_limit, limit, only=()):
    """The sentences' results, {"3.1": "ok"}: ok, FAILED, skipped or hangs; None if the whole run hangs."""
    environment = {k: v for k, v in os.environ.items() if k not in ("ONLY", "SIZES", "CUDA")}
    environment |= {"CUDA": "1"} if gpu else {}
    environment |= {
        "CHAPTER": str(chapter),
        "ONLY": ",".join(only),
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
    """Copies of the tree, each with one bug at a time."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.workers = GPU_WORKERS if gpu else WORKERS
        self.places = GPU_TURNS if gpu else WORKERS
        self.turn = threading.Semaphore(self.places)
        self.alone = threading.Lock()
        shutil.rmtree(SCRATCH, ignore_errors=True)
        SCRATCH.mkdir(parents=True)
        first = SCRATCH / "0"
        copy_tree(first)
        errors = build(first, gpu, os.cpu_count() or 1)
        if errors:
            sys.exit(f"the tree does not build:\n{errors}")
        self.trees = queue.Queue()
        self.trees.put(first)
        for i in range(1, self.workers):
            shutil.copytree(first, SCRATCH / str(i), symlinks=True)
            self.trees.put(SCRATCH / str(i))
        self.seconds = {}
        self.tried_on = {}  # (chapter, part): the sentences; none: all of the chapter

    def baseline(self, chapter):
        """The chapter's results without a bug; they must all be ok."""
        tree = self.trees.get()
        start = time.monotonic()
        results = run(tree, chapter, self.gpu, 120, 600) or {}
        self.seconds[chapter] = time.monotonic() - start
        self.trees.put(tree)
        return results

    @contextlib.contextmanager
    def turns(self, count):
        with self.alone:
            for _ in range(count):
                self.turn.acquire()
        try:
            yield
        finally:
            self.turn.release(count)

    def try_mutant(self, mutant):
        """(results or None, error text or None)"""
        tree = self.trees.get()
        path = tree / mutant.file
        sound = path.read_text()
        try:
            path.write_text(sound.replace(mutant.old, mutant.new))
            errors = build(tree, self.gpu, max(1, (os.cpu_count() or 1) // self.workers))
            if errors:
                return None, errors
            seconds = self.seconds[mutant.chapter]
            # One program among several on a GPU takes longer than it did alone.
            patience = self.places if self.gpu else 1
            with self.turns(self.places if self.gpu and mutant.chapter == 0 else 1):
                only = self.tried_on.get((mutant.chapter, mutant.part), ())
                limits = patience * (10 + 3 * seconds), 60 + 10 * patience * seconds
                return run(tree, mutant.chapter, self.gpu, *limits, only), None
        finally:
            path.write_text(sound)
            self.trees.put(tree)


def baselines(tester, chapters, mutants, failures):
    """Each chapter's sentences that hold without any bug."""
    sentences = {}
    for chapter in chapters:
        results = tester.baseline(chapter)
        failed = by_number(s for s, result in results.items() if result not in ("ok", "skipped"))
        if failed:
            sys.exit(f"without any bug, these sentences fail: {', '.join(failed)}")
        if tester.gpu and not results:
            continue  # a chapter that says nothing about the GPU
        sentences[chapter] = {s for s, result in results.items() if result == "ok"}
        if not sentences[chapter]:
            failures.append(f"chapter {chapter} has no sentence")
        parts = {m.part for m in mutants if m.chapter == chapter and m.part}
        rest = set(results)
        for part in parts:
            tester.tried_on[chapter, part] = by_number(sentences_of(part, chapter) & rest)
        for part in parts:
            rest -= set(tester.tried_on[chapter, part])
            tester.tried_on[chapter, ""] = by_number(rest)
        if not any(m.chapter == chapter for m in mutants):
            failures.append(f"chapter {chapter} has no bug to catch in tests/mutants/chapter{chapter}.txt")
    return sentences


def plant(tester, chapters, mutants):
    """One bug after the other; what went wrong."""
    failures, caught_something, shown = [], set(), None
    where = "on the GPU, " if tester.gpu else ""
    sentences = baselines(tester, chapters, mutants, failures)
    # Bugs of one file follow each other in the files, which spares the copies a rebuild.
    with concurrent.futures.ThreadPoolExecutor(tester.workers) as pool:
        for mutant, (results, errors) in zip(mutants, pool.map(tester.try_mutant, mutants)):
            if mutant.chapter != shown:
                shown = mutant.chapter
                print(f"Chapter {shown}: {where}{len(sentences[shown])} sentences, {tester.seconds[shown]:.1f} s a run")
            if errors:
                failures.append(f"{mutant.where}: {mutant.name}: does not compile")
                print(f"  DOES NOT COMPILE  {mutant.name}\n{errors}", flush=True)
                continue
            if results is None:
                print(f"  {mutant.name}: caught, the run hangs", flush=True)
                continue
            # A sentence whose line is missing died with the run.
            tried = set(tester.tried_on.get((shown, mutant.part), sentences[shown])) & sentences[shown]
            catchers = by_number(s for s in tried if results.get(s, "FAILED") not in ("ok", "skipped"))
            caught_something |= set(catchers)
            if catchers:
                words = [s + (" (hangs)" if results.get(s) == "hangs" else "") for s in catchers]
                print(f"  {mutant.name}: caught by {', '.join(words)}", flush=True)
            else:
                failures.append(f"{mutant.where}: {mutant.name}: NOT CAUGHT")
                print(f"  {mutant.name}: NOT CAUGHT", flush=True)
    for numbers in sentences.values():
        idle = by_number(numbers - caught_something)
        if idle:
            failures.append(f"sentences that caught nothing: {', '.join(idle)}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chapter", type=int, help="only this chapter's bugs and sentences")
    parser.add_argument("--cuda-only", action="store_true", help="only the bugs and sentences about the GPU")
    options = parser.parse_args()
    start = time.monotonic()

    files = sorted(Path(__file__).parent.glob("chapter[0-9]*.txt"))
    mutants = [m for f in files for m in read_mutants(f) if options.chapter in (None, m.chapter)]
    failures = [f"{m.where}: {m.name}: {m.problem()}" for m in mutants if m.problem()]
    mutants = [m for m in mutants if not m.problem()]
    chapters = range(10) if options.chapter is None else [options.chapter]

    planted = 0
    for gpu in [True] if options.cuda_only else [False, True]:
        these = [m for m in mutants if m.gpu == gpu]
        reason = no_device() if gpu else None
        if reason:
            print(f"\n{len(these)} bugs of the GPU are not planted: {reason}")
            for mutant in these:
                print(f"  {mutant.name}")
            continue
        failures += plant(Tester(gpu), chapters, these)
        planted += len(these)

    minutes = (time.monotonic() - start) / 60
    print(f"\n{planted} bugs planted in {minutes:.1f} minutes")
    if failures:
        print("\n".join(failures))
        sys.exit(1)
    print("every bug was caught, and every sentence caught one" if planted else "no bug was planted")


if __name__ == "__main__":
    main()
