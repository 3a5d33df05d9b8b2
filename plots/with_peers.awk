# The GPU's part of a recorded chapter, in the columns of its CSV: for each case the best CPU rung of the same machine, the
# CUDA rungs, and what other implementations were measured at.
#
#   awk -f plots/with_peers.awk plots/data/nvidia-h200/peers.csv plots/data/nvidia-h200/chapter3.csv
BEGIN { FS = OFS = "," }
FNR == 1 { file++ }
/^#/ { next }
file == 1 { # op,case,variant,backend,median_ms,...
    peers[$1 FS $2] = peers[$1 FS $2] "0" OFS $1 OFS $2 OFS $3 OFS "peer" OFS "peer" OFS OFS $5 OFS OFS OFS OFS OFS OFS "NaN" OFS "\n"
    next
}
$1 == "chapter" { header = $0; next }
$6 == "cpu" && (!($2 FS $3 in cpu_ms) || $8 < cpu_ms[$2 FS $3]) { cpu[$2 FS $3] = $0; cpu_ms[$2 FS $3] = $8 }
$6 == "cuda" {
    if (!($2 FS $3 in cuda))
        order[++cases] = $2 FS $3
    cuda[$2 FS $3] = cuda[$2 FS $3] $0 "\n"
}
END {
    print header
    for (i = 1; i <= cases; i++) {
        if (order[i] in cpu)
            print cpu[order[i]]
        printf "%s%s", peers[order[i]], cuda[order[i]]
    }
}
