#!/bin/sh
# Installs what is missing with apt, as root or with sudo, and makes .venv for the text checks and the notebooks. Does
# nothing when nothing is missing. Elsewhere it prints what to install. CUDA is never installed: the last lines say
# where it stands. `tests/setup.sh book` also installs what makes and checks the book.
set -eu
with_book=$([ "${1:-}" = book ] && echo yes || true)
cd "$(dirname "$0")/.."

missing=
need() { # need PACKAGE COMMAND...: the package is missing if the command fails
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
has() { command -v "$1"; }
includes() { printf '#include <%s>\n' "$1" | ${2:-cc} -fopenmp -E -; }
links() { printf '%s\n' "$1" | clang -x c - "$2" -o /dev/null; }
runtime() { links 'int main(void) { return 0; }' -fsanitize=thread; }

# What builds and runs: compiler with OpenMP, Criterion, Jansson (JSON), gnuplot, OpenBLAS (a baseline of chapter 6).
need gcc has gcc
need libc6-dev includes stdio.h
need make has make
need git has git
need pkg-config has pkg-config
need libcriterion-dev includes criterion/criterion.h
need libjansson-dev includes jansson.h
need gnuplot-nox has gnuplot
need libopenblas0 sh -c 'ls /usr/lib/*/libopenblas.so.0 /usr/lib*/libopenblas.so.0 2>/dev/null | grep -q .'
# What checks: clang with its linters, its OpenMP and the sanitizers' run time, cppcheck, Python for the texts.
need clang has clang
need clang-format has clang-format
need clang-tidy has clang-tidy
need cppcheck has cppcheck
need libomp-dev includes omp.h clang
need python3 has python3
need python3-venv python3 -c 'import ensurepip, venv'
runtime >/dev/null 2>&1 || missing="$missing libclang-rt"
# What makes the book, opens its pages, and sets its formulas.
if [ "$with_book" ]; then
    need pandoc has pandoc
    need chromium-headless-shell sh -c 'command -v chromium-headless-shell || command -v chromium || command -v google-chrome'
    need fonts-lmodern sh -c 'fc-list | grep -q "Latin Modern Math"'
fi

if [ -n "$missing" ] && ! has apt-get >/dev/null; then
    echo "make setup installs with apt only. Please install what these Debian packages hold:$missing"
    exit 1
fi
if [ -n "$missing" ]; then
    echo "installing:$missing"
    as_root=
    if [ "$(id -u)" != 0 ]; then
        as_root=sudo
        has sudo >/dev/null || { echo "make setup needs to be root, or sudo"; exit 1; }
    fi
    $as_root apt-get update -qq
    # The sanitizers' run time is named after clang's version, and on some releases is part of clang.
    version=$(apt-cache depends clang | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p' | head -n 1)
    packages=
    for package in $missing; do
        if [ "$package" = libclang-rt ]; then
            package=libclang-rt-$version-dev
            apt-cache show "$package" >/dev/null 2>&1 || continue
        fi
        if [ "$package" = chromium-headless-shell ] && ! apt-cache show "$package" >/dev/null 2>&1; then
            echo "no $package in this release: make check-book needs some Chromium on the PATH"
            continue
        fi
        packages="$packages $package"
    done
    # shellcheck disable=SC2086 # the words are the packages
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
else
    echo "nothing is missing"
fi

cog=3.6.0
if [ "$(.venv/bin/cog -v 2>/dev/null || true)" != "Cog version $cog" ]; then
    echo "installing cogapp $cog into .venv"
    python3 -m venv .venv
    .venv/bin/pip install -q --disable-pip-version-check "cogapp==$cog" ||
        echo "pip could not install cogapp: everything runs without it but make check and make prose"
fi

notebooks="numpy matplotlib nbclient nbformat ipykernel"
if ! .venv/bin/python -c "import $(echo "$notebooks" | tr ' ' ,)" 2>/dev/null; then
    echo "installing $notebooks into .venv"
    # shellcheck disable=SC2086 # the words are the packages
    .venv/bin/pip install -q --disable-pip-version-check $notebooks ||
        echo "pip could not install them: everything runs without them but make notebooks and make test-lib"
fi

playwright=1.65.2
if [ "$with_book" ] && ! .venv/bin/python -c "import playwright" 2>/dev/null; then
    echo "installing playwright $playwright into .venv"
    .venv/bin/pip install -q --disable-pip-version-check "playwright==$playwright" ||
        echo "pip could not install playwright: everything runs without it but make check-book"
fi

if nvcc=$(has nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null); then
    echo "CUDA: $nvcc, $("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/release \1/p')"
else
    cat <<'EOF'
CUDA: no nvcc, and none is needed: the CPU course runs without it. To compile the CUDA code, also on a machine without
      a GPU or its driver, install the toolkit alone: NVIDIA's package cuda-toolkit (developer.nvidia.com/cuda-downloads),
      or conda install -c nvidia cuda-nvcc, and put nvcc on the PATH.
EOF
fi
