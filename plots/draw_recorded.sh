#!/bin/sh
# Draws plots/chapterN.svg from the recorded measurements of one machine: the one named, or the first that has them.
#
#   plots/draw_recorded.sh [DEVICE]        DEVICE is a folder of plots/data
set -eu

draw() { # script, CSV, SVG, title
    LC_ALL=C.UTF-8 gnuplot -e "csv='$2'; svg='$3'; title='$4'" "plots/$1.gp"
    echo "$3 from $2"
}

for n in 0 1 2 3 4 5 6 7 8 9; do
    csv=$(find plots/data/"${1:-}" -name "chapter$n.csv" | sort | head -n 1)
    [ -n "$csv" ] || continue
    title=$(sed -n '1s/^#* *//p' chapters/$n-*/README.md 2>/dev/null || echo "Chapter $n")
    [ $n = 0 ] || draw ladder "$csv" "plots/chapter$n.svg" "$title"
    case $n in
    0) draw gather "$csv" plots/chapter0-gather.svg "$title" ;;
    7) draw crossover "$csv" plots/chapter7-crossover.svg "$title" ;;
    8) draw breakdown "$csv" plots/chapter8-breakdown.svg "$title" ;;
    esac
done
