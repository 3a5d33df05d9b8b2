# Chapter 8: where the layer's time goes, a bar a case, a colour a step. Cases timed on a GPU say so where the CPU's are
# beside them.
#
#   gnuplot -e "csv='build/results/chapter8.csv'; svg='breakdown.svg'" plots/breakdown.gp
#
# Without svg it draws nothing: the chapter has printed the bars as text.
if (!exists('svg')) svg = ''
if (svg eq '') exit

set encoding utf8

# A line a case: its name, the four shares in percent, their sum in milliseconds.
shares = sprintf("< awk -F, '$2 == \"layer_step\" { \
        key = $3 ($6 == \"cuda\" ? \",GPU\" : \"\"); \
        if (!(key in total)) name[++count] = key; \
        time[key, $4] = $8; total[key] += $8; backends[$6] \
    } \
    END { \
        split(\"router topk expert mlp\", step, \" \"); \
        for (i = 1; i <= count; i++) { \
            label = name[i]; if (length(backends) == 1) sub(/,GPU/, \"\", label); \
            printf \"%%s\", label; \
            for (s = 1; s <= 4; s++) printf \" %%g\", 100 * time[name[i], step[s]] / total[name[i]]; \
            printf \" %%g\\n\", total[name[i]] \
        } \
    }' '%s'", csv)
cases = int(system(sprintf("awk -F, '$2 == \"layer_step\" && !seen[$3, $6]++ { count++ } END { print count + 0 }' '%s'", csv)))
if (cases == 0) {
    print 'no layer_step rows in '.csv
    exit
}

array names[4] = ['router', 'top-k', 'experts', 'MLP']
array colours[4] = [0x8899aa, 0xe69f00, 0x4c9f38, 0x3465a4]
label_of_ms(t) = t >= 1 ? sprintf('%.3g ms', t) : sprintf('%.3g µs', 1e3 * t)

set terminal svg size 900, 110 + 46 * cases font 'Helvetica,13' background rgb 'white'
set output svg
set title 'The layer''s steps one after the other: share of the time'
set key below horizontal samplen 1.5
set style fill solid 0.8 border rgb 'white'
set border 1
set xrange [0:112]
set yrange [-cases + 0.4:0.6]
set xtics 0, 20, 100 nomirror format '%g %%'
set ytics scale 0 nomirror
set lmargin 42

# Bars side by side along a line: each begins where the ones before it end.
begin(s) = sum [i = 1:s - 1] column(i + 1)
plot for [s = 1:4] shares using (begin(s) + column(s + 1) / 2):(-$0):(column(s + 1) / 2):(0.32):ytic(1) with boxxyerror lc rgb colours[s] title names[s], \
     for [s = 1:4] shares using (column(s + 1) >= 6 ? begin(s) + column(s + 1) / 2 : NaN):(-$0):(sprintf('%.0f %%', column(s + 1))) with labels textcolor rgb 'white' notitle, \
     shares using (101):(-$0):(label_of_ms($6)) with labels left notitle
