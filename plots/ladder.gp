# A chapter's ladder from its CSV: a bar a rung, grouped by case, time on a logarithmic axis, the floor as a mark.
#
#   gnuplot -e "csv='build/results/chapter3.csv'; svg='chapter3.svg'; title='Chapter 3: ...'" plots/ladder.gp
#
# Without svg (or with svg='') it draws in the terminal. ops='topk mlp' limits it to these ops; without it, all but those
# that have figures of their own.
if (!exists('svg')) svg = ''
if (!exists('title')) title = csv
if (!exists('ops')) ops = ''
# Maps and breakdowns have figures of their own.
csv = ops eq '' ? "< grep -vE '^[0-9]*,(crossover|layer_step),' '".csv."'" \
                : "< grep -E '^(chapter|[0-9]*,(".system("echo '".ops."' | tr ' ' '|'").")),' '".csv."'"

set encoding utf8
set datafile separator comma
is_wanted(op) = ops eq '' || strstrt(' '.ops.' ', ' '.op.' ') > 0

# The extent of the data: rows, cases, times.
last = ''
cases = 0
group(i) = strcol(2).'  '.strcol(3)
ms(i) = is_wanted(strcol(2)) && $8 > 0 ? $8 : NaN
floor_ms(i) = strlen(strcol(14)) > 0 ? real(strcol(14)) : NaN
count(i) = (is_wanted(strcol(2)) && group(0) ne last ? (cases = cases + 1, last = group(0)) : 0, ms(0))
stats csv every ::1 using (count(0)) name 'TIME' nooutput
if (!exists('TIME_records') || TIME_records == 0) {
    print 'nothing to draw in '.csv
    exit
}
stats csv every ::1 using (is_wanted(strcol(2)) && floor_ms(0) > 0 ? floor_ms(0) : 1e300) name 'FLOOR' nooutput
lowest = FLOOR_min < TIME_min ? FLOOR_min : TIME_min
stats csv every ::1 using (is_wanted(strcol(2)) ? strlen(strcol(4)) : NaN) name 'LABEL' nooutput
stats csv every ::1 using (is_wanted(strcol(2)) && strcol(6) eq 'cuda' ? 1 : 0) name 'CUDA' nooutput
stats csv every ::1 using (is_wanted(strcol(2)) && strcol(6) eq 'peer' ? 1 : 0) name 'PEER' nooutput
low = 10 ** floor(log10(0.8 * lowest))
high = 10 ** ceil(log10(1.2 * TIME_max))
high = high / low < 100 ? 100 * low : high

# Rows run from top to bottom; the line above a case's first rung holds the case's name.
row = 0
restart(i) = (row = 0, last = '', 0)
place(i) = is_wanted(strcol(2)) ? (row = row - (group(0) eq last ? 1 : 2), last = group(0), row) : NaN
header(i) = is_wanted(strcol(2)) && group(0) ne last ? place(0) + 1 : (place(0), NaN)
label_of_ms(t) = t >= 100 ? sprintf('%.0f ms', t) : t >= 1 ? sprintf('%.3g ms', t) : t >= 1e-3 ? sprintf('%.3g µs', 1e3 * t) : sprintf('%.0f ns', 1e6 * t)
lines = TIME_records + cases

set logscale x
set xrange [low:high * 4]
set lmargin LABEL_max + 3
set border 1
set xtics nomirror format '%g'
unset mxtics
set ytics scale 0 nomirror noenhanced
set title title noenhanced

if (svg eq '') {
    # A bar is a text here: as many signs as its length.
    set terminal dumb noenhanced 118, lines + 7
    set yrange [-lines - 1:0]
    set tmargin 2
    set bmargin 3
    set rmargin 2
    set xtics scale 0
    set xlabel 'median ms'
    signs(n) = n > 0 ? substr('==========================================================================================', 1, n) : ''
    bar(t) = signs(int(90 * log10(t / low) / log10(high * 4 / low)))
    unset key
    plot row = 0, last = '', \
         csv every ::1 using (low):(place(0)):(bar($8).' '.label_of_ms($8)):ytic(4) with labels left, \
         row = 0, last = '', \
         csv every ::1 using (low):(header(0)):(group(0)) with labels left offset -LABEL_max - 1, 0
    exit
}

set terminal svg size 900, (CUDA_max > 0 ? 125 : 100) + 22 * lines font 'Helvetica,13' background rgb 'white'
set output svg
set yrange [-lines - 0.7:0]
set xlabel 'median time, ms, on a logarithmic scale; a black mark is the floor'
set grid x lc rgb '#dddddd'
cpu = 0x8899aa
core = 0x4c9f38
advanced = 0xe69f00
hopper = 0x7b4ea3
peer = 0xc0504d
colour(i) = strcol(6) eq 'cpu' ? cpu : strcol(6) eq 'peer' ? peer : strcol(5) eq 'core' ? core : strcol(5) eq 'advanced' ? advanced : hopper
set style fill solid 1 noborder
# Bold needs enhanced text, where an underscore would lower what follows.
plain(text) = strstrt(text, '_') == 0 ? text : text[1:strstrt(text, '_') - 1].'\\_'.plain(text[strstrt(text, '_') + 1:*])
key_of(text) = CUDA_max > 0 ? text : ''
set key outside top center horizontal maxrows 1 samplen 2 width -2
plot row = 0, last = '', \
     csv every ::1 using (low):(y = place(0)):(low):(ms(0)):(y - 0.36):(y + 0.36):(colour(0)):ytic(4) with boxxyerror lc rgb variable notitle, \
     row = 0, last = '', \
     csv every ::1 using (ms(0)):(place(0)):(label_of_ms($8)) with labels left offset 0.6, 0 notitle, \
     row = 0, last = '', \
     csv every ::1 using (floor_ms(0) > 0 ? floor_ms(0) : NaN):(place(0) - 0.36):(0):(0.72) with vectors nohead lc black lw 2 notitle, \
     row = 0, last = '', \
     csv every ::1 using (low):(header(0)):(plain(group(0))) with labels left font 'Helvetica:Bold,13' offset -LABEL_max - 1, 0 notitle, \
     keyentry with boxes lc rgb cpu title key_of('CPU'), \
     keyentry with boxes lc rgb core title key_of('CUDA core'), \
     keyentry with boxes lc rgb advanced title key_of('CUDA advanced'), \
     keyentry with boxes lc rgb hopper title key_of('CUDA hopper'), \
     keyentry with boxes lc rgb peer title (PEER_max > 0 ? 'others, as recorded' : '')
