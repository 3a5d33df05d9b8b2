#!/usr/bin/env python3
"""Our best CPU rungs against the same operators as a student would write them in NumPy and in PyTorch, in one run.

Ours are timed by the chapter programs (./chapter1, 3, 5, 6), which also check every rung against the reference. NumPy
and PyTorch draw inputs of the same sizes and distribution here, and are checked against each other. Everybody gets the
same number of threads. A contestant's time is its best median of a few rounds, ours included, so that a neighbour on
the machine does not decide. The MLP's products are also compared with OpenBLAS's, and the expert step's peak memory
with the size of its inputs and outputs.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("--threads", type=int, default=2)
arguments.add_argument("--rounds", type=int, default=3)
arguments.add_argument("--quick", action="store_true", help="one round of short timings, to see that it works")
arguments.add_argument("--csv", type=Path, default=Path("build/results/compare.csv"))
arguments.add_argument("--memory", default="build/memory", help="the program that measures peak memory")
options = arguments.parse_args()

# Read by the libraries when they are loaded. A pinned kernel type would be an unfair opponent.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(options.threads)
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)

try:
    import numpy as np
except ImportError:
    sys.exit("compare: NumPy is needed (apt install python3-numpy)")
try:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parent.parent
T, N, K, D, I = 1024, 16384, 64, 256, 1024
KEYS = 128
EXPERT = f"T{T}-d{D}-N{N}-K{K}-normal-f32"
TOPK = f"T{T}-n{KEYS}-K{K}-normal-f32"
MLP = [f"T{T}-d{D}-I{I}-f32", "T1024-d512-I2048-f32"]
LIMIT = 1e-5  # of the relative error, as for every float32 result


# ---- The operators, as a student writes them ----------------------------------------------------------------------


def silu(s):
    return s / (1 + np.exp(-s))


def numpy_log_softmax(z):
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def numpy_best(values, k):
    chosen = np.argpartition(-values, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(values, chosen, 1), axis=1)
    chosen = np.take_along_axis(chosen, order, 1)
    return np.take_along_axis(values, chosen, 1), chosen


def numpy_topk_all_pairs(logits):
    x, y = numpy_log_softmax(logits)
    scores, indices = numpy_best((x[:, :, None] + y[:, None, :]).reshape(len(x), -1), K)
    return indices, scores, np.exp(scores)


def numpy_topk_keys(logits):
    x, y = numpy_log_softmax(logits)
    m = min(K, x.shape[1])
    (x, i), (y, j) = numpy_best(x, m), numpy_best(y, m)
    scores, pair = numpy_best((x[:, :, None] + y[:, None, :]).reshape(len(x), -1), K)
    indices = np.take_along_axis(i, pair // m, 1) * KEYS + np.take_along_axis(j, pair % m, 1)
    return indices, scores, np.exp(scores)


def numpy_expert_gather(x, down, up, indices, weights):
    a = silu(np.einsum("td,tkd->tk", x, down[indices])) * weights
    return np.einsum("tk,tkd->td", a, up[indices])


def numpy_expert_dense(x, down, up, indices, weights):
    mask = np.zeros((len(x), len(down)), np.float32)
    np.put_along_axis(mask, indices, weights, 1)
    return (silu(x @ down.T) * mask) @ up


def numpy_mlp(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def torch_topk_all_pairs(logits):
    x, y = logits.log_softmax(-1)
    scores, indices = (x[:, :, None] + y[:, None, :]).flatten(1).topk(K)
    return indices, scores, scores.exp()


def torch_topk_keys(logits):
    x, y = logits.log_softmax(-1)
    m = min(K, x.shape[1])
    (x, i), (y, j) = x.topk(m), y.topk(m)
    scores, pair = (x[:, :, None] + y[:, None, :]).flatten(1).topk(K)
    indices = i.gather(1, torch.div(pair, m, rounding_mode="floor")) * KEYS + j.gather(1, pair % m)
    return indices, scores, scores.exp()


def torch_expert_gather(x, down, up, indices, weights):
    a = F.silu(torch.einsum("td,tkd->tk", x, down[indices])) * weights
    return torch.einsum("tk,tkd->td", a, up[indices])


def torch_expert_dense(x, down, up, indices, weights):
    mask = torch.zeros(len(x), len(down)).scatter_(1, indices, weights)
    return (F.silu(x @ down.T) * mask) @ up


def torch_mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# ---- Measuring ----------------------------------------------------------------------------------------------------


def median_ms(call):
    call()
    times, end = [], time.perf_counter() + (0.1 if options.quick else 0.7)
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def relative_error(out, ref):
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    return float(np.linalg.norm(out - ref) / np.linalg.norm(ref))


def chapter(number, case, only=()):
    """The rows of one run of a chapter program, and the comments of its CSV."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.csv"
        command = [ROOT / f"chapter{number}", "--case", case, "--csv", path, "--threads", str(options.threads)]
        command += ["--only", ",".join(only)] if only else []
        command += ["--quick"] if options.quick else []
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"compare: chapter {number} failed:\n{done.stdout}")
        lines = path.read_text().splitlines()
    comments = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    rows = [r for r in csv.DictReader(l for l in lines if not l.startswith("#")) if r["backend"] == "cpu"]
    for row in rows:
        if not float(row["rel_err"]) <= LIMIT:
            sys.exit(f"compare: chapter {number}, {row['variant']}: error {row['rel_err']} is over {LIMIT}")
    return rows, comments


contenders = {}


def ours(number, case):
    """{who: ms} of the chapter's fastest rung, and of the library's where the chapter has one."""
    rows, _ = chapter(number, case, contenders.get((number, case), ()))
    times = {row["variant"]: float(row["median_ms"]) for row in rows}
    library = times.pop("openblas", None)
    best = min(times, key=times.get)
    # Rungs that are far behind after the first round need not run again.
    near = [variant for variant, ms in times.items() if ms < 2 * times[best]]
    contenders[number, case] = near + (["openblas"] if library else [])
    found = {("flashmoe.c", f"chapter {number}, {best}"): times[best]}
    return found | ({("OpenBLAS", "sgemm and a pass"): library} if library else {})


def best_of_rounds(measure):
    """The smallest time of every contestant over the rounds. Of a chapter's rungs only the fastest stays."""
    best = {}
    for _ in range(1 if options.quick else options.rounds):
        for who, ms in measure().items():
            best[who] = min(ms, best.get(who, ms))
    chapter_of = lambda who: who[1].split(",")[0] if who[0] == "flashmoe.c" else who
    fastest = {}
    for who, ms in best.items():
        if ms <= best.get(fastest.get(chapter_of(who)), ms):
            fastest[chapter_of(who)] = who
    return {who: best[who] for who in fastest.values()}


# ---- The contests -------------------------------------------------------------------------------------------------


def inputs():
    random = np.random.default_rng(1)
    normal = lambda scale, *shape: (scale * random.standard_normal(shape)).astype(np.float32)
    logits = normal(1, 2, T, KEYS)
    indices, _, weights = numpy_topk_all_pairs(logits)
    expert = (normal(1, T, D), normal(D**-0.5, N, D), normal(D**-0.5, N, D), indices, weights)
    mlps = {}
    for case in MLP:
        t, d, i = (int(word[1:]) for word in case.split("-")[:3])
        mlps[case] = (normal(1, t, d), normal(d**-0.5, i, d), normal(d**-0.5, i, d), normal(i**-0.5, d, i))
    return (logits,), expert, mlps


def agree(op, results):
    """NumPy and PyTorch compute the same thing, each in each of its ways."""
    (first, reference), *rest = results.items()
    for who, result in rest:
        error = relative_error(result, reference)
        if not error <= LIMIT:
            sys.exit(f"compare: {op}: {' '.join(who)} and {' '.join(first)} differ by {error:.1e}")


def contest(op, case, numbers, students, args):
    tensors = tuple(torch.from_numpy(a) for a in args) if torch else ()
    calls = {}
    for who, function in students.items():
        if who[0] == "PyTorch" and not torch:
            continue
        given = tensors if who[0] == "PyTorch" else args
        calls[who] = lambda function=function, given=given: function(*given)
    # The top-k returns indices, scores and weights: sorted scores say whether the same sums were found.
    agree(op, {who: (r[1] if isinstance(r, tuple) else r) for who, r in ((w, c()) for w, c in calls.items())})

    def measure():
        times = {}
        for number in numbers:
            times |= ours(number, case)
        return times | {who: median_ms(call) for who, call in calls.items()}

    return [(op, case, *who, ms) for who, ms in best_of_rounds(measure).items()]


def contests():
    logits, expert, mlps = inputs()
    topk = {
        ("NumPy", "all pairs"): numpy_topk_all_pairs,
        ("NumPy", "best keys a side"): numpy_topk_keys,
        ("PyTorch", "all pairs"): torch_topk_all_pairs,
        ("PyTorch", "best keys a side"): torch_topk_keys,
    }
    experts = {
        ("NumPy", "gather"): numpy_expert_gather,
        ("NumPy", "dense under a mask"): numpy_expert_dense,
        ("PyTorch", "gather"): torch_expert_gather,
        ("PyTorch", "dense under a mask"): torch_expert_dense,
    }
    rows = contest("expert", EXPERT, (1, 5), experts, expert)
    rows += contest("topk", TOPK, (3,), topk, logits)
    for case, args in mlps.items():
        rows += contest("mlp", case, (6,), {("NumPy", ""): numpy_mlp, ("PyTorch", ""): torch_mlp}, args)
    return rows


def memory():
    done = subprocess.run([options.memory, EXPERT], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("compare: the memory program failed")
    return list(csv.DictReader(done.stdout.splitlines()))


# ---- The report ---------------------------------------------------------------------------------------------------


def fastest(rows, op, case, who):
    return min((r[4] for r in rows if r[:2] == (op, case) and r[2] == who), default=None)


def ratio_to_ours(rows, row):
    """A student's time over our best, or, for a row of ours, the best student's time over it."""
    op, case, who, _, ms = row
    if who != "flashmoe.c":
        return ms / fastest(rows, op, case, "flashmoe.c")
    rivals = ["OpenBLAS"] if op == "mlp" else ["NumPy", "PyTorch"]
    times = [t for t in (fastest(rows, op, case, r) for r in rivals) if t]
    return min(times) / ms if times else float("nan")


def report(rows, peaks):
    heading = None
    for row in rows:
        if row[:2] != heading:
            heading = row[:2]
            rival = "OpenBLAS" if row[0] == "mlp" else "the best student"
            print(f"\n{row[0]}  {row[1]}    ours: times ahead of {rival}; others: times slower than our best")
        print(f"  {row[2]:<12} {row[3]:<34} {row[4]:>10.3f} ms {ratio_to_ours(rows, row):>8.2f} ×")
    print(f"\npeak memory of the expert step  {EXPERT}")
    for p in peaks:
        tensors, workspace, peak = (float(p[k]) / 1e6 for k in ("tensor_bytes", "workspace_bytes", "peak_bytes"))
        print(
            f"  {p['rung']:<12} inputs and outputs {tensors:.1f} MB, workspace {workspace:.2f} MB, "
            f"peak {peak:.1f} MB: {peak / tensors:.2f} × inputs and outputs"
        )


def versions():
    info = [f"Python {platform.python_version()}", f"NumPy {np.__version__}"]
    return ", ".join(info + ([f"PyTorch {torch.__version__}"] if torch else []))


def write(rows, peaks, comments):
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        for key in ("device", "system", "compiler", "clocks seen", "date", "commit"):
            file.write(f"# {key}: {comments.get(key, 'unknown')}\n")
        file.write(f"# versions: {versions()}\n# rounds: {1 if options.quick else options.rounds}, the best median\n")
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["op", "case", "who", "variant", "median_ms", "ratio", "threads"])
        for row in rows:
            out.writerow([*row[:4], f"{row[4]:.4f}", f"{ratio_to_ours(rows, row):.2f}", options.threads])
        for p in peaks:
            ratio = float(p["peak_bytes"]) / float(p["tensor_bytes"])
            out.writerow(["expert_peak_memory", EXPERT, "flashmoe.c", p["rung"], "", f"{ratio:.3f}", options.threads])
    print(f"\nwritten to {options.csv}")


def main():
    print(f"{versions()}; {options.threads} threads")
    if not torch:
        print("PyTorch is not installed: its rows are left out (apt install python3-torch)")
    rows, peaks = contests(), memory()
    _, comments = chapter(3, "T16-n16-K4-normal-f32")
    report(rows, peaks)
    write(rows, peaks, comments)
    if any(float(p["peak_bytes"]) >= 2 * float(p["tensor_bytes"]) for p in peaks):
        sys.exit("compare: the expert step takes twice its inputs and outputs")


main()
