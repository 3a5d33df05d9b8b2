# Chapter 0: the rate at which random rows are gathered, by the size of the table they lie in.
#
#   gnuplot -e "csv='build/results/chapter0.csv'; svg='gather.svg'; title='Chapter 0: ...'" plots/gather.gp
#
# Without svg (or with svg='') it draws in the terminal. Where the file has a GPU's rows, they are curves of their own.
if (!exists('svg')) svg = ''
if (!exists('title')) title = csv

set encoding utf8
set datafile separator comma
# "table0.25MB-row1KB"; the fastest run, as the ceilings use it.
is(op, backend) = strcol(2) eq op && strcol(6) eq backend
mb(backend) = is('gather', backend) ? real(substr(strcol(3), 6, strstrt(strcol(3), 'MB') - 1)) : NaN
rate(op, backend) = is(op, backend) ? column(12) / column(9) * 1e-6 : NaN
stats csv every ::1 using (is('copy', 'cuda')) name 'GPU' nooutput
stats csv every ::1 using (rate('copy', 'cpu')) name 'COPY' nooutput
GPU_COPY_max = NaN
if (GPU_max > 0) stats csv every ::1 using (rate('copy', 'cuda')) name 'GPU_COPY' nooutput

set title title
set logscale xy
set xrange [0.2:320]
set xtics (0.25, 1, 4, 16, 64, 256) nomirror
set ytics nomirror
set border 3
set xlabel 'table, MB'
if (GPU_max > 0) { set key outside below } else { set key top right }
if (svg eq '') {
    set terminal dumb 100, 20
    set ylabel 'GB/s'
} else {
    set terminal svg noenhanced size 760, 420 font 'Helvetica,13' background rgb 'white'
    set output svg
    set ylabel 'GB/s, all threads'
    set grid lc rgb '#dddddd'
}
on(processor) = GPU_max > 0 ? ', ' . processor : ''
plot csv every ::1 using (mb('cpu')):(rate('gather', 'cpu')) with linespoints pt 7 lw 2 lc rgb '#0072b2' \
         title 'random rows of 1 KB' . on('CPU'), \
     COPY_max with lines dt 2 lc rgb '#666666' title 'copy, read + written' . on('CPU'), \
     for [gpu = 1:GPU_max] csv every ::1 using (mb('cuda')):(rate('gather', 'cuda')) with linespoints pt 5 lw 2 \
         lc rgb '#d55e00' title 'random rows of 2 KB, GPU', \
     for [gpu = 1:GPU_max] GPU_COPY_max with lines dt 3 lc rgb '#d55e00' title 'copy, read + written, GPU'
