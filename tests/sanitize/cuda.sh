#!/usr/bin/env bash
# Every CUDA kernel under the four tools of compute-sanitizer, each of which first has to find a planted fault. Without a
# device, or without the tool, it says so and passes.
set -euo pipefail
cd "$(dirname "$0")/../.."
make=${MAKE:-make}
build=${BUILD:-build}
run=$build/tests/sanitize/run

if ! $make -s "$run"; then
    exit 1
fi
if ! name=$("$run" --device); then
    echo "compute-sanitizer: skipped, $name"
    exit 0
fi
tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -z "$tool" ]; then
    echo "compute-sanitizer: skipped, it is not installed"
    exit 0
fi

sanitize() { # sanitize TOOL ARGUMENT...: fails if the tool reports anything
    local name=$1
    shift
    "$tool" --tool "$name" --error-exitcode 66 --print-limit 5 "$run" "$@" >"$log" 2>&1
}

log=$build/tests/sanitize/log
failed=0
for name in memcheck racecheck initcheck synccheck; do
    if sanitize $name --plant $name; then
        cat "$log"
        echo "$name did not report the planted fault."
        exit 1
    fi
    start=$SECONDS
    if sanitize $name; then
        echo "ok  $name: $(grep -o '^[0-9]* calls' "$log"), the planted fault was reported, $((SECONDS - start)) s"
    else
        failed=1
        echo "FAILED  $name"
        # Reports, each above the name of the call that it is of, and wrong results.
        awk '/^=/ { report = report $0 "\n"; next } report || /^FAILED/ { printf "%s%s\n", report, $0; report = "" }' \
            "$log" | head -n 40
    fi
done
exit $failed
