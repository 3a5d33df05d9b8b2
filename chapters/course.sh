#!/usr/bin/env bash
# The course's exercises: every folder chapters/N-name/ has exercises/ (statements and starters) and solutions/. A
# starter and its solution are files of one name, K-name.c or K-name.cu; the first line of each says what it is.
#
#   chapters/course.sh grade [CHAPTER]   compiles all files, grades them, and says whether they are what they claim
#   chapters/course.sh try FILE OPTION.. one file, in full; the options are the grader's
#   chapters/course.sh pack ARCHIVE      the repository without the solutions
#
# BUILD has the chapters' programs; CC and NVCC compile (no NVCC: .cu files are skipped). make grade-all, make exercise
# and make course call this.
set -uo pipefail
cd "${COURSE_ROOT:-$(dirname "$0")/..}" || exit 2
BUILD=${BUILD:-build} CC=${CC:-cc} NVCC=${NVCC:-}
out=$BUILD/course

has_device() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# chapters/3-topk/solutions/1-block.c: chapter 3, exercise 3.1
chapter_of() {
    local folder=${1#chapters/}
    echo "${folder%%-*}"
}
number_of() {
    local file=${1##*/}
    echo "$(chapter_of "$1").${file%%-*}"
}
log_of() {
    local name=${1#chapters/}
    echo "$out/${name//\//-}"
}

# What a file's first line says it is: "starter, not done", "starter, right" or "solution".
claim_of() {
    sed -nE "1s,^(/\*|//) Exercise $(number_of "$1" | sed 's/\./\\./')\, (starter\, not done|starter\, right|solution): .*,\2,p" "$1"
}

# Chapter 0 has no step to be graded in: its exercises are programs that check themselves.
is_program() {
    [[ $(chapter_of "$1") == 0 ]]
}

compile_program() { # FILE PROGRAM
    "$CC" -std=gnu11 -O3 -march=native -fopenmp -Wall -Wextra -Werror -Ichapters "$1" ref_cpu/compare.c ref_cpu/dtype.c \
        ref_cpu/status.c -o "$2" -lm
}

# Warnings are errors here; a reader's own kernel may have some. The oldest GPU of the course has to do. Leaves a file
# *.compiled, and what the compiler said in *.compile.
compile() { # FILE
    rm -f "$(log_of "$1").compiled"
    if [[ $1 != *.cu || -n $NVCC ]] && compile_only "$1" >"$(log_of "$1").compile" 2>&1; then
        touch "$(log_of "$1").compiled"
    fi
}
compile_only() { # FILE
    case $1 in
    *.cu)
        local object
        object=$(log_of "$1").o
        [[ $object -nt $1 && $object -nt chapters/steps.h ]] || "$NVCC" -std=c++17 -O3 -arch=sm_75 -Xcompiler -fPIC,-Wall,-Wextra \
            --Werror all-warnings -Ichapters -c "$1" -o "$object"
        ;;
    *) is_program "$1" || "$CC" -std=gnu11 -O1 -march=native -fopenmp -Wall -Wextra -Werror -Ichapters -c "$1" \
        -o "$(log_of "$1").o" ;;
    esac
}

# The status: 0 right, 1 wrong, 2 could not be graded. The options are the grader's.
grade() { # FILE OPTION...
    local file=$1 program
    shift
    if is_program "$file"; then
        program=$(log_of "$file").run
        compile_program "$file" "$program" || return 2
        "$program"
    else
        "$BUILD/chapter$(chapter_of "$file")" --grade "$file" "$@"
    fi
}

# Whether the file does what it claims. Prints a line, and all that was said where it does not.
hold_to_claim() { # FILE CLAIM
    local log status wanted=0 verdict options=(--quick --json "$(log_of "$1").json")
    log=$(log_of "$1").log
    [[ $2 == "starter, not done" ]] && wanted=1
    [[ $2 == starter* ]] && options+=(--threads 1) # its time is nobody's mark
    grade "$1" "${options[@]}" >"$log" 2>&1
    status=$?
    verdict=$(grep -E '^(right|wrong|not graded)\b' "$log" | tail -n 1)
    if ((status == wanted)); then
        printf 'ok       %-4s %-52s %s\n' "$(number_of "$1")" "${1#chapters/}" "${verdict:-$2}"
    else
        printf 'FAILED   %-4s %-52s a %s, and the status is %d\n' "$(number_of "$1")" "${1#chapters/}" "$2" "$status"
        sed 's/^/         /' "$log"
        return 1
    fi
}

# Everything about one file: 0 as it should be, 1 not, 3 skipped.
judge() { # FILE KIND
    local claim why=
    claim=$(claim_of "$1")
    if [[ $claim != "$2"* ]]; then
        printf 'FAILED   %s: its first line does not say "Exercise %s, %s: ..."\n' "$1" "$(number_of "$1")" "$2"
        return 1
    fi
    if [[ $1 == *.cu && -z $NVCC ]]; then
        why="no nvcc"
    elif [[ ! -e $(log_of "$1").compiled ]]; then
        printf 'FAILED   %s does not compile\n' "$1"
        cat "$(log_of "$1").compile"
        return 1
    elif [[ $1 == *.cu ]] && ! has_device; then
        why="compiled; no device"
    fi
    if [[ $why ]]; then
        printf 'skipped  %-4s %-52s %s\n' "$(number_of "$1")" "${1#chapters/}" "$why"
        return 3
    fi
    hold_to_claim "$1" "$claim"
}

# Counts in starters and solutions: right, failed, skipped.
declare -A count=([starter0]=0 [starter1]=0 [starter3]=0 [solution0]=0 [solution1]=0 [solution3]=0)

grade_all() { # [CHAPTER]
    local file kind chapters=${1:-[0-9]} files=()
    mkdir -p "$out"
    # shellcheck disable=SC2231 # a pattern on purpose
    for file in chapters/$chapters-*/{exercises,solutions}/[0-9]-*.{c,cu}; do
        [[ -e $file ]] && files+=("$file")
    done
    # All cores compile; then one file at a time is graded, alone.
    export -f compile compile_only compile_program is_program log_of chapter_of
    export out BUILD CC NVCC
    # shellcheck disable=SC2016 # $1 is the inner shell's
    printf '%s\0' "${files[@]}" | xargs -0 -r -n 1 -P "$(nproc)" bash -c 'compile "$1"' compile
    for file in "${files[@]}"; do
        kind=starter
        [[ $file == */solutions/* ]] && kind=solution
        judge "$file" $kind
        ((count[$kind$?]++))
    done
    printf '\n%d starters are what they claim, %d failed, %d skipped\n' "${count[starter0]}" "${count[starter1]}" "${count[starter3]}"
    printf '%d solutions graded, %d failed, %d skipped\n' "$((count[solution0] + count[solution1]))" "${count[solution1]}" "${count[solution3]}"
    ((count[starter1] + count[solution1] == 0))
}

# Also where there is no git, so a copy's course can be packed again.
pack() { # ARCHIVE
    mkdir -p "$(dirname "$1")"
    tar --dereference -czf "$1" --exclude=__pycache__ --exclude='*.o' --exclude='chapters/*/solutions' --transform 's,^,flashmoe-course/,SH' \
        .ci .clang-format .clang-tidy .gitignore LICENSE Makefile README.md chapters cuda notebooks plots ref_cpu tests
}

case ${1:-} in
grade) grade_all "${2:-}" ;;
try)
    mkdir -p "$out"
    shift
    grade "$@"
    ;;
pack) pack "$2" ;;
*)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
