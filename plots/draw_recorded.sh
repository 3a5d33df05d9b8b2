#!/bin/sh
# Draws plots/chapterN.svg from the recorded measurements of one machine: the one named, or the first without a GPU. The
# CUDA ladders are drawn beside them, as plots/chapterN-gpu.svg, with the peers' figures.
#
#   plots/draw_recorded.sh [DEVICE]        DEVICE is a folder of plots/data
set -eu

draw() { # script, CSV, SVG, title
    LC_ALL=C.UTF-8 gnuplot -e "csv='$2'; svg='$3'; title='$4'" "plots/$1.gp"
    echo "$3 from $2"
}

joined=$(mktemp)
trap 'rm -f "$joined"' EXIT
# The files of chapter n, those with CUDA rungs and those without.
with_gpu() { grep -l ',cuda,' plots/data/*/chapter"$1".csv 2>/dev/null | head -n 1 || true; }
# shellcheck disable=SC2086 # a glob, where no device is named
without_gpu() { grep -L ',cuda,' plots/data/${2:-*}/chapter"$1".csv 2>/dev/null | head -n 1 || true; }

for n in 0 1 2 3 4 5 6 7 8 9; do
    title=$(sed -n '1s/^#* *//p' chapters/$n-*/README.md 2>/dev/null || echo "Chapter $n")
    csv=$(without_gpu $n "${1:-}")
    if [ -n "$csv" ]; then
        [ $n = 0 ] || draw ladder "$csv" "plots/chapter$n.svg" "$title"
        case $n in
        0) draw gather "$csv" plots/chapter0-gather.svg "$title" ;;
        7) draw crossover "$csv" plots/chapter7-crossover.svg "$title" ;;
        8) draw breakdown "$csv" plots/chapter8-breakdown.svg "$title" ;;
        esac
    fi
    csv=$(with_gpu $n)
    if [ -n "$csv" ] && [ $n = 0 ]; then
        draw gather "$csv" plots/chapter0-gpu-gather.svg "$title"
    fi
    if [ -n "$csv" ] && [ $n != 0 ]; then
        awk -f plots/with_peers.awk "$(dirname "$csv")/peers.csv" "$csv" >"$joined"
        draw ladder "$joined" "plots/chapter$n-gpu.svg" "$title"
    fi
    if [ -n "$csv" ] && [ $n = 7 ] && grep -q ',crossover,.*,cuda,' "$csv"; then # the map of the GPU's strategies alone
        grep -v ',cpu,' "$csv" >"$joined"
        draw crossover "$joined" plots/chapter7-gpu-crossover.svg "$title"
    fi
    if [ -n "$csv" ] && [ $n = 8 ]; then # the GPU's steps alone
        grep -v ',cpu,' "$csv" >"$joined"
        draw breakdown "$joined" plots/chapter8-gpu-breakdown.svg "$title"
    fi
    if [ -n "$csv" ] && [ $n = 3 ]; then # one case of it, for the README
        sed -n -i '1p;/,topk,T4096-n128-K64-normal-f32,/p' "$joined"
        draw ladder "$joined" plots/readme-gpu.svg "$title"
    fi
done
