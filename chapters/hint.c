/* What a wrong result looks like: where its first wrong element lies, and the mistake that usually leaves such a trace.
 * A hint is a guess in the form of a question. */
#include "doors.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A tensor that is off, every value as a double. */
typedef struct {
    const fmoe_argument *a;
    int64_t count, columns, rows, first; /* rows: all sizes before the last; first: the first element that is off */
    double *is, *should, largest, limit;
    bool integer;
} picture;

/* ---- Values ------------------------------------------------------------------------------------------------------ */

static bool is_integer(fmoe_dtype dtype) {
    return dtype == FMOE_I32 || dtype == FMOE_I64;
}

static bool widen(fmoe_dtype dtype, int64_t count, const void *values, double *out) {
    if (is_integer(dtype)) {
        for (int64_t i = 0; i < count; i++)
            out[i] = dtype == FMOE_I64 ? (double)((const int64_t *)values)[i] : ((const int32_t *)values)[i];
        return true;
    }
    float *single = fmoe_allocate(count, sizeof *single);
    if (!single)
        return false;
    fmoe_to_f32(dtype, count, values, single);
    for (int64_t i = 0; i < count; i++)
        out[i] = single[i];
    free(single);
    return true;
}

static bool close_to(const picture *v, double is, double should) {
    return is == should || (isnan(is) && isnan(should)) || fabs(is - should) <= v->limit * v->largest;
}

/* Rows that the reference left out are right unless they hold a NaN. */
static void skip_rows(picture *v) {
    for (int64_t i = 0; v->a->rows_apart > 1 && i < v->count; i++)
        if (i / v->columns % v->a->rows_apart != 0)
            v->should[i] = isnan(v->is[i]) ? 0 : v->is[i];
}

static bool take(const fmoe_argument *a, double limit, picture *v) {
    *v = (picture){.a = a, .count = a->count, .first = -1, .integer = is_integer(a->dtype)};
    v->columns = a->rank > 0 ? a->shape[a->rank - 1] : 1;
    v->rows = v->columns > 0 ? v->count / v->columns : 0;
    v->limit = v->integer ? 0 : limit;
    v->is = fmoe_allocate(v->count, sizeof *v->is);
    v->should = fmoe_allocate(v->count, sizeof *v->should);
    if (!v->is || !v->should || !widen(a->dtype, v->count, a->data, v->is) ||
        !widen(v->integer ? a->dtype : FMOE_F32, v->count, a->expected, v->should))
        return false;
    skip_rows(v);
    for (int64_t i = 0; i < v->count; i++)
        if (isfinite(v->should[i]))
            v->largest = fmax(v->largest, fabs(v->should[i]));
    for (int64_t i = 0; i < v->count && v->first < 0; i++)
        if (!close_to(v, v->is[i], v->should[i]))
            v->first = i;
    return true;
}

static void drop(picture *v) {
    free(v->is);
    free(v->should);
}

/* Whether the tensor as a whole is over the limit, by the measure that decides. */
static bool is_off(const picture *v) {
    if (v->first < 0)
        return false;
    if (v->integer)
        return true;
    float *is = fmoe_allocate(2 * v->count, sizeof *is);
    for (int64_t i = 0; is && i < v->count; i++) {
        is[i] = (float)v->is[i];
        is[v->count + i] = (float)v->should[i];
    }
    bool off = !is || !(fmoe_relative_error(v->count, is, is + v->count, v->a->natural_scale) <= v->limit);
    free(is);
    return off;
}

static void element_text(const fmoe_argument *a, int64_t at, char *text, size_t size) {
    int64_t index[4] = {0};
    for (int i = a->rank - 1; i >= 0; i--) {
        index[i] = at % a->shape[i];
        at /= a->shape[i];
    }
    size_t used = (size_t)snprintf(text, size, "%s[", a->name);
    for (int i = 0; i < a->rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)index[i]);
    if (used < size)
        snprintf(text + used, size - used, "]");
}

/* ---- Traces ------------------------------------------------------------------------------------------------------ */

/* Outputs and the workspace come filled with NaN, or with 0x80808080 where they are integers. */
static bool unwritten(const picture *v, char *hint) {
    int64_t left = 0;
    for (int64_t i = 0; i < v->count; i++) {
        double pattern = v->a->dtype == FMOE_I64 ? (double)(int64_t)0x8080808080808080u : (double)(int32_t)0x80808080u;
        left += v->integer ? v->is[i] == pattern : isnan(v->is[i]) && !isnan(v->should[i]);
    }
    if (left == v->count)
        snprintf(hint, DOOR_TEXT, "nothing was written to %s?", v->a->name);
    else if (left > 0 && v->integer)
        snprintf(hint, DOOR_TEXT, "left unwritten? %lld of %lld elements are as they came", (long long)left,
                 (long long)v->count);
    else if (left > 0)
        snprintf(
            hint, DOOR_TEXT,
            "left unwritten? %lld of %lld elements are NaN, which outputs and workspace are filled with beforehand",
            (long long)left, (long long)v->count);
    return left > 0;
}

/* is, read as [..., b, a] in place of [..., a, b], is what it should be; a and b are the sizes at `axis` and after. */
static bool swapped_at(const picture *v, int axis) {
    int64_t inner = 1, a = v->a->shape[axis], b = v->a->shape[axis + 1];
    for (int i = axis + 2; i < v->a->rank; i++)
        inner *= v->a->shape[i];
    if (a < 2 || b < 2)
        return false;
    for (int64_t i = 0; i < v->count; i++) {
        int64_t outer = i / (a * b * inner), row = i / (b * inner) % a, column = i / inner % b, rest = i % inner;
        if (!close_to(v, v->is[((outer * b + column) * a + row) * inner + rest], v->should[i]))
            return false;
    }
    return true;
}

static bool transposed(const picture *v, char *hint) {
    for (int axis = v->a->rank - 2; axis >= 0; axis--)
        if (swapped_at(v, axis)) {
            snprintf(hint, DOOR_TEXT, "transposed? %s is right when its sizes %d and %d change places", v->a->name,
                     axis + 1, axis + 2);
            return true;
        }
    return false;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Every row holds the right values. A list (rank 1) is one row. */
static bool unsorted(const picture *v, char *hint) {
    double *is = fmoe_allocate(2 * v->columns, sizeof *is), *should = is + v->columns;
    bool same = is && v->columns > 1;
    for (int64_t row = 0; row < v->rows && same; row++) {
        memcpy(is, v->is + row * v->columns, (size_t)v->columns * sizeof *is);
        memcpy(should, v->should + row * v->columns, (size_t)v->columns * sizeof *should);
        qsort(is, (size_t)v->columns, sizeof *is, by_value);
        qsort(should, (size_t)v->columns, sizeof *should, by_value);
        for (int64_t c = 0; c < v->columns && same; c++)
            same = close_to(v, is[c], should[c]);
    }
    free(is);
    if (same)
        snprintf(hint, DOOR_TEXT, "unsorted? %s the right values in another order",
                 v->a->rank > 1 ? "each row holds" : "these are");
    return same;
}

static bool shifted(const picture *v, char *hint) {
    int64_t ahead = 0, behind = 0;
    for (int64_t i = 1; i < v->count; i++) {
        ahead += close_to(v, v->is[i - 1], v->should[i]);
        behind += close_to(v, v->is[i], v->should[i - 1]);
    }
    if (v->count < 3 || (ahead < v->count - 1 && behind < v->count - 1))
        return false;
    snprintf(hint, DOOR_TEXT, "off by one? every element is the %s one%s", ahead == v->count - 1 ? "next" : "previous",
             v->integer ? " (an inclusive scan where an exclusive one is asked for?)" : "");
    return true;
}

/* The factor between `count` elements and what they should be; NaN if there is none. */
static double factor_of(const picture *v, int64_t first, int64_t count) {
    double product = 0, square = 0, rest = 0;
    for (int64_t i = first; i < first + count; i++) {
        product += v->is[i] * v->should[i];
        square += v->should[i] * v->should[i];
    }
    double factor = product / square;
    for (int64_t i = first; i < first + count; i++)
        rest += pow(v->is[i] - factor * v->should[i], 2);
    return sqrt(rest / square) <= 2 * v->limit * fmax(1, fabs(factor)) ? factor : NAN;
}

static bool scaled(const picture *v, char *hint) {
    double factor = v->integer || v->count < 2 ? NAN : factor_of(v, 0, v->count);
    bool by_row = !v->integer && v->columns > 1;
    for (int64_t row = 0; row < v->rows && by_row; row++)
        by_row = !isnan(factor_of(v, row * v->columns, v->columns));
    if (!isnan(factor))
        snprintf(hint, DOOR_TEXT, "a factor? all of %s is %.6g times what it should be", v->a->name, factor);
    else if (by_row)
        snprintf(hint, DOOR_TEXT, "a factor? every row of %s is a multiple of what it should be: a norm left out?",
                 v->a->name);
    return by_row || !isnan(factor);
}

/* Every element is close, and many are off: as by a rounding to 16 bits on the way. */
static bool rounded(const picture *v, fmoe_dtype dtype, char *hint) {
    double square = 0;
    for (int64_t i = 0; i < v->count; i++)
        square += v->should[i] * v->should[i];
    double size = sqrt(square / (double)v->count);
    int64_t near = 0, off = 0;
    for (int64_t i = 0; i < v->count; i++) {
        near += fabs(v->is[i] - v->should[i]) <= 0.1 * size + 0.01 * fabs(v->should[i]);
        off += !close_to(v, v->is[i], v->should[i]);
    }
    if (v->integer || near < v->count || off < v->count / 20)
        return false;
    if (dtype == FMOE_F32)
        snprintf(hint, DOOR_TEXT,
                 "one rounding too many? everything is close, and off by more than float32's accuracy: was something "
                 "kept in 16 bits, or a sum of many terms in one float?");
    else
        snprintf(hint, DOOR_TEXT,
                 "one rounding too many? everything is close, and off by more than one rounding to %s: sums belong in "
                 "float32, to be rounded once, at the store",
                 fmoe_dtype_name(dtype));
    return true;
}

/* How many are off, and whether the first rows, or the first columns of every row, are right and most others not. */
static bool at_an_edge(const picture *v, char *hint) {
    int64_t row = v->rows, column = v->columns, off = 0;
    for (int64_t i = 0; i < v->count; i++) {
        if (close_to(v, v->is[i], v->should[i]))
            continue;
        off++;
        row = i / v->columns < row ? i / v->columns : row;
        column = i % v->columns < column ? i % v->columns : column;
    }
    const char *what = off == 1 ? "elements is" : "elements are";
    if (v->a->rank > 1 && row > 0 && 2 * off > (v->rows - row) * v->columns)
        snprintf(hint, DOOR_TEXT, "an edge? %lld of %lld %s off, none in the first %lld of %lld rows", (long long)off,
                 (long long)v->count, what, (long long)row, (long long)v->rows);
    else if (column > 0 && 2 * off > v->rows * (v->columns - column))
        snprintf(hint, DOOR_TEXT, "an edge? %lld of %lld %s off, none in the first %lld of %lld columns",
                 (long long)off, (long long)v->count, what, (long long)column, (long long)v->columns);
    else
        snprintf(hint, DOOR_TEXT, "%lld of %lld %s off", (long long)off, (long long)v->count, what);
    return true;
}

/* ---- Choices ----------------------------------------------------------------------------------------------------- */

/* A choice of K pairs is judged by their sums, so that its traces are others. */
typedef struct {
    int64_t T, n, K;
    const float *logits;
    const int32_t *is, *should;
} choice;

static float sum_of(const choice *c, int64_t t, int32_t pair) {
    return c->logits[t * c->n + pair / c->n] + c->logits[(c->T + t) * c->n + pair % c->n];
}

static bool holds(const int32_t *row, int64_t K, int32_t pair) {
    for (int64_t k = 0; k < K; k++)
        if (row[k] == pair)
            return true;
    return false;
}

/* Every pair of the token is the reference's with its sides exchanged. */
static bool sides_exchanged(const choice *c, int64_t t) {
    for (int64_t i = t * c->K; i < (t + 1) * c->K; i++)
        if (c->is[i] != c->should[i] % c->n * c->n + c->should[i] / c->n)
            return false;
    return true;
}

static const char *look_at_pair(const choice *c, int64_t t, int64_t k) {
    const int32_t *row = c->is + t * c->K;
    int32_t is = row[k], should = c->should[t * c->K + k];
    if (is < 0 || is >= c->n * c->n)
        return is == (int32_t)0x80808080u ? "left unwritten? this is what it held before"
                                          : "outside: pairs are 0 to n² - 1";
    if (sides_exchanged(c, t))
        return "transposed? a pair's index is i·n + j, i on the side that comes first";
    if (holds(row, k, is))
        return "the same pair twice?";
    if (sum_of(c, t, is) == sum_of(c, t, should))
        return "ties? of two pairs with equal sums the smaller index comes first";
    if (!holds(row, c->K, should))
        return "a better pair was passed over? candidates are all (a+1)(b+1) ≤ K, ranks from 0, by their float32 sum";
    return "unsorted? the pair belongs to the choice, at another place: the best comes first";
}

/* The first pair at another place than the reference's. */
static bool explain_choice(const fmoe_problem *p, const char *logits_name, char *where, char *hint) {
    const fmoe_argument *indices = fmoe_problem_find(p, "indices"), *l = fmoe_problem_find(p, logits_name);
    if (!indices || indices->role == ROLE_INPUT || !l)
        return false;
    choice c = {l->shape[1], l->shape[2], indices->shape[1], NULL, indices->data, indices->expected};
    float *own = l->role == ROLE_INPUT ? fmoe_problem_f32(p, logits_name) : NULL;
    c.logits = own ? own : l->expected;
    int64_t i = 0;
    while (i < indices->count && c.is[i] == c.should[i])
        i++;
    if (i < indices->count && c.logits) {
        char element[96];
        element_text(indices, i, element, sizeof element);
        snprintf(where, DOOR_TEXT, "%s is %d and should be %d", element, c.is[i], c.should[i]);
        snprintf(hint, DOOR_TEXT, "%s", look_at_pair(&c, i / c.K, i % c.K));
    }
    free(own);
    return i < indices->count;
}

/* ---- The first tensor that is off -------------------------------------------------------------------------------- */

/* "nan" without the sign that it may have. */
static const char *value_text(const picture *v, double value, char text[32]) {
    snprintf(text, 32, v->integer ? "%.12g" : "%.7g", isnan(value) ? fabs(value) : value);
    return isnan(value) ? "nan" : text;
}

static void explain(const picture *v, fmoe_dtype dtype, char *where, char *hint) {
    char element[96], is[32], should[32];
    element_text(v->a, v->first, element, sizeof element);
    snprintf(where, DOOR_TEXT, "%s is %s and should be %s", element, value_text(v, v->is[v->first], is),
             value_text(v, v->should[v->first], should));
    (void)(unwritten(v, hint) || transposed(v, hint) || shifted(v, hint) || unsorted(v, hint) || scaled(v, hint) ||
           rounded(v, dtype, hint) || at_an_edge(v, hint));
}

/* Steps with a rule of their own hold what is stored in float32 to float32's limit; the others hold everything to the
 * case's. */
static bool explain_tensor(const fmoe_problem *p, const fmoe_argument *a, char *where, char *hint) {
    bool narrow = p->step->error && a->dtype == FMOE_F32;
    picture v;
    bool off = take(a, fmoe_error_limit(narrow ? FMOE_F32 : p->c.dtype), &v) && is_off(&v);
    if (off)
        explain(&v, narrow ? FMOE_F32 : p->c.dtype, where, hint);
    drop(&v);
    return off;
}

void door_explain_tensor(const fmoe_problem *p, const fmoe_argument *a, char *where, char *hint) {
    bool chosen = a->dtype == FMOE_I32 && !strcmp(a->name, "indices");
    const char *logits = p->step == &fmoe_step_topk ? "logits" : "router_logits";
    *where = *hint = 0;
    if (!chosen || !explain_choice(p, logits, where, hint))
        explain_tensor(p, a, where, hint);
}

void door_explain(const fmoe_problem *p, char *where, char *hint) {
    *where = *hint = 0;
    if (p->step == &fmoe_step_topk && explain_choice(p, "logits", where, hint))
        return;
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        bool chosen = a->dtype == FMOE_I32 && !strcmp(a->name, "indices"); /* by the layer: after its logits */
        if (a->role != ROLE_INPUT && a->data && !chosen && explain_tensor(p, a, where, hint))
            return;
    }
    explain_choice(p, "router_logits", where, hint);
}
