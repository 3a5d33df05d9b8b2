#!/bin/sh
# The library as its users meet it: installed into a scratch folder, found by pkg-config, linked by one command, shared
# and static; only functions of the headers shown; and the Python module. `make test-lib` runs it.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
layer=tests/golden/trained_bf16_eval.safetensors
prefix=$scratch/usr

$MAKE --no-print-directory BUILD="$BUILD" DESTDIR= PREFIX="$prefix" install >"$scratch/log" ||
    { cat "$scratch/log"; exit 1; }
export PKG_CONFIG_PATH="$prefix/lib/pkgconfig" LD_LIBRARY_PATH="$prefix/lib"

# shellcheck disable=SC2046 # pkg-config's words are arguments
$CC tests/lib/example.c $(pkg-config --cflags --libs flashmoe) -o "$scratch/shared"
"$scratch/shared" "$layer"
# shellcheck disable=SC2046
$CC tests/lib/example.c $(pkg-config --cflags flashmoe) "$prefix/lib/libflashmoe.a" \
    $(pkg-config --static --libs-only-l --libs-only-other flashmoe | sed 's/-lflashmoe//') -o "$scratch/static"
[ "$("$scratch/static" "$layer")" = "$("$scratch/shared" "$layer")" ]
echo "ok  example.c: one command, the same output from the shared and the static library"

if [ -e "$prefix/include/flashmoe/fmoe_cuda.h" ]; then
    cat >"$scratch/cuda.c" <<'EOT'
#include <fmoe_cuda.h>
#include <stdio.h>
int main(void) { // refused by the host, so it needs no device
    fmoe_status status = fmoe_cuda_topk(1, 8, 65, false, FMOE_F32, 0, 0, 0, 0, 0, 0, 0);
    printf("level %d, %s: %s\n", fmoe_cuda_level(), fmoe_status_name(status), fmoe_error_message());
    return status != FMOE_BAD_TOPK;
}
EOT
    # shellcheck disable=SC2046
    $CC "$scratch/cuda.c" $(pkg-config --cflags --libs flashmoe_cuda) -o "$scratch/cuda"
    # shellcheck disable=SC2046
    $CC "$scratch/cuda.c" $(pkg-config --cflags flashmoe_cuda) "$prefix/lib/libflashmoe_cuda.a" \
        "$prefix/lib/libflashmoe.a" $(pkg-config --static --libs flashmoe_cuda | sed 's/-lflashmoe[_a-z]*//g') \
        -o "$scratch/static"
    [ "$("$scratch/static")" = "$("$scratch/cuda")" ]
    echo "ok  flashmoe_cuda: links shared and static; $("$scratch/cuda")"
fi

# A caller learns from the status and the message, never from a crash.
if "$scratch/shared" /dev/null 2>"$scratch/log"; then exit 1; fi
grep -q '/dev/null' "$scratch/log"
echo "ok  example.c: refuses a file that is none: $(cat "$scratch/log")"

for header in "$prefix"/include/flashmoe/*.h; do
    printf '#include <%s>\n' "${header##*/}" >"$scratch/header.c"
    for language in "c -std=c11 -pedantic" "c++"; do
        # shellcheck disable=SC2046,SC2086 # their words are arguments
        $CC -x $language -Wall -Wextra -Werror $(pkg-config --cflags flashmoe) -fsyntax-only "$scratch/header.c"
    done
done
echo "ok  headers: each compiles alone, as C11 and as C++"

for library in "$prefix"/lib/lib*.so; do
    shown=$(nm -D --defined-only "$library" | awk '{ print $3 }')
    others=$(echo "$shown" | grep -v '^fmoe_' || true)
    [ -z "$others" ] || { echo "$library shows $others"; exit 1; }
    headers="fmoe.h fmoe_cpu.h fmoe_version.h"
    case $library in *_cuda.so) headers=fmoe_cuda.h ;; esac
    # What the headers declare is there.
    # shellcheck disable=SC2086 # its words are files
    for name in $(cd "$prefix/include/flashmoe" && cat $headers | grep -oE '^[^ /#*].*\bfmoe_\w+\(' |
        grep -oE 'fmoe_\w+\($' | tr -d '(' | sort -u); do
        echo "$shown" | grep -qx "$name" || { echo "$library lacks $name"; exit 1; }
    done
    echo "ok  ${library##*/}: $(echo "$shown" | wc -l) functions, all of them fmoe_*"
done

$MAKE --no-print-directory BUILD="$BUILD" DESTDIR= PREFIX="$prefix" uninstall
[ -z "$(find "$prefix" ! -type d)" ]
echo "ok  uninstall: nothing is left"

FLASHMOE_LIB=$(cd "$BUILD/lib" && pwd)
export FLASHMOE_LIB LD_LIBRARY_PATH=
"$PYTHON" tests/lib/module.py
"$PYTHON" tests/lib/cuda.py
