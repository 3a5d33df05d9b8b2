#!/usr/bin/env bash
# The suite under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer (gcc), then every OpenMP loop under
# ThreadSanitizer (clang) with Archer, which tells it how OpenMP synchronises. Each first has to find planted faults.
set -euo pipefail
cd "$(dirname "$0")/.."
make=${MAKE:-make}
build=${BUILD:-build}

# Address randomisation of more bits than these tools know of kills their programs at the start.
fixed=()
setarch "$(uname -m)" -R true 2>/dev/null && fixed=(setarch "$(uname -m)" -R)

echo "== address, leak and undefined behaviour"
flags=(BUILD="$build/asan" NVCC= CC=gcc OPT= CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all")
$make -s -j2 "${flags[@]}" "$build/asan/tests/self/run" "$build/asan/tests/run"
export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1:allocator_may_return_null=1
export LITERATE_TIMEOUT=300 # all of it is slower here
planted=$(env -u ONLY -u SIZES CHAPTER=1 "${fixed[@]}" "$build/asan/tests/self/run" 2>/dev/null || true)
if [ "$(tail -n 1 <<<"$planted")" != "0 passed, 3 failed, 0 skipped" ]; then
    printf '%s\nThe sanitizers did not see the planted faults.\n' "$planted"
    exit 1
fi
echo "a planted leak, overrun and overflow were each reported"
"${fixed[@]}" "$build/asan/tests/run"

echo
echo "== races"
clang=${CLANG:-clang}
flags=(BUILD="$build/tsan" NVCC= CC="$clang" OPT= CFLAGS="-O1 -g -fsanitize=thread")
$make -s -j2 "${flags[@]}" "$build/tsan/tests/race"
libraries=$("$clang" -print-resource-dir)
archer=$(ls "$libraries"/../../libarcher.so "$libraries"/../../../libarcher.so /usr/lib/llvm-*/lib/libarcher.so \
    2>/dev/null | head -n 1 || true)
if [ -z "$archer" ]; then
    echo "no libarcher.so beside $("$clang" --version | head -n 1): run make setup"
    exit 1
fi
export OMP_TOOL_LIBRARIES=$archer ARCHER_OPTIONS=verbose=1
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66"
log=$build/tsan/log

"${fixed[@]}" "$build/tsan/tests/race" --plant >"$log" 2>&1 || true
if [ "$(grep -c 'WARNING: ThreadSanitizer: data race' "$log")" -lt 2 ]; then
    cat "$log"
    echo "The race detector did not report both planted races."
    exit 1
fi
echo "both planted races were reported"

if ! "${fixed[@]}" "$build/tsan/tests/race" >"$log" 2>&1 || ! grep -q 'Archer detected' "$log"; then
    cat "$log"
    echo "The OpenMP code has a race, or the race detector did not run."
    exit 1
fi
echo "no race: the reference and $(grep -c '^  .*, T' "$log") runs of rungs with four threads"
