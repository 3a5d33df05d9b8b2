# Chapter 7's crossover map from its CSV: a field for each (K/N, T), coloured by the strategy that was fastest, with how
# many times longer the second took; one map a routing.
#
#   gnuplot -e "csv='build/results/chapter7.csv'; svg='crossover.svg'" plots/crossover.gp
#
# Without svg it draws nothing: the chapter has printed the map as text.
if (!exists('svg')) svg = ''
if (svg eq '') exit

set encoding utf8

# Rows of a routing's cases: column, row, the winner (0 to 3), the lead; columns and rows by their rank.
winners = "awk -F, -v wanted=%s ' \
    $2 == \"crossover\" && $3 ~ \"-\" wanted \"-\" { \
        match($3, /T[0-9]+/); T = substr($3, RSTART + 1, RLENGTH - 1) + 0; \
        match($3, /N[0-9]+/); N = substr($3, RSTART + 1, RLENGTH - 1) + 0; \
        match($3, /K[0-9]+/); K = substr($3, RSTART + 1, RLENGTH - 1) + 0; \
        key = T \" \" N / K; tokens[T]; shares[N / K]; cell[key]; \
        who = index(\"tedc\", substr($4, 1, 1)) - 1; \
        if (!(key in best) || $8 < best[key]) { second[key] = best[key]; best[key] = $8; winner[key] = who } \
        else if (second[key] == \"\" || $8 < second[key]) second[key] = $8 \
    } \
    END { \
        for (key in cell) { \
            split(key, at, \" \"); x = y = 0; \
            for (share in shares) x += share + 0 > at[2] + 0; \
            for (T in tokens) y += T + 0 < at[1] + 0; \
            printf \"%%d %%d %%d %%.1f 1/%%d %%d\\n\", x, y, winner[key], second[key] / best[key], at[2], at[1] \
        } \
    }' '%s'"
rows_of(routing) = sprintf('< '.winners, routing, csv)
count_of(routing) = int(system(sprintf("grep -c '^[0-9]*,crossover,[^,]*-%s-' '%s' || true", routing, csv)))

routings = ''
do for [routing in 'uniform normal trained hot'] {
    routings = routings.(count_of(routing) > 0 ? ' '.routing : '')
}
if (words(routings) == 0) {
    print 'no crossover map in '.csv
    exit
}

height = 110 + 190 * words(routings)
set terminal svg size 900, height font 'Helvetica,13' background rgb 'white'
set output svg
array colours[4] = [0x8899aa, 0x4c9f38, 0xe69f00, 0x7b4ea3]
array names[4] = ['token', 'expert', 'dense', 'Cartesian rows']
set multiplot layout words(routings), 1 title 'The fastest strategy, and how many times longer the second takes' margins 0.1, 0.97, 55.0 / height, 1 - 80.0 / height spacing 0, 60.0 / height
set style fill solid 0.75 border rgb 'white'
set border 0
set tics scale 0
set ylabel 'tokens'
do for [i = 1:words(routings)] {
    set title word(routings, i).' routing' offset 0, -0.7
    stats rows_of(word(routings, i)) using 1:2 name 'CELLS' nooutput
    set xrange [-0.5:CELLS_max_x + 0.5]
    set yrange [-0.5:CELLS_max_y + 0.5]
    set xlabel (i == words(routings) ? 'share of the experts that a token chooses, K / N' : '')
    if (i == 1) {
        set key at screen 0.5, 1 - 40.0 / height center horizontal maxrows 1 samplen 1.5
    } else {
        unset key
    }
    plot rows_of(word(routings, i)) using 1:2:(0.48):(0.46):(colours[int($3) + 1]):xtic(5):ytic(6) with boxxyerror lc rgb variable notitle, \
         rows_of(word(routings, i)) using 1:2:(sprintf('%.1f×', $4)) with labels notitle, \
         for [s = 1:4] keyentry with boxes lc rgb colours[s] title names[s]
}
unset multiplot
