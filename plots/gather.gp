# Chapter 0: the rate at which random rows are gathered, by the size of the table they lie in.
#
#   gnuplot -e "csv='build/results/chapter0.csv'; svg='gather.svg'; title='Chapter 0: ...'" plots/gather.gp
#
# Without svg (or with svg='') it draws in the terminal.
if (!exists('svg')) svg = ''
if (!exists('title')) title = csv

set encoding utf8
set datafile separator comma
# "table0.25MB-row1KB"; the fastest run, as the ceilings use it.
mb(i) = strcol(2) eq 'gather' ? real(substr(strcol(3), 6, strstrt(strcol(3), 'MB') - 1)) : NaN
gather(i) = strcol(2) eq 'gather' ? $12 / $9 * 1e-6 : NaN
stats csv every ::1 using (strcol(2) eq 'copy' ? $12 / $9 * 1e-6 : NaN) name 'COPY' nooutput

set title title
set logscale xy
set xrange [0.2:320]
set xtics (0.25, 1, 4, 16, 64, 256) nomirror
set ytics nomirror
set border 3
set xlabel 'table, MB'
set key top right
if (svg eq '') {
    set terminal dumb 100, 20
    set ylabel 'GB/s'
} else {
    set terminal svg noenhanced size 760, 420 font 'Helvetica,13' background rgb 'white'
    set output svg
    set ylabel 'GB/s, all threads'
    set grid lc rgb '#dddddd'
}
plot csv every ::1 using (mb(0)):(gather(0)) with linespoints pt 7 lw 2 lc rgb '#0072b2' title 'random rows of 1 KB', \
     COPY_max with lines dt 2 lc rgb '#666666' title 'copy, read + written'
