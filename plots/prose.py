"""What the texts quote: code, recorded figures and test sentences, put into the Markdown files by cog.

    <!-- [[[cog snippet("ref_cpu/topk.c", "staircase") ]]] -->
    <!-- [[[end]]] -->

`make prose` fills the blocks in, `make check` fails if one is out of step with what it quotes.
Run as a program it checks the links: python3 plots/prose.py FILE.md...
"""

import csv
import itertools
import os
import re
import subprocess
import sys
import textwrap
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {".c": "c", ".h": "c", ".cu": "cuda", ".cuh": "cuda", ".py": "python", ".sh": "sh", ".gp": "gnuplot"}


def put(text):
    import cog  # exists only while cog runs a block

    cog.outl(text)


def link(path):
    """A Markdown link to a file of the repository, relative to the text it stands in."""
    import cog

    return f"[{path}]({os.path.relpath(ROOT / path, (ROOT / cog.inFile).parent)})"


# ---- Code -----------------------------------------------------------------------------------------------------------


def snippet(path, region):
    """The lines between `// [region]` and `// [/region]`."""
    lines = (ROOT / path).read_text().splitlines()
    marks = [line.strip() for line in lines]
    first, last = f"// [{region}]", f"// [/{region}]"
    if marks.count(first) != 1 or marks.count(last) != 1 or marks.index(last) < marks.index(first):
        raise ValueError(f"{path} needs one {first} and then one {last}")
    kept = lines[marks.index(first) + 1 : marks.index(last)]
    kept = [line for line in kept if not re.fullmatch(r"\s*// \[/?[\w-]+\]", line)]
    code = textwrap.dedent("\n".join(kept)).strip("\n")
    put(f"{link(path)}:\n\n```{LANGUAGES.get(Path(path).suffix, '')}\n{code}\n```")


# ---- Recorded figures -----------------------------------------------------------------------------------------------


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def recorded(chapter):
    """The chapter's rows from the first device with CPU figures, one without CUDA figures if there is one."""
    choices = []
    for path in sorted(ROOT.glob(f"plots/data/*/chapter{chapter}.csv")):
        rows = read_rows(path)
        backends = {row["backend"] for row in rows}
        if "cpu" in backends:
            choices.append(("cuda" in backends, path, [row for row in rows if row["backend"] == "cpu"]))
    if not choices:
        return None, []
    _, path, rows = min(choices, key=lambda choice: choice[:2])
    return path.relative_to(ROOT), rows


def number(text):
    return float(text) if text else float("nan")


def digits(value, count=3):
    """A number with `count` significant digits and no exponent."""
    return f"{Decimal(f'{value:.{count - 1}e}'):f}" if value == value else ""


def ladder_table(rows):
    lines = ["| rung | time (ms) | × the one before | × the first | of the floor | error |", "| --- |" + " --: |" * 5]
    before = first = None
    for row in rows:
        time = number(row["median_ms"])
        floor = number(row["floor_ms"]) / time
        cells = [
            row["variant"],
            digits(time),
            digits(before / time, 2) if before else "",
            digits(first / time, 2) if first else "",
            digits(100 * floor, 1 if floor < 0.1 else 2) + " %" if floor == floor else "",
            f"{number(row['rel_err']):.1e}" if number(row["rel_err"]) else "0",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        before, first = time, first or time
    return "\n".join(lines)


def ladder(chapter, op, case=None):
    """A table a case, rungs in the order they were measured in."""
    path, rows = recorded(chapter)
    rows = [row for row in rows if row["op"] == op and case in (None, row["case"])]
    if not rows:
        where = f" at `{case}`" if case else ""
        how = f"`make chapter{chapter} && ./chapter{chapter}`"
        put(f"*No figures of `{op}`{where} are recorded yet; {how} measures them.*")
        return
    text = []
    for name, group in itertools.groupby(rows, key=lambda row: row["case"]):
        group = list(group)
        where = f"{group[0]['device']}, {group[0]['date']}"
        text.append(f"`{op}` at `{name}` on {where} ({link(path)}):\n\n{ladder_table(group)}")
    put("\n\n".join(text))


def recorded_gpu(chapter):
    """The chapter's CSV and rows from the first machine with CUDA figures."""
    for path in sorted(ROOT.glob(f"plots/data/*/chapter{chapter}.csv")):
        rows = read_rows(path)
        if any(row["backend"] == "cuda" for row in rows):
            return path.relative_to(ROOT), rows
    return None, []


def gpu_table(rows, cpu, peers):
    """A line a rung, after them what others reach, and the fastest CPU rung that the same run timed at this case."""
    lines = ["| rung | level | time (ms) | × the one before | × the CPU | of the floor | error |"]
    lines.append("| --- | --- |" + " --: |" * 5)
    best_cpu = min((number(row["median_ms"]) for row in cpu), default=float("nan"))
    best_gpu = min(number(row["median_ms"]) for row in rows)
    before = float("nan")
    for row in rows:
        time = number(row["median_ms"])
        floor = number(row["floor_ms"]) / time
        cells = [
            row["variant"],
            row["level"],
            digits(time),
            digits(before / time, 2),
            digits(best_cpu / time, 2),
            digits(100 * floor, 1 if floor < 0.1 else 2) + " %" if floor == floor else "",
            f"{number(row['rel_err']):.1e}" if number(row["rel_err"]) else "0",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        before = time
    for row in sorted(peers, key=lambda row: number(row["median_ms"])):
        time = number(row["median_ms"])
        lines.append(f"| *{row['variant']}* | *peer* | {digits(time)} | {digits(time / best_gpu, 2)} × ours | | | |")
    if best_cpu == best_cpu:
        name = min(cpu, key=lambda row: number(row["median_ms"]))
        lines.append(f"| *{name['variant']}* | *CPU, {name['threads']} threads* | {digits(best_cpu)} | | 1.0 | | |")
    return "\n".join(lines)


def gpu_ladder(chapter, op, case=None):
    """A table a case of the CUDA rungs, with the peers' recorded figures at the same case."""
    path, rows = recorded_gpu(chapter)
    rows = [row for row in rows if row["op"] == op and case in (None, row["case"])]
    cases = dict.fromkeys(row["case"] for row in rows if row["backend"] == "cuda")
    if not cases:
        where = f" at `{case}`" if case else ""
        put(f"*No GPU figures of `{op}`{where} are recorded yet; `make chapter{chapter} && ./chapter{chapter}` measures them.*")
        return
    text = []
    for name in cases:
        here = [row for row in rows if row["case"] == name]
        gpu = [row for row in here if row["backend"] == "cuda"]
        cpu = [row for row in here if row["backend"] == "cpu"]
        others = path.parent / "peers.csv"
        peers = read_rows(ROOT / others) if (ROOT / others).exists() else []
        peers = [row for row in peers if row["op"] == op and row["case"] == name]
        where = f"{gpu[0]['device']}, {gpu[0]['date']}"
        text.append(f"`{op}` at `{name}` on {where} ({link(path)}):\n\n{gpu_table(gpu, cpu, peers)}")
    put("\n\n".join(text))


def gpu_breakdown():
    """Chapter 8's steps on the GPU, one after the other: what the layer takes longer for going on to a step's end."""
    path, rows = recorded_gpu(8)
    rows = [row for row in rows if row["op"] == "layer_step" and row["backend"] == "cuda"]
    if not rows:
        put("*The GPU's steps are not recorded yet; `make chapter8 && ./chapter8` times them.*")
        return
    steps = list(dict.fromkeys(row["variant"] for row in rows))
    lines = ["| case | " + " | ".join(steps) + " | in turn |", "| --- |" + " --: |" * (len(steps) + 1)]
    for case, group in itertools.groupby(rows, key=lambda row: row["case"]):
        times = {row["variant"]: 1e3 * number(row["median_ms"]) for row in group}
        cells = [digits(times[step], 3 if times[step] >= 10 else 2) for step in steps] + [digits(sum(times.values()))]
        lines.append(f"| `{case}` | " + " | ".join(cells) + " |")
    put("Microseconds, " + f"{rows[0]['device']}, {rows[0]['date']} ({link(path)}):\n\n" + "\n".join(lines))


def layer_ratios():
    """Chapter 8: the best rung of the layer at each T, beside the best that PyTorch was measured at."""
    path, rows = recorded_gpu(8)
    peers = read_rows(ROOT / path.parent / "peers.csv") if path else []
    columns = []
    for case in dict.fromkeys(row["case"] for row in rows if row["op"] == "layer" and row["backend"] == "cuda"):
        here = [row for row in rows if row["op"] == "layer" and row["backend"] == "cuda" and row["case"] == case]
        others = [row for row in peers if row["op"] == "layer" and row["case"] == case and "torch" in row["variant"]]
        if others:
            ours, best = (min(number(row["median_ms"]) for row in group) for group in (here, others))
            columns.append((case.split("-")[0][1:], digits(ours), digits(best / ours, 2)))
    heads = ["| T |", "| --- |", "| ours (ms) |", "| PyTorch's best, × ours |"]
    cells = [(T, "--:", ours, ratio) for T, ours, ratio in columns]
    put("\n".join(head + "".join(f" {cell[i]} |" for cell in cells) for i, head in enumerate(heads)))


def ceilings():
    """Chapter 0's rates: the fastest run, and the median beside it."""
    path, rows = recorded(0)
    if not rows:
        put("*No ceilings are recorded yet; `make ceilings` measures them.*")
        return
    lines = ["| what | case | fastest run | median | |", "| --- | --- | --: | --: | --- |"]
    for row in rows:
        times = number(row["min_ms"]), number(row["median_ms"])
        if number(row["bytes"]):
            cells, unit = [digits(number(row["bytes"]) / ms * 1e-6) for ms in times], "GB/s"
        elif number(row["flops"]):
            cells, unit = [digits(number(row["flops"]) / ms * 1e-6) for ms in times], "GFLOP/s"
        else:
            cells, unit = [digits(ms * 1e3) for ms in times], "µs"
        lines.append(f"| {row['op']} | {row['case'].strip('-')} | {cells[0]} | {cells[1]} | {unit} |")
    put(f"{rows[0]['device']}, {rows[0]['date']} ({link(path)}):\n\n" + "\n".join(lines))


def gpu_ceilings():
    """Chapter 0's rates on the first machine with a GPU: the fastest run, and the median beside it."""
    path, rows = recorded_gpu(0)
    rows = [row for row in rows if row["backend"] == "cuda" and row["op"] != "timing"]
    if not rows:
        put("*No ceilings of a GPU are recorded yet; `make ceilings` measures them.*")
        return
    lines = ["| what | case | fastest run | median | |", "| --- | --- | --: | --: | --- |"]
    for row in rows:
        times = number(row["min_ms"]), number(row["median_ms"])
        work = number(row["bytes"]) or number(row["flops"])
        unit = "TB/s" if number(row["bytes"]) else "TFLOP/s" if work else "µs"
        cells = [digits(work / ms * 1e-9 if work else ms * 1e3) for ms in times]
        lines.append(f"| {row['op']} | {row['case'].strip('-')} | {cells[0]} | {cells[1]} | {unit} |")
    put(f"{rows[0]['device']}, {rows[0]['date']} ({link(path)}):\n\n" + "\n".join(lines))


def comparison():
    """What `make compare` recorded: our best rung of each operator beside the students' and the library's."""
    path = next(iter(sorted(ROOT.glob("plots/data/*/compare.csv"))), None)
    if not path:
        put("*Nothing is recorded yet; `make compare` measures it.*")
        return
    with open(path, newline="") as file:
        lines = file.readlines()
    comments = dict(line[2:].strip().split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    rows = [row for row in csv.DictReader(line for line in lines if not line.startswith("#")) if row["median_ms"]]
    text = ["| operator | case | who | how | time (ms) | × ours |", "| --- | --- | --- | --- | --: | --: |"]
    for key, group in itertools.groupby(rows, key=lambda row: (row["op"], row["case"])):
        group = sorted(group, key=lambda row: number(row["median_ms"]))
        ours = min(number(row["median_ms"]) for row in group if row["who"] == "flashmoe.c")
        seen = set()
        for row in group:
            if row["who"] in seen and row["who"] == "flashmoe.c":
                continue
            seen.add(row["who"])
            ratio = digits(number(row["median_ms"]) / ours, 2)
            text.append(
                f"| {key[0]} | `{key[1]}` | {row['who']} | {row['variant']} | {digits(number(row['median_ms']))} | {ratio} |"
            )
    where = f"{comments.get('device', 'unknown')}, {comments.get('date', 'unknown')}, {comments.get('versions', '')}"
    put("\n".join(text) + f"\n\n{where} ({link(path.relative_to(ROOT))}).")


VENDOR = ("cublas", "cusparse", "radix-cub")  # rungs that are the vendor's, not ours


def headline(*chosen):
    """On the GPU: the best rung of each operator at the cases that others were measured at, beside the best of these.
    chosen limits it to some, each an operator and a case: "topk T4096-n128-K64-normal-f32"."""
    lines = ["| operator | case | ours (ms) | rung | best other (ms) | who | ratio |", "| --- | --- | --: | --- | --: | --- | --: |"]
    dates, device, seen = set(), "", set()
    for chapter in (3, 7, 5, 6, 8, 9):
        path, rows = recorded_gpu(chapter)
        if not rows:
            continue
        peers = read_rows(ROOT / path.parent / "peers.csv")
        rows = [row for row in rows if row["backend"] == "cuda" and number(row["median_ms"]) and row["variant"] not in VENDOR]
        device = rows[0]["device"]
        dates |= {row["date"] for row in rows}
        for key in dict.fromkeys((row["op"], row["case"]) for row in rows):
            here = [row for row in rows if (row["op"], row["case"]) == key]
            others = [row for row in peers if (row["op"], row["case"]) == key]
            if not others or key in seen or (chosen and " ".join(key) not in chosen):
                continue
            seen.add(key)
            ours = min(here, key=lambda row: number(row["median_ms"]))
            other = min(others, key=lambda row: number(row["median_ms"]))
            times = number(ours["median_ms"]), number(other["median_ms"])
            lines.append(
                f"| {key[0]} | `{key[1]}` | {digits(times[0])} | chapter {chapter}, {ours['variant']} "
                f"| {digits(times[1])} | {other['variant']} | {digits(times[1] / times[0], 2)} |"
            )
    if lost := {*chosen} - {" ".join(key) for key in seen}:
        raise ValueError(f"nobody measured {lost}")
    if not seen:
        put("*No GPU figures are recorded yet.*")
        return
    *earlier, last = sorted(dates)
    when = " and ".join([", ".join(earlier), last] if earlier else [last])
    put("\n".join(lines) + f"\n\n{device}, {when}; the others 2026-11-23 on the same kind of GPU, as recorded.")


# ---- Make targets ---------------------------------------------------------------------------------------------------


def targets():
    """What `make help` lists."""
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    put("```\n" + "\n".join("make " + line for line in listed.strip().splitlines()) + "\n```")


# ---- Test sentences -------------------------------------------------------------------------------------------------

STRING = r'(?:"(?:[^"\\]|\\.)*"\s*)+'
SENTENCE = re.compile(rf"SENTENCE\(\s*(\d+)\s*,\s*(\d+)\s*,\s*({STRING}),\s*({STRING}),\s*({STRING})\)")


def c_string(literal):
    parts = re.findall(r'"((?:[^"\\]|\\.)*)"', literal)
    return re.sub(r"\\(.)", r"\1", "".join(parts))


def sentences(chapter):
    """What the tests promise, by number."""
    found = {}
    for path in sorted(ROOT.glob("tests/*.c")):
        for match in SENTENCE.finditer(path.read_text()):
            if int(match[1]) == chapter:
                found[int(match[2])] = [c_string(match[i]) for i in (3, 4, 5)]
    if not found:
        put(f"*No sentence has a number in chapter {chapter} yet.*")
        return
    lines = []
    for n, (text, why, against) in sorted(found.items()):
        lines.append(f"* **{chapter}.{n}** {text} *Why:* {why}. *Against:* {against}.")
    put("\n".join(lines))


# ---- Links ----------------------------------------------------------------------------------------------------------


def broken_links(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", Path(path).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text):
        if re.match(r"[a-z]+:|#", target):
            continue
        if not (Path(path).parent / target.split("#")[0]).exists():
            yield target


if __name__ == "__main__":
    broken = [f"{path}: no such file: {target}" for path in sys.argv[1:] for target in broken_links(path)]
    print("\n".join(broken), end="\n" if broken else "")
    sys.exit(bool(broken))
