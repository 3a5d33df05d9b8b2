#!/bin/sh
# The packed course as a student meets it: unpacked elsewhere it has no solution, links to none, builds, and grades a
# starter. `make test-course` runs it.
set -eu
archive=$(realpath "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tar -xzf "$archive" -C "$scratch"
cd "$scratch/flashmoe-course"

if find . -path '*/solutions*' | grep . || grep -rlE '^(/\*|//) Exercise [0-9.]+, solution|^# Solution to' . | grep .; then
    echo "these are solutions, and the course has them" >&2
    exit 1
fi
echo "ok  course: no solutions in $(find chapters -path '*/exercises/*.md' | wc -l) exercises"

# shellcheck disable=SC2046 # texts are arguments
python3 plots/prose.py $(find . -name '*.md' -not -path './tests/self/*' | sed 's,^\./,,')
$MAKE --no-print-directory -s NVCC= OPT=-O1 BUILD=build build/chapter4 >log 2>&1 || { tail log; exit 1; }
BUILD=build chapters/course.sh grade 4 >log 2>&1 || { cat log; exit 1; }
grep 'starters are what they claim, 0 failed' log
