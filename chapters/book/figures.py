"""The book's drawings. Each stands in the place of a picture in characters, found by one of that picture's lines: when
the line is in no text any more, the build ends. All are drawn here, as SVG that is legible in light and dark."""

from html import escape

STYLE = """
svg { font: 15px system-ui, "DejaVu Sans", sans-serif; }
text { fill: #1d2733; } .small { font-size: 13px; } .dim { fill: #5d6b7a; } .on { fill: #fff; }
.mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.line { stroke: #5d6b7a; fill: none; stroke-width: 1.5; } .head { fill: #5d6b7a; }
.cell { stroke: #c3ccd6; } .none { fill: #f3f5f8; } .blue { fill: #2f6fab; } .orange { fill: #d9822b; }
.green { fill: #3d8b5f; } .pale { fill: #cfe0f0; } .sand { fill: #f7e3cd; } .mint { fill: #d5ebdd; }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e8ee; } .dim { fill: #9aa7b5; } .on { fill: #fff; } .line { stroke: #9aa7b5; } .head { fill: #9aa7b5; }
  .cell { stroke: #48535f; } .none { fill: #232a33; } .pale { fill: #1f3d59; } .sand { fill: #56391a; } .mint { fill: #1f4531; }
}
"""


class Drawing:
    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def rect(self, x, y, width, height, kind="none", text="", inside="", round=0):
        self.parts.append(f'<rect class="cell {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{round}"/>')
        lines = text.split("\n") if text else []
        white = "on" if kind in ("blue", "orange", "green") else ""
        for i, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + 5 + 18 * (i - (len(lines) - 1) / 2), line, "middle", f"{white} {inside}")

    def text(self, x, y, text, anchor="start", kind=""):
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, *points, arrow=False, width=1.5, dash=""):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#head)"' if arrow else ""
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline class="line" points="{path}" style="stroke-width:{width}"{end}{dash}/>')

    def arrow(self, *points, **how):
        self.line(*points, arrow=True, **how)

    def pointer(self, x, tip, y, thick):
        """A broad arrow to the left."""
        half, wing = thick / 2, thick / 2 + 3
        points = [(x, -half), (tip + 10, -half), (tip + 10, -wing), (tip, 0), (tip + 10, wing), (tip + 10, half), (x, half)]
        self.parts.append(f'<polygon class="head" points="{" ".join(f"{a:g},{y + b:g}" for a, b in points)}"/>')

    def svg(self):
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}"><style>{STYLE}</style>{head}{"".join(self.parts)}</svg>\n'
        )


FIGURES = []  # (name, a line of the picture that it replaces, what it shows, the function that draws it)


def figure(name, line, caption):
    def register(draw):
        FIGURES.append((name, line, caption, draw))
        return draw

    return register


# ---- Chapter 0 ------------------------------------------------------------------------------------------------------


def memory_path(places):
    """(name, size, rate, height) from the registers outward; the arrows are as thick as the rate is high."""
    d = Drawing(720, 210)
    x = 10
    for i, (name, size, rate, width, height, thick) in enumerate(places):
        if i:
            d.pointer(x + 34, x + 4, 95, thick)
            x += 38
        d.rect(x, 95 - height / 2, width, height, ["blue", "pale", "pale", "sand", "sand"][i], size, round=5)
        d.text(x + width / 2, 95 - height / 2 - 10, name, "middle", "small")
        for k, line in enumerate(rate.split("\n")):
            d.text(x + width / 2, 95 + height / 2 + 22 + 17 * k, line, "middle", "small dim")
        x += width
    return d


@figure("memory-cpu", "│ a·b + c │◄─┤ 48 KB  │◄─┤  1 MB    │◄─┤    32 MB      │◄─┤  many GB           │",
        "The way of a number to the multiplier: the nearer it lies, the faster it comes.")
def _():
    return memory_path([("registers", "a·b + c", "FMA peak", 84, 44, 0), ("L1", "48 KB", "once a core", 84, 60, 7),
                        ("L2", "1 MB", "once a core", 96, 84, 5), ("L3", "32 MB", "shared by the cores", 124, 108, 3),
                        ("memory", "many GB", "outside the chip", 150, 132, 1.5)])


@figure("memory-gpu", "  65 TFLOP/s       33 TB/s             9 to 12 TB/s            4.2 TB/s",
        "The same way in an H200: registers and shared memory are there in each multiprocessor, the rates are all of them together.")
def _():
    return memory_path([("registers", "a·b + c", "65 TFLOP/s", 96, 50, 0),
                        ("shared memory, L1", "256 KB\nin each", "33 TB/s", 150, 76, 8),
                        ("L2", "63 MB", "9 to 12 TB/s", 150, 104, 4),
                        ("memory", "141 GB", "4.2 TB/s", 170, 132, 1.5)])


# ---- Chapter 1 ------------------------------------------------------------------------------------------------------


@figure("expert", "e₂  ████████████ ─⟨x,·⟩─► s₂ ─► a₂ ─×──► ████████████ ─┤",
        "One token, K = 3: three rows of down are asked how much they have to do with x, and the same rows of up are added.")
def _():
    d = Drawing(720, 260)
    d.text(105, 22, "down [N, d]", "middle"), d.text(495, 22, "up [N, d]", "middle")
    chosen = {1: "1", 4: "2", 6: "3"}
    for row in range(8):
        y = 34 + 26 * row
        for x in (40, 430):
            d.rect(x, y, 130, 22, "blue" if row in chosen else "none")
        if row in chosen:
            k = "₁₂₃"[int(chosen[row]) - 1]
            d.text(30, y + 16, f"e{k}", "end")
            d.arrow((174, y + 11), (248, y + 11)), d.text(211, y + 5, "⟨x, ·⟩", "middle", "small dim")
            d.text(262, y + 16, f"s{k}", "middle"), d.arrow((276, y + 11), (340, y + 11))
            d.text(308, y + 5, "silu · g", "middle", "small dim"), d.text(354, y + 16, f"a{k}", "middle")
            d.arrow((368, y + 11), (424, y + 11)), d.text(396, y + 5, "×", "middle", "dim")
            d.arrow((564, y + 11), (600, y + 11), (632, 144 + {1: -8, 4: 6, 6: 12}[row]))
    d.text(646, 151, "Σ"), d.arrow((662, 146), (690, 146)), d.text(696, 151, "y")
    return d


@figure("coalescing", " thread-a-token: one load                         warp-a-token: one load",
        "What one load instruction of a warp touches: left 32 sectors of which 2 bytes each are used, right two sectors, used whole.")
def _():
    d = Drawing(720, 230)
    d.text(10, 22, "a thread a token"), d.text(400, 22, "a warp a token")
    for row in range(6):
        y = 40 + 28 * row
        name = ["thread 0", "thread 1", "thread 2", "…", "thread 30", "thread 31"][row]
        d.text(76, y + 16, name, "end", "small")
        if name == "…":
            continue
        start = [2, 7, 0, 0, 9, 4][row]
        for s in range(12):
            d.rect(86 + 22 * s, y, 22, 20, "sand" if s == start else "none")
        d.rect(86 + 22 * start, y, 5, 20, "orange")
    d.text(86, 222, "32 rows, a sector of 32 bytes from each", "start", "small dim")
    for s in range(12):
        d.rect(440 + 22 * s, 96, 22, 20, "orange" if s in (3, 4) else "none")
    for lane in range(16):
        d.line((463 + 8 * lane, 54), (508 + 44 / 15 * lane - 1, 94), width=0.8)
    d.text(523, 48, "threads 0 … 31", "middle", "small")
    d.text(440, 138, "one row, two sectors", "start", "small dim")
    return d


# ---- Chapter 2 ------------------------------------------------------------------------------------------------------


@figure("statistics", "64 tokens │ shift, Σ, Σ²   │ shift, Σ, Σ²   │        statistics_kernel: a block of 256 threads each",
        "Mean and variance of every column in two kernels: blocks of 64 tokens × 128 hidden units, then a join down each column.")
def _():
    d = Drawing(700, 300)
    d.text(100, 20, "hidden units", "start", "small dim"), d.text(88, 118, "tokens", "end", "small dim")
    for row in range(3):
        for column in range(3):
            d.rect(100 + 110 * column, 32 + 56 * row, 106, 52, "pale", "shift, Σ, Σ²", "small")
    d.text(452, 84, "statistics_kernel:"), d.text(452, 104, "a block of threads for each,")
    d.text(452, 124, "64 tokens × 128 hidden units")
    for column in range(3):
        d.arrow((153 + 110 * column, 200), (153 + 110 * column, 232))
        d.rect(100 + 110 * column, 236, 106, 34, "sand", "mean, var", "small")
    d.text(452, 246, "join_kernel: down each"), d.text(452, 266, "column, in a fixed order")
    d.text(100, 290, "→ center, scale, offset of each hidden unit", "start", "small dim")
    return d


@figure("banks", "bank          0  1  2  3  4  5  6  7  8  9 10 11          0  1  2  3  4  5  6  7  8  9 10 11",
        "What a warp stores, 12 of its 32 k: four tokens each, which would all meet in four banks. Where groups of four tokens "
        "change places from one group of k to the next, no two meet.")
def _():
    d = Drawing(720, 210)
    for x0, title, shift in ((76, "as it comes", 0), (408, "with place_of", 4)):
        d.text(x0 + 150, 20, title, "middle")
        for row, name in enumerate(("k 0 to 3", "k 4 to 7", "k 8 to 11")):
            if x0 < 100:
                d.text(70, 32 + 40 * row + 24, name, "end", "small")
            for bank in range(12):
                token = bank - shift * row
                colour = ("blue", "orange", "green")[row] if 0 <= token < 4 else "none"
                d.rect(x0 + 25 * bank, 32 + 40 * row, 25, 36, colour, f"t{token}" if 0 <= token < 4 else "", "small")
        for bank in range(12):
            d.text(x0 + 25 * bank + 12, 168, str(bank), "middle", "small dim")
    d.text(70, 168, "bank", "end", "small dim")
    d.text(76, 196, "all in banks 0 to 3, one after the other", "start", "small"), d.text(408, 196, "each in banks of its own, all at once", "start", "small")
    return d


# ---- Chapter 3 ------------------------------------------------------------------------------------------------------


def ranks(d, x, y, size, rows, columns, kind):
    """A grid of pairs of ranks; kind(a, b) is the class of a cell and its text."""
    for b in range(columns):
        d.text(x + size * b + size / 2, y - 8, f"b = {b}" if b == 0 else str(b), "middle", "small")
    for a in range(rows):
        d.text(x - 8, y + size * a + size / 2 + 5, f"a = {a}" if a == 0 else str(a), "end", "small")
        for b in range(columns):
            colour, text = kind(a, b)
            d.rect(x + size * b, y + size * a, size, size, colour, text)


@figure("dominated", "    3      .  .  .  .  .  .         3 · 4 = 12 pairs with # itself, 11 without",
        "The pair of ranks (2, 3), and the 3 · 4 − 1 = 11 pairs that do at least as well.")
def _():
    d = Drawing(560, 216)
    ranks(d, 60, 40, 34, 5, 7, lambda a, b: ("orange", "") if (a, b) == (2, 3) else ("pale" if a <= 2 and b <= 3 else "none", ""))
    d.arrow((380, 70), (190, 70)), d.text(388, 68, "an x and a y that are"), d.text(388, 87, "no smaller, so a sum")
    d.text(388, 106, "that is no smaller")
    d.arrow((380, 145), (184, 126)), d.text(388, 150, "the pair (2, 3)")
    return d


@figure("staircase", "    7      #                            1      20 candidates, whatever n is",
        "The staircase for K = 8: of n² pairs only those under (a + 1)(b + 1) = 8 can be among the 8 best.")
def _():
    K, size = 8, 32
    d = Drawing(660, 330)
    ranks(d, 60, 40, size, 8, 10, lambda a, b: ("blue" if (a + 1) * (b + 1) <= K else "none", ""))
    edge = []
    for step in range(0, 181):  # the hyperbola, in cells: (a + 1)(b + 1) = K with a and b from the cells' middles
        b = 0.02 + 9.4 * step / 180
        a = K / (b + 1) - 1
        if -0.2 <= a <= 7.4:
            edge.append((60 + size * (b + 0.5), 40 + size * (a + 0.5)))
    d.line(*edge, width=2.5)
    for a in range(8):
        d.text(430, 40 + size * a + 21, f"⌊8 / {a + 1}⌋ = {K // (a + 1)}", kind="small")
    d.text(430, 314, f"{sum(K // (a + 1) for a in range(8))} candidates, whatever n is")
    return d


# ---- Chapter 4 ------------------------------------------------------------------------------------------------------

CHOICES = [[2, 0], [0, 1], [2, 0]]  # T = 3 tokens, K = 2 experts each, N = 4
COLOURS = ["pale", "sand", "mint", "none"]


@figure("routing-matrix", "token 0         [ ×  .  ×  . ]        indices   2 0 | 0 1 | 2 0         T = 3, K = 2, N = 4",
        "The routing as a matrix, and as the router hands it over: by rows, a list of columns. Colours are experts.")
def _():
    d = Drawing(700, 180)
    for e in range(4):
        d.text(95 + 34 * e + 17, 32, str(e), "middle", "small")
    d.text(86, 32, "expert", "end", "small")
    for t, chosen in enumerate(CHOICES):
        d.text(86, 40 + 34 * t + 22, f"token {t}", "end", "small")
        for e in range(4):
            pair = f"{2 * t + chosen.index(e)}" if e in chosen else ""
            d.rect(95 + 34 * e, 40 + 34 * t, 34, 34, COLOURS[e] if e in chosen else "none", pair)
    d.text(95, 164, "in a cell: the number of its pair, p = t·K + k", "start", "small dim")
    d.text(388, 68, "indices", "end", "small"), d.text(388, 106, "pair", "end", "small")
    for p, e in enumerate(e for chosen in CHOICES for e in chosen):
        x = 400 + 38 * p + 12 * (p // 2)
        d.rect(x, 46, 34, 34, COLOURS[e], str(e)), d.text(x + 17, 106, str(p), "middle", "small")
        if p % 2 == 0:
            d.text(x + 36, 34, f"token {p // 2}", "middle", "small dim")
    return d


@figure("csr", "offsets   0     3 4   6 6             expert e owns positions offsets[e] to offsets[e+1] − 1",
        "The same by columns: offsets say where each expert's pairs begin. Expert 3 has none.")
def _():
    d = Drawing(620, 190)
    pairs = sorted(range(6), key=lambda p: CHOICES[p // 2][p % 2])
    owner = [CHOICES[p // 2][p % 2] for p in pairs]
    offsets = [sum(o < e for o in owner) for e in range(5)]
    d.text(100, 46, "offsets", "end"), d.text(100, 146, "pairs", "end"), d.text(100, 178, "position", "end", "small dim")
    for e, offset in enumerate(offsets):
        x = 116 + 64 * e
        d.rect(x, 24, 40, 34, COLOURS[e] if e < 4 else "none", str(offset))
        d.text(x + 20, 16, f"expert {e}" if e < 4 else "the end", "middle", "small dim")
        d.arrow((x + 20, 60), (118 + 46 * offset + (6 if e == 4 else 0), 122))
    for i, (p, e) in enumerate(zip(pairs, owner)):
        d.rect(116 + 46 * i, 124, 42, 34, COLOURS[e], str(p)), d.text(137 + 46 * i, 178, str(i), "middle", "small dim")
    d.text(420, 146, "pair / K is the token", "start", "small dim")
    return d


@figure("two-levels", "records   │ 0: c0 c1 .. │ 1: c0 c1 .. │ ..  │        bucket after bucket; in a bucket chunk after chunk",
        "A sort in two levels: first by bucket, a chunk of pairs at a time, then by expert within each bucket, with counters that fit the cache.")
def _():
    d = Drawing(720, 270)
    kinds = ("pale", "sand", "mint")
    chunks = [[2, 0, 1, 0, 2, 1], [1, 1, 0, 2, 0, 1], [0, 2, 2, 1, 0, 2]]
    size = 29
    for row, name in enumerate(("pairs", "records", "pairs")):
        d.text(80, 44 + 96 * row, name, "end")
    for c, chunk in enumerate(chunks):
        d.text(92 + (6 * c + 3) * size, 16, f"chunk {c}", "middle", "small dim")
        for i, bucket in enumerate(chunk):
            d.rect(92 + (6 * c + i) * size, 24, size, 30, kinds[bucket])
    records = [(bucket, c) for bucket in range(3) for c, chunk in enumerate(chunks) for b in chunk if b == bucket]
    for i, (bucket, c) in enumerate(records):
        d.rect(92 + i * size, 120, size, 30, kinds[bucket], f"c{c}", "small")
    for i, (bucket, _) in enumerate(records):
        d.rect(92 + i * size, 216, size, 30, kinds[bucket])
    for bucket in range(3):
        first = [b for b, _ in records].index(bucket)
        count = sum(b == bucket for b, _ in records)
        d.text(92 + (first + count / 2) * size, 264, f"experts {4096 * bucket} to {4096 * bucket + 4095}", "middle", "small dim")
        d.arrow((92 + (first + count / 2) * size, 156), (92 + (first + count / 2) * size, 208))
    for c in range(3):
        x = 92 + (6 * c + 3) * size
        for bucket in range(3):
            place = [i for i, r in enumerate(records) if r == (bucket, c)]
            d.arrow((x, 58), (92 + (sum(place) / len(place) + 0.5) * size, 116), width=1)
    d.text(626, 90, "by bucket", "start", "small dim"), d.text(626, 186, "by expert", "start", "small dim")
    return d


# ---- Chapter 5 ------------------------------------------------------------------------------------------------------


@figure("two-orders", "         . x . . x . . x . .        token-centric:   row by row. Rows of down and up are gathered",
        "The same pairs in two orders. Row by row the tables are gathered from, column by column the tokens.")
def _():
    d = Drawing(700, 262)
    marks = [(0, 1), (0, 4), (0, 7), (1, 1), (1, 6), (1, 7), (2, 0), (2, 1), (2, 7), (3, 1), (3, 3), (3, 9)]
    for x0, by_row in ((50, True), (400, False)):
        order = sorted(marks, key=lambda m: m if by_row else m[::-1])
        d.text(x0 + 130, 22, "token-centric: row by row" if by_row else "expert-centric: column by column", "middle")
        for t in range(4):
            for e in range(10):
                colour = (["blue", "orange"][t % 2] if by_row else ["blue", "orange"][e % 2]) if (t, e) in marks else "none"
                d.rect(x0 + 26 * e, 36 + 30 * t, 26, 30, colour, str(order.index((t, e)) + 1) if (t, e) in marks else "", "small")
        d.text(x0 - 8, 100, "T", "end"), d.text(x0 + 130, 174, "experts 0 … N − 1", "middle", "small dim")
    d.text(50, 206, "a token's x stays", "start", "small"), d.text(50, 226, "rows of down and up are gathered", "start", "small")
    d.text(50, 246, "from tables of 17 MB each", "start", "small dim")
    d.text(400, 206, "an expert's rows are read once", "start", "small")
    d.text(400, 226, "rows of x are gathered, of y added to", "start", "small"), d.text(400, 246, "1 MB each", "start", "small dim")
    return d


@figure("cpu-slices", "            128 columns each                128 columns each",
        "Each thread owns half of the columns: it reads its half of the table once, and its half of y stays in its second-level cache.")
def _():
    d = Drawing(640, 250)
    for x0, title in ((80, "up [N, d]"), (400, "y [T, d]")):
        d.text(x0 + 90, 22, title, "middle")
        for i, colour in enumerate(("pale", "sand")):
            d.rect(x0 + 90 * i, 52, 90, 160 if x0 < 300 else 80, colour)
            d.text(x0 + 90 * i + 45, 44, f"thread {i}", "middle", "small")
            d.text(x0 + 90 * i + 45, 234 if x0 < 300 else 152, "128 columns", "middle", "small dim")
    for row, name in enumerate(("expert 0", "expert 1", "…", "N − 1")):
        d.text(72, 78 + 40 * row, name, "end", "small")
        for i in range(2):
            d.arrow((92 + 90 * i, 73 + 40 * row), (158 + 90 * i, 73 + 40 * row))
    d.arrow((272, 92), (392, 92), width=3), d.text(332, 82, "add", "middle", "small")
    d.text(332, 116, "every row", "middle", "small dim"), d.text(332, 132, "read once", "middle", "small dim")
    for i in range(2):
        d.text(445 + 90 * i, 90, "0.5 MB", "middle", "small"), d.text(445 + 90 * i, 108, "stays in L2", "middle", "small")
    return d


@figure("gpu-slices", " │  8 MB  │  8 MB  │  8 MB  │  8 MB  │            slice 0: token 0, 1, .. T−1",
        "A quarter of every row at a time: 8 MB of the table are gathered from while they lie in the L2.")
def _():
    d = Drawing(700, 200)
    d.text(170, 20, "the table, 16,384 rows of 2 KB", "middle")
    for i, colour in enumerate(("blue", "pale", "pale", "pale")):
        d.rect(10 + 80 * i, 32, 80, 150, colour, f"slice {i}\n8 MB")
    d.text(370, 20, "blocks, in the order in which they begin")
    for i in range(4):
        for t in range(6):
            text = ["token 0", "1", "2", "…", "…", "T − 1"][t]
            d.rect(370 + 54 * t, 34 + 38 * i, 54, 28, "blue" if i == 0 else "pale", text, "small")
        d.text(362, 53 + 38 * i, str(i), "end", "small dim")
    return d


# ---- Chapter 6 ------------------------------------------------------------------------------------------------------


@figure("mlp", "T [ x ] · T  [ gateᵀ ]  ─►  T [  p  ] ─ silu ┐",
        "The MLP as arrays, for T tokens at once: two products in, silu and a product element by element, one product out.")
def _():
    d = Drawing(720, 220)
    d.rect(24, 82, 48, 44, "pale", "x"), d.text(48, 144, "T × d", "middle", "small dim")
    d.arrow((76, 96), (116, 56)), d.arrow((76, 112), (116, 152))
    for y, name, out in ((26, "gateᵀ", "p"), (122, "upᵀ", "q")):
        d.rect(120, y, 120, 54, "sand", f"· {name}"), d.text(180, y + 72, "d × I", "middle", "small dim")
        d.arrow((244, y + 27), (280, y + 27))
        d.rect(284, y + 5, 110, 44, "pale", out), d.text(339, y + 66, "T × I", "middle", "small dim")
    d.arrow((398, 53), (446, 90)), d.text(432, 62, "silu", "start", "small"), d.arrow((398, 149), (446, 114))
    d.text(456, 108, "⊙", "middle"), d.arrow((466, 102), (490, 102))
    d.rect(494, 80, 80, 44, "mint", "h"), d.text(534, 142, "T × I", "middle", "small dim")
    d.arrow((578, 102), (600, 102)), d.rect(604, 66, 54, 72, "sand", "· downᵀ", "small"), d.text(631, 156, "I × d", "middle", "small dim")
    d.arrow((662, 102), (684, 102)), d.rect(688, 82, 28, 44, "pale", "y")
    return d


@figure("packed-tile", "MR = 12      │ panel of A        │       k    │ panel │ of B  │",
        "A tile of 12 × 2 vectors stays in registers; each step of k brings 12 numbers of A and two vectors of B: 24 multiply-adds.")
def _():
    d = Drawing(640, 300)
    d.text(330, 18, "panel of B", "middle"), d.text(462, 66, "k", "start", "dim"), d.arrow((456, 30), (456, 104))
    for k in range(5):
        for v in range(2):
            d.rect(270 + 60 * v, 26 + 17 * k, 60, 17, "orange" if k == 2 else "sand")
    d.text(105, 128, "panel of A", "middle"), d.arrow((20, 292), (110, 292)), d.text(118, 297, "k", "start", "dim")
    for k in range(8):
        for row in range(6):
            d.rect(20 + 22 * k, 138 + 23 * row, 22, 23, "blue" if k == 2 else "pale")
    d.text(214, 198, "12", "start"), d.text(214, 218, "tokens", "start", "small")
    for row in range(6):
        for v in range(2):
            d.rect(270 + 60 * v, 138 + 23 * row, 60, 23, "green" if v == 0 else "mint")
    d.text(410, 190, "the tile, in registers:"), d.text(410, 212, "tile += column × row,")
    d.text(410, 234, "24 vector multiply-adds")
    d.text(270, 297, "2 vectors", "start", "small dim")
    return d


@figure("gpu-tile", "        64 rows of gate          64 rows of up",
        "A block's tile holds the same 64 hidden units of gate and of up, and a thread the same four of both: silu(p) · q needs nothing from outside.")
def _():
    d = Drawing(560, 240)
    for i, (name, letter, colour) in enumerate((("64 rows of gate", "p", "blue"), ("64 rows of up", "q", "orange"))):
        x = 80 + 200 * i
        d.text(x + 96, 22, name, "middle"), d.rect(x, 32, 192, 128, "none")
        d.rect(x + 24, 56, 24, 32, colour, letter, "small")
        d.line((x + 36, 90), (x + 36 if i == 0 else x - 40, 190))
    d.text(70, 92, "128", "end"), d.text(70, 112, "tokens", "end", "small")
    d.text(80, 210, "a thread: 8 tokens × (4 of gate and the same 4 of up),", "start", "small")
    d.text(80, 229, "and h = silu(p) · q in its registers", "start", "small")
    return d


@figure("ring", "ring of four stages      [ ]      [ ]      [ ]      [ ]        128 rows of A and 256 of B, 64 of k: 48 KB",
        "One warp brings, eight multiply, and a ring of four stages in shared memory lies between them. Nobody waits for an address.")
def _():
    d = Drawing(740, 260)
    d.rect(10, 20, 130, 44, "orange", "warp 8: bring", "small", round=5)
    d.rect(10, 196, 130, 44, "blue", "warps 0 to 7", "small", round=5)
    for s in range(4):
        x = 190 + 120 * s
        d.rect(x, 106, 96, 48, "sand" if s != 1 else "mint", f"stage {s}\n48 KB", "small")
        d.arrow((x + 36, 66), (x + 36, 102)), d.arrow((x + 36, 158), (x + 36, 194))
        d.text(x + 48, 46, "fill", "middle", "small"), d.text(x + 48, 222, "multiply", "middle", "small")
        d.arrow((x + 62, 194), (x + 62, 158), dash="4 3"), d.arrow((x + 62, 102), (x + 62, 66), dash="4 3")
        if s < 3:
            d.arrow((x + 78, 42), (x + 136, 42)), d.arrow((x + 84, 218), (x + 130, 218))
    for y, first, second in ((84, "↓ the data", "⇡ empty"), (174, "↓ full", "⇡ empty")):
        d.text(654, y - 4, first, "start", "small dim"), d.text(654, y + 15, second, "start", "small dim")
    return d


# ---- Chapter 7 ------------------------------------------------------------------------------------------------------


@figure("strategies", "     T │ .  ×  .  .  .  ×  .  .  . │  ×: routed pairs      token    the ×, row after row",
        "What the four strategies compute of S = X · Downᵀ, for three tokens and nine experts in three grid rows of n = 3.")
def _():
    d = Drawing(700, 330)
    marks = {(0, 1), (0, 5), (1, 2), (1, 5), (1, 6), (2, 0), (2, 1)}
    touched = {(t, e // 3) for t, e in marks}
    for i, (name, what) in enumerate((("token", "the pairs, row after row"), ("expert", "the pairs, column after column"),
                                      ("dense", "everything"), ("Cartesian rows", "each stretch of n that has a pair"))):
        x0, y0 = 20 + 350 * (i % 2), 48 + 160 * (i // 2)
        order = sorted(marks, key=lambda m: m[::-1] if i == 1 else m)
        d.text(x0, y0 - 28, name), d.text(x0, y0 - 10, what, "start", "small dim")
        for t in range(3):
            for e in range(9):
                mark = ("×" if i > 1 else str(order.index((t, e)) + 1)) if (t, e) in marks else ""
                x, y = x0 + 30 * e + 8 * (e // 3), y0 + 30 * t
                computed = i == 2 or (i == 3 and (t, e // 3) in touched)
                d.rect(x, y, 30, 30, "blue" if (t, e) in marks else "pale" if computed else "none", mark)
    return d


# ---- Chapter 8 ------------------------------------------------------------------------------------------------------


@figure("overview", "x ──► batch norm ──► router gate ──► top-k of n × n pairs ──► K neurons a token ──► + ──► y",
        "The layer, with the chapters that are about its parts.")
@figure("layer", "x ────────────┤     chapter 2     chapter 3  chapter 5 ├── + ── y",
        "The layer: the routed branch and the shared MLP both read x, and their sum is y.")
def _():
    d = Drawing(720, 190)
    d.text(14, 99, "x"), d.line((28, 94), (54, 94))
    d.arrow((54, 94), (54, 50), (78, 50)), d.arrow((54, 94), (54, 144), (78, 144))
    for x, width, name, chapter in ((82, 90, "norm", 2), (204, 90, "logits", 2), (326, 90, "top-k", 3), (448, 110, "experts", "1, 5, 7")):
        d.rect(x, 28, width, 44, "pale", name, round=5), d.text(x + width / 2, 90, f"chapter {chapter}", "middle", "small dim")
        d.arrow((x + width, 50), (x + width + 28, 50)) if x < 448 else None
    d.rect(82, 122, 476, 44, "sand", "shared MLP", round=5), d.text(320, 184, "chapter 6", "middle", "small dim")
    d.arrow((558, 50), (600, 50), (622, 86)), d.arrow((558, 144), (600, 144), (622, 104))
    d.text(632, 101, "+", "middle"), d.arrow((644, 95), (680, 95)), d.text(690, 100, "y")
    return d


# ---- Chapter 9 ------------------------------------------------------------------------------------------------------


@figure("gradients", "                  1   0   3   2   ◄── pairs of this expert",
        "The same six pairs: the forward pass and dX are sums along rows, the gradients of the tables are sums along columns.")
def _():
    d = Drawing(680, 212)
    marks = {(0, 2), (0, 3), (1, 0), (1, 2), (2, 2), (2, 3)}
    for e in range(4):
        d.text(110 + 44 * e + 22, 30, f"{e}", "middle", "small")
        d.text(110 + 44 * e + 22, 198, str(sum((t, e) in marks for t in range(3))), "middle")
    d.text(100, 30, "expert", "end", "small"), d.text(100, 198, "pairs", "end", "small")
    for t in range(3):
        d.text(100, 40 + 44 * t + 27, f"token {t}", "end", "small")
        for e in range(4):
            d.rect(110 + 44 * e, 40 + 44 * t, 44, 44, "blue" if (t, e) in marks else "none", "●" if (t, e) in marks else "")
    d.arrow((296, 62), (352, 62), width=3), d.text(362, 60, "Y and dX: a row is a sum over its ●,"), d.text(362, 79, "from left to right")
    d.arrow((308, 180), (352, 160), width=3), d.text(362, 152, "dup and ddown: a column is a sum"), d.text(362, 171, "over its ●, from top to bottom")
    return d
