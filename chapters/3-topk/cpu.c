// Chapter 3 on the CPU: the Cartesian-product top-k, from K scans over all n² pairs to a few branch-free passes over
// the staircase.
#include "../steps.h"
#include "../vec.h"

#include <omp.h>

// [pack]
// A pair as one number, so that one comparison decides: the sum's bits, made to rise with the sum, above the
// complement of the index. Larger is better; NaN is below everything; −0 equals +0.
static inline int32_t rising_bits(float sum) {
    int32_t bits;
    sum += 0.0f; // −0 becomes +0
    memcpy(&bits, &sum, sizeof bits);
    bits ^= (bits >> 31) & INT32_MAX; // negative floats rise with falling bits
    return sum == sum ? bits : INT32_MIN;
}

static inline int64_t pack(float sum, int32_t index) {
    return (int64_t)((uint64_t)(uint32_t)rising_bits(sum) << 32 | (uint32_t)~index);
}

static inline int32_t index_of(int64_t packed) {
    return (int32_t) ~(uint32_t)packed;
}
// [/pack]

// One token and the scratch of the thread that works on it.
typedef struct {
    int64_t n, K, m;          // m = min(K, n): no other keys of a side can matter
    const float *x, *y;       // [n] logits
    int64_t *best;            // [K] packed, best first: what a choice leaves here
    float *x_row, *y_row;     // [n] converted logits
    float *x_value, *y_value; // [m] ranked keys: values
    int32_t *x_key, *y_key;   // [m] and numbers
    int32_t *bits, *index;    // [candidates]
    int64_t *packed, *sorted; // [candidates or n, whichever is more]
} token;

typedef void token_fn(token *);
typedef void finish_fn(const token *, bool norm_topk_prob, int32_t *indices, float *scores, float *weights);

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

enum { BLOCK = 64 }; // keys ranked at once; every array is padded to a multiple of it

static int64_t count_candidates(int64_t n, int64_t K) {
    int64_t count = 0;
    for (int64_t a = 0; a < smaller(K, n); a++)
        count += smaller(n, K / (a + 1));
    return count;
}

// Carves `count` elements from the workspace; with NULL it only counts bytes.
static void *carve(char *workspace, size_t *used, int64_t count, size_t element) {
    void *here = workspace ? workspace + *used : NULL;
    *used += (size_t)((count + BLOCK - 1) / BLOCK * BLOCK) * element;
    return here;
}

static token carve_token(int64_t n, int64_t K, char *workspace, size_t *used) {
    token t = {.n = n, .K = K, .m = smaller(K, n)};
    int64_t candidates = count_candidates(n, K), most = candidates > n ? candidates : n;
    t.best = carve(workspace, used, K, 8);
    t.x_row = carve(workspace, used, n, 4);
    t.y_row = carve(workspace, used, n, 4);
    t.x_value = carve(workspace, used, t.m, 4);
    t.y_value = carve(workspace, used, t.m, 4);
    t.x_key = carve(workspace, used, t.m, 4);
    t.y_key = carve(workspace, used, t.m, 4);
    t.bits = carve(workspace, used, candidates, 4);
    t.index = carve(workspace, used, candidates, 4);
    t.packed = carve(workspace, used, most, 8);
    t.sorted = carve(workspace, used, most, 8);
    return t;
}

static size_t token_bytes(const fmoe_topk_args *args) {
    size_t used = 0;
    carve_token(args->n, args->K, NULL, &used);
    return used;
}

static size_t one_token(const void *args) {
    return token_bytes(args);
}

static size_t token_a_thread(const void *args) {
    return token_bytes(args) * (size_t)omp_get_max_threads();
}

// Runs choose, then finish, on every token. Tokens do not touch one another, so the bits do not depend on threads.
static fmoe_status each_token(const fmoe_topk_args *args, void *workspace, size_t bytes, bool parallel,
                              token_fn *choose, finish_fn *finish) {
    int64_t T = args->T, n = args->n, K = args->K;
    int threads = parallel ? omp_get_max_threads() : 1;
    if (bytes < token_bytes(args) * (size_t)threads)
        return FMOE_BAD_WORKSPACE;
#pragma omp parallel num_threads(threads)
    {
        size_t used = 0;
        token k = carve_token(n, K, (char *)workspace + token_bytes(args) * (size_t)omp_get_thread_num(), &used);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++) {
            k.x = load_row(args->dtype, args->logits, t, n, k.x_row);
            k.y = load_row(args->dtype, args->logits, T + t, n, k.y_row);
            choose(&k);
            finish(&k, args->norm_topk_prob, args->indices + t * K, args->scores + t * K, args->weights + t * K);
        }
    }
    return FMOE_OK;
}

// ---- Scores and weights of a token's choice ----

// [finish]
static double log_sum_exp(int64_t n, const float *z) {
    double max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++)
        max = z[i] > max ? z[i] : max;
    for (int64_t i = 0; i < n; i++)
        sum += exp(z[i] - max);
    return max + log(sum);
}

static void finish_plain(const token *k, bool norm_topk_prob, int32_t *indices, float *scores, float *weights) {
    double shift = log_sum_exp(k->n, k->x) + log_sum_exp(k->n, k->y), sum = 0;
    for (int64_t c = 0; c < k->K; c++) {
        int32_t index = index_of(k->best[c]);
        double score = (double)k->x[index / k->n] + k->y[index % k->n] - shift;
        indices[c] = index;
        scores[c] = (float)score;
        weights[c] = (float)exp(score);
        sum += exp(score);
    }
    for (int64_t c = 0; norm_topk_prob && c < k->K; c++)
        weights[c] = (float)(weights[c] / sum);
}
// [/finish]

// ---- Rung: K scans ----

// [scans]
static void choose_by_scans(token *k) {
    int64_t last = INT64_MAX;
    for (int64_t c = 0; c < k->K; c++) {
        int64_t best = INT64_MIN;
        for (int64_t i = 0; i < k->n; i++)
            for (int64_t j = 0; j < k->n; j++) {
                int64_t pair = pack(k->x[i] + k->y[j], (int32_t)(i * k->n + j));
                if (pair < last && pair > best)
                    best = pair;
            }
        k->best[c] = last = best;
    }
}
// [/scans]

static fmoe_status run_scans(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, false, choose_by_scans, finish_plain);
}

// n² · K visits a token, a nanosecond each: a third of a second is enough to wait.
static bool few_visits(const void *arguments) {
    const fmoe_topk_args *args = arguments;
    return (double)args->T * (double)args->n * (double)args->n * (double)args->K < 3e8;
}

// ---- Rung: one scan with a heap ----

// [heap]
// A heap with its smallest on top: what a candidate must beat to be among the best so far.
static void sift_down(int64_t *heap, int64_t size) {
    int64_t value = heap[0], hole = 0;
    for (int64_t child = 1; child < size; child = 2 * hole + 1) {
        if (child + 1 < size && heap[child + 1] < heap[child])
            child++;
        if (value <= heap[child])
            break;
        heap[hole] = heap[child];
        hole = child;
    }
    heap[hole] = value;
}

static void push(int64_t *heap, int64_t *size, int64_t value) {
    int64_t hole = (*size)++;
    for (; hole > 0 && value < heap[(hole - 1) / 2]; hole = (hole - 1) / 2)
        heap[hole] = heap[(hole - 1) / 2];
    heap[hole] = value;
}

static inline void offer(int64_t *heap, int64_t *size, int64_t most, int64_t value) {
    if (*size < most) {
        push(heap, size, value);
    } else if (value > heap[0]) {
        heap[0] = value;
        sift_down(heap, *size);
    }
}

// Moves the smallest to the end again and again: best first.
static void sort_heap(int64_t *heap, int64_t size) {
    for (int64_t last = size - 1; last > 0; last--) {
        int64_t smallest = heap[0];
        heap[0] = heap[last];
        heap[last] = smallest;
        sift_down(heap, last);
    }
}
// [/heap]

static void choose_by_one_scan(token *k) {
    int64_t size = 0;
    for (int64_t i = 0; i < k->n; i++)
        for (int64_t j = 0; j < k->n; j++)
            offer(k->best, &size, k->K, pack(k->x[i] + k->y[j], (int32_t)(i * k->n + j)));
    sort_heap(k->best, k->K);
}

static fmoe_status run_one_scan(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, false, choose_by_one_scan, finish_plain);
}

// ---- Rung: the best keys of each side ----

// The m best keys of a side, best first, equal values by the smaller key.
static void rank_by_heap(const token *k, const float *row, float *value, int32_t *key) {
    int64_t size = 0;
    for (int64_t i = 0; i < k->n; i++)
        offer(k->packed, &size, k->m, pack(row[i], (int32_t)i));
    sort_heap(k->packed, k->m);
    for (int64_t a = 0; a < k->m; a++) {
        key[a] = index_of(k->packed[a]);
        value[a] = row[key[a]];
    }
}

static inline int64_t pair_of_ranks(const token *k, int64_t a, int64_t b) {
    return pack(k->x_value[a] + k->y_value[b], (int32_t)(k->x_key[a] * k->n + k->y_key[b]));
}

static void choose_by_key_lists(token *k) {
    rank_by_heap(k, k->x, k->x_value, k->x_key);
    rank_by_heap(k, k->y, k->y_value, k->y_key);
    int64_t size = 0;
    for (int64_t a = 0; a < k->m; a++)
        for (int64_t b = 0; b < k->m; b++)
            offer(k->best, &size, k->K, pair_of_ranks(k, a, b));
    sort_heap(k->best, k->K);
}

static fmoe_status run_key_lists(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, false, choose_by_key_lists, finish_plain);
}

// ---- Rung: the staircase ----

static void offer_staircase(token *k) {
    // [staircase]
    int64_t size = 0;
    for (int64_t a = 0; a < k->m; a++)
        for (int64_t b = 0; b < k->n && (a + 1) * (b + 1) <= k->K; b++)
            offer(k->best, &size, k->K, pair_of_ranks(k, a, b));
    // [/staircase]
    sort_heap(k->best, k->K);
}

static void choose_by_staircase(token *k) {
    rank_by_heap(k, k->x, k->x_value, k->x_key);
    rank_by_heap(k, k->y, k->y_value, k->y_key);
    offer_staircase(k);
}

static fmoe_status run_staircase(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, false, choose_by_staircase, finish_plain);
}

static fmoe_status run_openmp(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, true, choose_by_staircase, finish_plain);
}

// ---- Rung: the frontier ----

// [frontier]
// Along a row of ranks sums fall, so only each row's first pair not yet taken can be next. Take the best of these K
// times. Rounding can make neighbours equal, and equal sums go by index, not by rank: every pair as good as the K-th is
// collected, and the K best of those are kept.
static void walk_frontier(token *k) {
    int64_t rows = 1, found = 0, size = 0; // rows: in the heap
    int64_t *heap = k->packed, *next = k->sorted, kth = INT64_MIN;
    next[0] = 0;
    heap[0] = ~pack(k->x_value[0] + k->y_value[0], 0); // complement: the largest on top
    while (rows > 0 && (found < k->K || ~heap[0] >> 32 >= kth)) {
        int64_t row = index_of(~heap[0]), b = next[row]++;
        kth = found < k->K ? ~heap[0] >> 32 : kth;
        offer(k->best, &size, k->K, pair_of_ranks(k, row, b));
        found++;
        if (b + 1 < k->n && (row + 1) * (b + 2) <= k->K)
            heap[0] = ~pack(k->x_value[row] + k->y_value[b + 1], (int32_t)row);
        else
            heap[0] = heap[--rows];
        sift_down(heap, rows);
        if (b == 0 && row + 1 < k->m) {
            next[row + 1] = 0;
            push(heap, &rows, ~pack(k->x_value[row + 1] + k->y_value[0], (int32_t)(row + 1)));
        }
    }
    sort_heap(k->best, k->K);
}
// [/frontier]

static void choose_by_frontier(token *k) {
    rank_by_heap(k, k->x, k->x_value, k->x_key);
    rank_by_heap(k, k->y, k->y_value, k->y_key);
    // +inf plus −inf is NaN and last, so such a row or column does not fall.
    if (k->x_value[0] == INFINITY || k->y_value[0] == INFINITY)
        offer_staircase(k);
    else
        walk_frontier(k);
}

static fmoe_status run_frontier(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, true, choose_by_frontier, finish_plain);
}

// ---- Rung: counted ranks and a threshold ----

// [rank]
// Sorts up to 64 distinct keys without a branch: a key's place is the number of keys that beat it. 64 · count
// comparisons instead of count · log(count), but eight at a time and never mispredicted.
static void rank_block(int64_t count, const int64_t *keys, int64_t *sorted) {
    int64_t place[BLOCK] = {0};
    for (int64_t j = 0; j < count; j++)
#pragma omp simd
        for (int i = 0; i < BLOCK; i++)
            place[i] += keys[j] > keys[i];
    for (int64_t i = 0; i < count; i++)
        sorted[place[i]] = keys[i];
}
// [/rank]

// The first `keep` of two sorted runs.
static void merge(int64_t a_count, const int64_t *a, int64_t b_count, const int64_t *b, int64_t keep, int64_t *out) {
    int64_t i = 0, j = 0, k = 0;
    for (; i < a_count && j < b_count && k < keep; k++) {
        int64_t from_a = a[i], from_b = b[j];
        bool take_a = from_a > from_b;
        out[k] = take_a ? from_a : from_b;
        i += take_a;
        j += !take_a;
    }
    for (; i < a_count && k < keep; k++)
        out[k] = a[i++];
    for (; j < b_count && k < keep; k++)
        out[k] = b[j++];
}

// The first `keep` of keys in order, best first: blocks by counting, then merges. Returns keys or spare, whichever the
// last merge wrote; the other is scratch.
static const int64_t *sort_best(int64_t count, int64_t keep, int64_t *keys, int64_t *spare) {
    for (int64_t i = count; i % BLOCK; i++)
        keys[i] = INT64_MIN;
    for (int64_t i = 0; i < count; i += BLOCK)
        rank_block(smaller(BLOCK, count - i), keys + i, spare + i);
    int64_t *from = spare, *to = keys;
    for (int64_t width = BLOCK; width < count; width *= 2) {
        for (int64_t i = 0; i < count; i += 2 * width) {
            int64_t left = smaller(width, count - i), right = smaller(width, count - i - left);
            merge(smaller(left, keep), from + i, smaller(right, keep), from + i + left, keep, to + i);
        }
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    return from;
}

static void rank_by_counting(const token *k, const float *row, float *value, int32_t *key) {
#pragma omp simd
    for (int64_t i = 0; i < k->n; i++)
        k->packed[i] = pack(row[i], (int32_t)i);
    const int64_t *sorted = sort_best(k->n, k->m, k->packed, k->sorted);
    for (int64_t a = 0; a < k->m; a++) {
        key[a] = index_of(sorted[a]);
        value[a] = row[key[a]];
    }
}

static void choose_by_counting(token *k) {
    rank_by_counting(k, k->x, k->x_value, k->x_key);
    rank_by_counting(k, k->y, k->y_value, k->y_key);
    offer_staircase(k);
}

static fmoe_status run_counting(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, true, choose_by_counting, finish_plain);
}

// ---- Rung: a threshold ----

// Candidates of one key against a run of the other side's: a row of the staircase, or a column.
static void add_run(int64_t count, float fixed, const float *value, int32_t fixed_index, const int32_t *key,
                    int32_t stride, int32_t *bits, int32_t *index) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        bits[i] = rising_bits(fixed + value[i]);
        index[i] = fixed_index + key[i] * stride;
    }
}

// [corners]
// The staircase as nested corners, a row and a column from (r, r) each: 15 long runs at K = 64, not 64 short rows.
static int64_t list_candidates(const token *k) {
    int32_t n = (int32_t)k->n;
    int64_t count = 0;
    for (int64_t r = 0; r < k->n && (r + 1) * (r + 1) <= k->K; r++) {
        int64_t length = smaller(k->n, k->K / (r + 1)) - r;
        add_run(length, k->x_value[r], k->y_value + r, k->x_key[r] * n, k->y_key + r, 1, k->bits + count,
                k->index + count);
        count += length;
        add_run(length - 1, k->y_value[r], k->x_value + r + 1, k->y_key[r], k->x_key + r + 1, n, k->bits + count,
                k->index + count);
        count += length - 1;
    }
    return count;
}
// [/corners]

// [threshold]
static int64_t count_from(int64_t count, const int32_t *bits, int32_t least) {
    int32_t found = 0; // at most n² < 2^31
#pragma omp simd reduction(+ : found)
    for (int64_t i = 0; i < count; i++)
        found += bits[i] >= least;
    return found;
}

// A threshold that K candidates or more reach, and as few more as there are ties: bisection over the bits of a float.
static int32_t find_threshold(int64_t count, const int32_t *bits, int64_t K) {
    int32_t low = INT32_MAX, high = INT32_MIN;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < count; i++) {
        low = bits[i] < low ? bits[i] : low;
        high = bits[i] > high ? bits[i] : high;
    }
    while (low < high) { // at least K reach low; fewer than K reach high + 1
        int32_t middle = (int32_t)(((int64_t)low + high + 1) >> 1);
        int64_t found = count_from(count, bits, middle);
        if (found == K)
            return middle;
        if (found > K)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}
// [/threshold]

static void choose_by_threshold(token *k) {
    rank_by_counting(k, k->x, k->x_value, k->x_key);
    rank_by_counting(k, k->y, k->y_value, k->y_key);
    int64_t candidates = list_candidates(k), kept = 0;
    int32_t threshold = find_threshold(candidates, k->bits, k->K);
    for (int64_t i = 0; i < candidates; i++) {
        k->packed[kept] = (int64_t)((uint64_t)(uint32_t)k->bits[i] << 32 | (uint32_t)~k->index[i]);
        kept += k->bits[i] >= threshold;
    }
    memcpy(k->best, sort_best(kept, k->K, k->packed, k->sorted), (size_t)k->K * sizeof *k->best);
}

static fmoe_status run_threshold(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, true, choose_by_threshold, finish_plain);
}

// ---- Rung: softmax in vectors ----

// Σ exp(z − max), the maximum being known.
static float sum_exp(int64_t n, const float *z, float max) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += exp_f32(z[i] - max);
    return sum;
}

// [vector-finish]
static void finish_vector(const token *k, bool norm_topk_prob, int32_t *indices, float *scores, float *weights) {
    float x_max = k->x_value[0], y_max = k->y_value[0];
    float shift = logf(sum_exp(k->n, k->x, x_max)) + logf(sum_exp(k->n, k->y, y_max)), sum = 0;
    double per_row = 1.0 / (double)k->n;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < k->K; c++) {
        int32_t index = index_of(k->best[c]), n = (int32_t)k->n;
        int32_t i = (int32_t)((index + 0.5) * per_row); // exact: no vector unit divides integers
        scores[c] = (k->x[i] - x_max) + (k->y[index - i * n] - y_max) - shift;
        indices[c] = index;
        weights[c] = exp_f32(scores[c]);
        sum += weights[c];
    }
    if (norm_topk_prob)
#pragma omp simd
        for (int64_t c = 0; c < k->K; c++)
            weights[c] /= sum;
}
// [/vector-finish]

size_t cpu_topk_best_workspace(const void *args) {
    return token_a_thread(args);
}

fmoe_status cpu_topk_best(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    return each_token(args, workspace, bytes, true, choose_by_threshold, finish_vector);
}

const fmoe_rung chapter3_rungs[] = {
    {.name = "scans",
     .backend = BACKEND_CPU,
     .idea = "The definition: K scans over all n² pairs, each finding the best one below the last.",
     .run = run_scans,
     .workspace = one_token,
     .supports = few_visits},
    {.name = "one-scan",
     .backend = BACKEND_CPU,
     .idea = "One scan with the K best so far in a heap: n² visits instead of K·n².",
     .run = run_one_scan,
     .workspace = one_token},
    {.name = "key-lists",
     .backend = BACKEND_CPU,
     .idea = "Only the best min(K, n) keys a side can be part of the answer: min(K, n)² pairs.",
     .run = run_key_lists,
     .workspace = one_token},
    {.name = "staircase",
     .backend = BACKEND_CPU,
     .idea = "Only ranks with (a+1)(b+1) ≤ K can be: about K·ln K pairs.",
     .run = run_staircase,
     .workspace = one_token},
    {.name = "openmp",
     .backend = BACKEND_CPU,
     .idea = "Tokens do not touch one another: a share of them for each thread.",
     .run = run_openmp,
     .workspace = token_a_thread},
    {.name = "frontier",
     .backend = BACKEND_CPU,
     .idea = "Walk the staircase's rows from their best pairs: K steps instead of K·ln K candidates.",
     .run = run_frontier,
     .workspace = token_a_thread},
    {.name = "counting",
     .backend = BACKEND_CPU,
     .idea = "Rank the keys of a side by counting who beats whom: more comparisons, no branches, all vector lanes.",
     .run = run_counting,
     .workspace = token_a_thread},
    {.name = "threshold",
     .backend = BACKEND_CPU,
     .idea = "Bisect the K-th sum's bits by counting, then sort only what reaches it.",
     .run = run_threshold,
     .workspace = token_a_thread},
    {.name = "vector-softmax",
     .backend = BACKEND_CPU,
     .idea = "The log-softmax by then costs more than the choice: an exp that fills the vector lanes.",
     .run = cpu_topk_best,
     .workspace = cpu_topk_best_workspace},
    {0},
};
