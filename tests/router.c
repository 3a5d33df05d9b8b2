/* Chapter 2: router norm and logits. */
#include "cuda_values.h"

#include <math.h>
#include <string.h>

/* What the properties below hold to account. A sentence about the GPU puts the GPU's in their place: its process runs
 * no other. Sums in float32 are allowed twice the roundings. */
static const fmoe_rung *ladder = chapter2_rungs;
static fmoe_status (*log_softmax)(int64_t rows, int64_t n, const float *logits, float *log_probs) = fmoe_log_softmax;
static float roundings = 1;

/* Mean and sum of squared deviations of a column, two passes in long double. */
static long double column_mean(int64_t T, int64_t d, int64_t h, const float *x) {
    long double sum = 0;
    for (int64_t t = 0; t < T; t++)
        sum += x[t * d + h];
    return sum / T;
}

static long double column_squares(int64_t T, int64_t d, int64_t h, const float *x) {
    long double mean = column_mean(T, d, h, x), sum = 0;
    for (int64_t t = 0; t < T; t++)
        sum += (x[t * d + h] - mean) * (x[t * d + h] - mean);
    return sum;
}

/* Two roundings of a value whose neighbours are of size `scale`. */
static bool close_to(double out, long double ref, double scale) {
    return fabsl(out - ref) <= 2.5e-7L * (fabsl(ref) + scale);
}

static const char *check_normalised(int64_t T, int64_t d, const float *x, const float *x_hat, double tolerance) {
    for (int64_t h = 0; h < d; h++) {
        long double mean = column_mean(T, d, h, x), var = column_squares(T, d, h, x) / T;
        for (int64_t t = 0; t < T; t++) {
            long double ref = (x[t * d + h] - mean) / sqrtl(var + 1e-5L);
            if (!(fabsl(x_hat[t * d + h] - ref) <= tolerance * (1 + fabsl(ref))))
                return because("token %d, unit %d: %.9g, should be %.9Lg", (int)t, (int)h, x_hat[t * d + h], ref);
        }
    }
    return HOLDS;
}

static const char *normalises(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1];
    float *x OWNED = normals(seed, 0, 2, T * d), *x_hat OWNED = floats(T * d);
    float *mean OWNED = filled(0, d), *var OWNED = filled(1, d);
    for (int64_t i = 0; i < T * d; i++)
        x[i] += (float)(i % d % 5);
    if (T < 2)
        return DOES_NOT_APPLY;
    CALL(fmoe_router_norm(true, T, d, x, mean, var, x_hat));
    return check_normalised(T, d, x, x_hat, 2.5e-7);
}

SENTENCE(2, 1, "In training every hidden unit is divided by its own batch's deviation: biased variance, eps inside.",
         "the definition", "two passes in long double") {
    for_sizes("T d", normalises, SIZES({2, 1}, {2, 7}, {3, 64}, {29, 72}, {130, 65}, {1000, 3}));
}

static const char *buffers_move(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], steps = size[2];
    if (T < 2)
        return DOES_NOT_APPLY;
    float *mean OWNED = normals(seed, 1, 1, d), *var OWNED = filled(2, d), *x_hat OWNED = floats(T * d);
    float *first_mean OWNED = copy_of(mean, d), *first_var OWNED = copy_of(var, d);
    long double *mean_part OWNED = zeros(d, sizeof *mean_part), *var_part OWNED = zeros(d, sizeof *var_part);
    for (int64_t s = 0; s < steps; s++) {
        float *x OWNED = normals(seed, 2 + (uint64_t)s, 3, T * d);
        CALL(fmoe_router_norm(true, T, d, x, mean, var, x_hat));
        long double share = 0.1L * powl(0.9L, (long double)(steps - 1 - s));
        for (int64_t h = 0; h < d; h++) {
            mean_part[h] += share * column_mean(T, d, h, x);
            var_part[h] += share * column_squares(T, d, h, x) / (T - 1);
        }
    }
    long double kept = powl(0.9L, (long double)steps);
    for (int64_t h = 0; h < d; h++) {
        if (!close_to(mean[h], kept * first_mean[h] + mean_part[h], (double)steps))
            return because("running_mean[%d] = %.9g after %d steps", (int)h, mean[h], (int)steps);
        if (!close_to(var[h], kept * first_var[h] + var_part[h], (double)steps))
            return because("running_var[%d] = %.9g, should be %.9Lg", (int)h, var[h],
                           kept * first_var[h] + var_part[h]);
    }
    return HOLDS;
}

SENTENCE(2, 2,
         "After s steps the running buffers hold 0.9^s of the first value and 0.1·0.9^(s−i) of batch i, unbiased.",
         "momentum 0.1, and T − 1 in the variance", "the closed form in long double") {
    for_sizes("T d steps", buffers_move, SIZES({2, 1, 1}, {2, 3, 4}, {7, 13, 10}, {65, 70, 3}));
}

static const char *evaluation_reads(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1];
    float *x OWNED = normals(seed, 0, 1, T * d), *x_hat OWNED = floats(T * d);
    float *mean OWNED = normals(seed, 1, 2, d), *var OWNED = normals(seed, 2, 1, d);
    for (int64_t h = 0; h < d; h++)
        var[h] = fabsf(var[h]) * 1e-4f; /* small enough for eps to matter */
    float *mean_before OWNED = copy_of(mean, d), *var_before OWNED = copy_of(var, d);
    CALL(fmoe_router_norm(false, T, d, x, mean, var, x_hat));
    if (!same_bits(mean, mean_before, d) || !same_bits(var, var_before, d))
        return because("a running buffer moved");
    for (int64_t i = 0; i < T * d; i++) {
        long double ref = ((long double)x[i] - mean[i % d]) / sqrtl(var[i % d] + 1e-5L);
        if (!close_to(x_hat[i], ref, 0))
            return because("element %d: %.9g, should be %.9Lg", (int)i, x_hat[i], ref);
    }
    return HOLDS;
}

SENTENCE(2, 3, "Evaluation normalises with the running buffers and leaves their bits alone, one token included.",
         "what a token becomes must not depend on its batch", "the formula in long double") {
    for_sizes("T d", evaluation_reads, SIZES({1, 1}, {1, 72}, {29, 7}, {5, 200}));
}

static const char *constant_becomes_zero(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1];
    if (T < 2)
        return DOES_NOT_APPLY;
    float *x OWNED = floats(T * d), *x_hat OWNED = floats(T * d);
    float *value OWNED = normals(seed, 0, 100, d), *mean OWNED = filled(0, d), *var OWNED = filled(1, d);
    for (int64_t i = 0; i < T * d; i++)
        x[i] = value[i % d];
    CALL(fmoe_router_norm(true, T, d, x, mean, var, x_hat));
    for (int64_t i = 0; i < T * d; i++)
        if (!(fabsf(x_hat[i]) <= 1e-9f))
            return because("element %d of a constant unit is %g", (int)i, x_hat[i]);
    for (int64_t h = 0; h < d; h++)
        if (!(fabsf(var[h] - 0.9f) <= 1e-6f))
            return because("running_var[%d] = %.9g, should be 0.9", (int)h, var[h]);
    return HOLDS;
}

SENTENCE(2, 4, "A unit that is the same for every token becomes zero, not NaN.", "eps keeps 0 / 0 away",
         "closed form") {
    for_sizes("T d", constant_becomes_zero, SIZES({2, 1}, {7, 13}, {300, 70}));
}

static const char *far_from_zero(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1];
    if (T < 2)
        return DOES_NOT_APPLY;
    float *x OWNED = normals(seed, 0, 0.1f, T * d), *x_hat OWNED = floats(T * d);
    float *mean OWNED = filled(0, d), *var OWNED = filled(1, d);
    for (int64_t i = 0; i < T * d; i++)
        x[i] += 1e4f;
    CALL(fmoe_router_norm(true, T, d, x, mean, var, x_hat));
    return check_normalised(T, d, x, x_hat, 1e-6);
}

SENTENCE(2, 5, "A mean of 100,000 deviations costs the norm no digits.",
         "the mean of squares minus the square of the mean would lose eight of them", "two passes in long double") {
    for_sizes("T d", far_from_zero, SIZES({2, 1}, {29, 7}, {1000, 5}));
}

SENTENCE(2, 6, "A batch of one cannot be trained on, and the message says so; in evaluation it is legal.",
         "the unbiased variance divides by T − 1", "the contract") {
    float x[] = {1, 2}, mean[] = {0, 0}, var[] = {1, 1}, x_hat[] = {7, 7};
    fmoe_status status = fmoe_router_norm(true, 1, 2, x, mean, var, x_hat);
    expect(status == FMOE_BATCH_OF_ONE, "status is %s", fmoe_status_name(status));
    expect(strstr(fmoe_error_message(), "tokens = 1"), "the message is \"%s\"", fmoe_error_message());
    expect(mean[0] == 0 && var[1] == 1 && x_hat[0] == 7, "a failed call wrote something");
    status = fmoe_router_norm(false, 1, 2, x, mean, var, x_hat);
    expect(status == FMOE_OK && fabsf(x_hat[1] - 2) < 1e-4f, "evaluation: %s, %g", fmoe_status_name(status), x_hat[1]);
    fmoe_router_args args = {.T = 1,
                             .d = 2,
                             .n = 1,
                             .training = true,
                             .x = x,
                             .gate = x,
                             .running_mean = mean,
                             .running_var = var,
                             .logits = x_hat,
                             .log_probs = x_hat};
    for (const fmoe_rung *rung = chapter2_rungs; rung->run; rung++) {
        size_t bytes = rung->workspace(&args);
        void *workspace OWNED = workspace_of(bytes);
        status = rung->run(&args, workspace, bytes, NULL);
        expect(status == FMOE_BATCH_OF_ONE, "%s: status is %s", rung->name, fmoe_status_name(status));
    }
}

static const char *projects(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2];
    float *x_hat OWNED = normals(seed, 0, 1, T * d), *gate OWNED = normals(seed, 1, 1, 2 * n * d);
    float *logits OWNED = floats(2 * T * n);
    CALL(fmoe_router_logits(T, d, n, x_hat, gate, logits));
    for (int64_t side = 0; side < 2; side++)
        for (int64_t t = 0; t < T; t++)
            for (int64_t key = 0; key < n; key++) {
                long double ref = 0;
                for (int64_t h = 0; h < d; h++)
                    ref += (long double)x_hat[t * d + h] * gate[(side * n + key) * d + h];
                float out = logits[side * T * n + t * n + key];
                if (!close_to(out, ref, 1e-9 * (double)d))
                    return because("side %d, token %d, key %d: %.9g, should be %.9Lg", (int)side, (int)t, (int)key, out,
                                   ref);
            }
    return HOLDS;
}

SENTENCE(2, 7, "Logit [side, t, key] is the dot product of token t and gate row side·n + key.",
         "the layout [2, T, n] is what every later step reads", "dot products in long double") {
    for_sizes("T d n", projects, SIZES({1, 1, 1}, {2, 3, 1}, {3, 7, 13}, {5, 72, 4}, {2, 1000, 9}));
}

static const char *sums_to_one(const int64_t *size, uint64_t seed) {
    int64_t rows = size[0], n = size[1];
    float *z OWNED = normals(seed, 0, 3, rows * n), *log_p OWNED = floats(rows * n);
    CALL(log_softmax(rows, n, z, log_p));
    for (int64_t r = 0; r < rows; r++) {
        long double sum = 0;
        for (int64_t i = 0; i < n; i++)
            sum += expl(log_p[r * n + i]);
        if (!(fabsl(sum - 1) <= 1e-6L * roundings))
            return because("row %d: the probabilities sum to %.9Lg", (int)r, sum);
        for (int64_t i = 1; i < n; i++) {
            long double step = (long double)z[r * n + i] - z[r * n];
            if (!(fabsl((long double)log_p[r * n + i] - log_p[r * n] - step) <= 4e-6L * roundings))
                return because("row %d: keys 0 and %d differ by other than their logits", (int)r, (int)i);
        }
    }
    return HOLDS;
}

SENTENCE(2, 8, "The probabilities of a row sum to one, and two keys' log-probabilities differ as their logits do.",
         "these two properties define log-softmax", "sums in long double") {
    for_sizes("rows n", sums_to_one, SIZES({1, 1}, {2, 2}, {7, 13}, {4, 320}, {58, 3}));
}

static const char *shift_changes_nothing(const int64_t *size, uint64_t seed) {
    int64_t rows = size[0], n = size[1];
    float *z OWNED = floats(rows * n), *shifted OWNED = floats(rows * n);
    float *log_p OWNED = floats(rows * n), *log_q OWNED = floats(rows * n);
    for (int64_t i = 0; i < rows * n; i++) {
        z[i] = (float)(fmoe_random_bits(seed, 0, (uint64_t)i) % 64) / 8;
        int64_t row = i / n;
        shifted[i] = z[i] + 1000 * (float)(1 + row); /* exact: eighths below 2^20 */
    }
    CALL(log_softmax(rows, n, z, log_p));
    CALL(log_softmax(rows, n, shifted, log_q));
    for (int64_t i = 0; i < rows * n; i++)
        if (!(fabsf(log_p[i] - log_q[i]) <= 2e-6f * roundings))
            return because("key %d of row %d: %.9g, shifted %.9g", (int)(i % n), (int)(i / n), log_p[i], log_q[i]);
    return HOLDS;
}

SENTENCE(2, 9, "Adding a constant to all logits of a row changes no log-probability.",
         "so the constant may be the largest logit, and exp cannot overflow", "the same row, shifted") {
    for_sizes("rows n", shift_changes_nothing, SIZES({1, 1}, {3, 13}, {2, 320}));
}

static const char *without_key(const int64_t *size, uint64_t seed) {
    int64_t n = size[0], gone = size[1];
    if (n < 2 || gone >= n)
        return DOES_NOT_APPLY;
    float *z OWNED = normals(seed, 0, 2, n), *log_p OWNED = floats(n);
    float *rest OWNED = floats(n), *log_rest OWNED = floats(n);
    int64_t others = 0;
    for (int64_t i = 0; i < n; i++)
        if (i != gone)
            rest[others++] = z[i];
    z[gone] = -INFINITY;
    CALL(log_softmax(1, n, z, log_p));
    CALL(log_softmax(1, others, rest, log_rest));
    if (log_p[gone] != -INFINITY)
        return because("the key's own log-probability is %g", log_p[gone]);
    for (int64_t i = 0, j = 0; i < n; i++)
        if (i != gone && !(fabsf(log_p[i] - log_rest[j++]) <= 1e-6f * roundings))
            return because("key %d: %.9g with it, %.9g without", (int)i, log_p[i], log_rest[j - 1]);
    return HOLDS;
}

SENTENCE(2, 10, "A key whose logit is −∞ has probability zero, and the others' are those of a row without it.",
         "exp(−∞) = 0", "the row without that key") {
    for_sizes("n gone", without_key, SIZES({2, 0}, {2, 1}, {13, 0}, {13, 12}, {40, 7}));
}

static void extreme_logits(void) {
    float z[] = {1e9f, 1e9f, -1e9f, 3e38f, 3e38f, -3e38f, -1e4f, -1e4f, -1e4f}, log_p[9];
    expect(log_softmax(3, 3, z, log_p) == FMOE_OK, "%s", fmoe_error_message());
    for (int i = 0; i < 2; i++) {
        expect(fabsf(log_p[i] + logf(2)) < 1e-6f, "key %d of 1e9: %.9g", i, log_p[i]);
        expect(fabsf(log_p[3 + i] + logf(2)) < 1e-6f, "key %d of 3e38: %.9g", i, log_p[3 + i]);
    }
    expect(log_p[2] == -2e9f, "−1e9 beside 1e9: %.9g", log_p[2]);
    expect(log_p[5] == -INFINITY, "−6e38 is no float32: %.9g", log_p[5]);
    expect(fabsf(log_p[8] + logf(3)) < 1e-6f, "three logits of −10,000: %.9g", log_p[8]);
}

SENTENCE(2, 11, "Logits of 10^9 and of 3·10^38 keep their probabilities and overflow nothing.",
         "the largest logit is taken out before exp, and taken off before the logarithm is", "closed form") {
    extreme_logits();
}

static const char *row_alone(const int64_t *size, uint64_t seed) {
    int64_t rows = size[0], n = size[1], bad = (int64_t)(seed % (uint64_t)rows), at = (int64_t)(seed / 7 % (uint64_t)n);
    float *z OWNED = normals(seed, 0, 1, rows * n), *sound OWNED = floats(rows * n), *log_p OWNED = floats(rows * n);
    CALL(log_softmax(rows, n, z, sound));
    z[bad * n + at] = seed % 2 ? NAN : INFINITY;
    CALL(log_softmax(rows, n, z, log_p));
    for (int64_t i = 0; i < rows * n; i++) {
        if (i / n == bad && !isnan(log_p[i]))
            return because("key %d of the row with a %g is %g", (int)(i % n), z[bad * n + at], log_p[i]);
        if (i / n != bad && log_p[i] != sound[i])
            return because("row %d changed", (int)(i / n));
    }
    return HOLDS;
}

SENTENCE(2, 12, "A NaN or +∞ logit makes its own row NaN and touches no other.",
         "no probabilities can be given to such a row, and other tokens are none of its business",
         "the same rows without it") {
    for_random_sizes("rows n", row_alone, 40, (int64_t[]){1, 1}, (int64_t[]){9, 40});
}

SENTENCE(2, 13, "Without tokens nothing is written and no running buffer moves.", "T = 0 is legal", "the contract") {
    float mean[] = {3, 4}, var[] = {5, 6}, gate[] = {1, 1, 1, 1};
    fmoe_status norm = fmoe_router_norm(true, 0, 2, NULL, mean, var, NULL);
    expect(norm == FMOE_OK, "norm: %s", fmoe_error_message());
    expect(mean[0] == 3 && mean[1] == 4 && var[0] == 5 && var[1] == 6, "a running buffer moved");
    expect(fmoe_router_logits(0, 2, 1, NULL, gate, NULL) == FMOE_OK, "logits: %s", fmoe_error_message());
    expect(fmoe_log_softmax(0, 2, NULL, NULL) == FMOE_OK, "log-softmax: %s", fmoe_error_message());
    for (int train = 0; train < 2; train++) {
        const char *wrong =
            rungs_agree(&fmoe_step_router, chapter2_rungs, fresh_seed(), "T0-d7-n3-f32%s", train ? "-train" : "");
        expect(wrong == HOLDS, "%s", wrong);
    }
}

static const char *type_name(int64_t type) {
    return fmoe_dtype_name((fmoe_dtype)type);
}

static const char *rungs_compute_it(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2], type = size[3], training = size[4];
    if (training && T == 1)
        return DOES_NOT_APPLY;
    return rungs_agree(&fmoe_step_router, ladder, seed, "T%d-d%d-n%d-%s%s", (int)T, (int)d, (int)n, type_name(type),
                       training ? "-train" : "");
}

SENTENCE(2, 14, "Every rung of the ladder computes the same step, for any sizes, types and either mode.",
         "a faster rung is only worth its time if it is right; logits within 2e-5 for 16-bit storage too",
         "the reference") {
    for_sizes("T d n type training", rungs_compute_it,
              SIZES({1, 1, 1, 0, 0}, {2, 1, 1, 0, 1}, {3, 7, 13, 1, 0}, {65, 7, 13, 2, 1}, {29, 72, 13, 0, 1},
                    {29, 72, 13, 2, 0}, {130, 1000, 1, 1, 1}, {67, 1000, 5, 2, 0}, {520, 33, 20, 0, 0},
                    {257, 64, 128, 2, 1}, {193, 16, 320, 1, 1}));
    for_random_sizes("T d n type training", rungs_compute_it, 30, (int64_t[]){1, 1, 1, 0, 0},
                     (int64_t[]){150, 90, 40, 2, 1});
}

/* A problem whose hidden units have the mean given, in units of their deviation. */
static const char *rungs_far_from_zero(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2], training = size[3], distance = size[4];
    if (training && T == 1)
        return DOES_NOT_APPLY;
    fmoe_problem p FREED(fmoe_problem_free) =
        new_problem(&fmoe_step_router, seed, "T%d-d%d-n%d-f32%s", (int)T, (int)d, (int)n, training ? "-train" : "");
    float *x = fmoe_problem_find(&p, "x")->data, *mean = fmoe_problem_find(&p, "running_mean")->pristine;
    for (int64_t i = 0; i < T * d; i++)
        x[i] = fmoe_random_normal(seed, 1, (uint64_t)i) + (float)distance;
    float *var = fmoe_problem_find(&p, "running_var")->pristine;
    for (int64_t h = 0; h < d; h++) {
        mean[h] = (float)distance + 0.125f;
        var[h] = 1;
    }
    CALL(p.step->reference(&p));
    return rungs_right(ladder, &p);
}

SENTENCE(2, 15, "No rung loses digits to a mean of 10,000 deviations, in training or evaluation.",
         "one pass and folding are safe only if what they subtract is of the size of what remains", "the reference") {
    for_sizes("T d n training distance", rungs_far_from_zero,
              SIZES({2, 1, 1, 1, 10000}, {70, 9, 5, 1, 10000}, {70, 9, 5, 0, 10000}, {129, 64, 20, 1, 300},
                    {5, 64, 20, 0, 30}, {200, 33, 7, 1, 0}));
}

static const char *bits_repeat(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2], type = size[3], training = size[4];
    return rungs_repeat(&fmoe_step_router, ladder, seed, "T%d-d%d-n%d-%s%s", (int)T, (int)d, (int)n, type_name(type),
                        training ? "-train" : "");
}

static const char *reference_repeats(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2];
    if (T < 2)
        return DOES_NOT_APPLY;
    int64_t count = 2 * d + 4 * T * n;
    float *x OWNED = normals(seed, 0, 1, T * d), *gate OWNED = normals(seed, 1, 1, 2 * n * d);
    float *first OWNED = floats(count), *again OWNED = floats(count);
    FOR_THREADS(run) {
        float *out = run.turn ? again : first, *logits = out + 2 * d, *x_hat OWNED = floats(T * d);
        for (int64_t h = 0; h < 2 * d; h++)
            out[h] = 1;
        CALL(fmoe_router_norm(true, T, d, x, out, out + d, x_hat));
        CALL(fmoe_router_logits(T, d, n, x_hat, gate, logits));
        CALL(fmoe_log_softmax(2 * T, n, logits, logits + 2 * T * n));
        if (run.turn && !same_bits(first, again, count))
            return because("%d threads give other bits than one", run.threads);
    }
    return HOLDS;
}

SENTENCE(2, 16, "Reference and rungs give the same bits for any number of threads.",
         "every sum has one owner and one order", "runs with 1, 2, 3 and 7 threads") {
    for_sizes("T d n", reference_repeats, SIZES({2, 1, 1}, {29, 200, 7}, {65, 72, 13}));
    for_sizes("T d n type training", bits_repeat,
              SIZES({1, 5, 3, 0, 0}, {29, 72, 13, 0, 1}, {300, 40, 13, 2, 1}, {130, 17, 33, 1, 0}));
    for_random_sizes("T d n type training", bits_repeat, 30, (int64_t[]){2, 1, 1, 0, 0}, (int64_t[]){70, 20, 12, 2, 1});
}

SENTENCE(2, 17, "Bad arguments are named, each with its status, and nothing is written.",
         "a library neither prints nor exits", "the contract") {
    float x[4] = {0}, mean[2] = {0}, var[2] = {0}, out[8] = {0};
    refused(fmoe_router_norm(true, -1, 2, x, mean, var, out), FMOE_BAD_SIZE, "tokens = -1");
    refused(fmoe_router_norm(true, 2, 0, x, mean, var, out), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(fmoe_router_norm(true, 2, 2, NULL, mean, var, out), FMOE_NULL_POINTER, "x");
    refused(fmoe_router_norm(true, 2, 2, x, NULL, var, out), FMOE_NULL_POINTER, "running_mean");
    refused(fmoe_router_norm(false, 2, 2, x, mean, NULL, out), FMOE_NULL_POINTER, "running_var");
    refused(fmoe_router_norm(true, 2, 2, x, mean, var, NULL), FMOE_NULL_POINTER, "x_hat");
    refused(fmoe_router_norm(true, INT64_MAX / 2, 1000, x, mean, var, out), FMOE_OVERFLOW, "tokens");
    refused(fmoe_router_logits(2, 2, 0, x, x, out), FMOE_BAD_SIZE, "num_keys = 0");
    refused(fmoe_router_logits(2, -3, 1, x, x, out), FMOE_BAD_SIZE, "hidden_size = -3");
    refused(fmoe_router_logits(2, 2, 1, x, NULL, out), FMOE_NULL_POINTER, "gate");
    refused(fmoe_router_logits(2, 2, 1, x, x, NULL), FMOE_NULL_POINTER, "logits");
    refused(fmoe_router_logits(2, 1 << 30, INT64_MAX >> 20, x, x, out), FMOE_OVERFLOW, "num_keys");
    refused(fmoe_log_softmax(2, -1, x, out), FMOE_BAD_SIZE, "num_keys = -1");
    refused(fmoe_log_softmax(-2, 2, x, out), FMOE_BAD_SIZE, "rows = -2");
    refused(fmoe_log_softmax(2, 2, NULL, out), FMOE_NULL_POINTER, "logits");
    refused(fmoe_log_softmax(2, 2, x, NULL), FMOE_NULL_POINTER, "log_probs");
    for (int i = 0; i < 8; i++)
        expect(out[i] == 0 && mean[i % 2] == 0, "a failed call wrote something");
}

/* ---- On the GPU -------------------------------------------------------------------------------------------------- */

static const char *without_tokens(const int64_t *size, uint64_t seed) {
    return rungs_agree(&fmoe_step_router, ladder, seed, "T0-d7-n3-%s%s", type_name(size[0]), size[1] ? "-train" : "");
}

CUDA_SENTENCE(2, 18, "Every GPU rung computes logits, log-probabilities and buffers: any sizes, types and either mode.",
              "tiles that stick out over an edge are the usual mistake; logits within 2e-5 for 16-bit storage too",
              "the reference") {
    ladder = cuda_router_rungs;
    for_sizes("T d n type training", rungs_compute_it,
              SIZES({1, 1, 1, 0, 0}, {2, 1, 1, 0, 1}, {3, 7, 13, 1, 0}, {65, 7, 13, 2, 1}, {29, 72, 13, 0, 1},
                    {29, 72, 13, 2, 0}, {130, 1000, 1, 1, 1}, {67, 1000, 5, 2, 0}, {520, 33, 20, 0, 0},
                    {257, 64, 128, 2, 1}, {193, 16, 320, 1, 1}, {129, 1024, 128, 2, 0}, {128, 512, 64, 1, 1},
                    {33, 40, 1024, 0, 0}, {70, 136, 513, 2, 1}, {3000, 24, 16, 0, 1}, {2051, 8, 5, 2, 1},
                    {64, 4096, 8, 2, 1}, {64, 4096, 8, 0, 0}));
    for_random_sizes("T d n type training", rungs_compute_it, 150, (int64_t[]){1, 1, 1, 0, 0},
                     (int64_t[]){300, 300, 200, 2, 1});
    for_sizes("type training", without_tokens, SIZES({0, 0}, {0, 1}, {1, 0}, {2, 0}, {2, 1}));
}

CUDA_SENTENCE(2, 19, "No GPU rung loses digits to a mean of 10,000 deviations, in training or evaluation.",
              "the mean has to be kept in two floats, and folding multiplies what it rounds", "the reference") {
    ladder = cuda_router_rungs;
    for_sizes("T d n training distance", rungs_far_from_zero,
              SIZES({2, 1, 1, 1, 10000}, {70, 9, 5, 1, 10000}, {70, 9, 5, 0, 10000}, {129, 64, 20, 1, 300},
                    {5, 64, 20, 0, 30}, {200, 33, 7, 1, 0}, {1000, 256, 128, 1, 10000}, {1000, 256, 128, 0, 10000},
                    {333, 70, 33, 1, 3000}, {4097, 16, 3, 1, 10000}));
}

/* Units that are the same for every token, next to ordinary ones. */
static const char *rungs_constant_units(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2], type = size[3];
    if (T < 2)
        return DOES_NOT_APPLY;
    fmoe_problem p FREED(fmoe_problem_free) =
        new_problem(&fmoe_step_router, seed, "T%d-d%d-n%d-%s-train", (int)T, (int)d, (int)n, type_name(type));
    float *x OWNED = fmoe_problem_f32(&p, "x");
    for (int64_t i = 0; i < T * d; i++)
        if (i % d % 2 == 0)
            x[i] = x[i % d]; /* the first token's */
    fmoe_from_f32((fmoe_dtype)type, T * d, x, fmoe_problem_find(&p, "x")->data);
    CALL(p.step->reference(&p));
    return rungs_right(ladder, &p);
}

CUDA_SENTENCE(2, 20, "On the GPU too a unit that is the same for every token adds nothing to a logit, and no NaN.",
              "eps keeps 0 / 0 away, but only if the variance is not a little below zero", "the reference") {
    ladder = cuda_router_rungs;
    for_sizes("T d n type", rungs_constant_units,
              SIZES({2, 1, 1, 0}, {7, 13, 3, 0}, {300, 70, 20, 2}, {1025, 66, 33, 0}, {129, 64, 128, 1}));
}

CUDA_SENTENCE(2, 21,
              "The GPU's log-softmax: probabilities sum to one; −∞ is probability zero; nothing overflows; NaN stays.",
              "what holds for the reference holds here, with roundings of float32 sums", "the sentences 2.8 to 2.12") {
    log_softmax = gpu_log_softmax;
    roundings = 2;
    for_sizes("rows n", sums_to_one,
              SIZES({1, 1}, {2, 2}, {7, 13}, {4, 320}, {58, 3}, {3, 31}, {3, 32}, {3, 33}, {5, 1024}, {2, 3000}));
    for_sizes("rows n", shift_changes_nothing, SIZES({1, 1}, {3, 13}, {2, 320}, {2, 1000}));
    for_sizes("n gone", without_key, SIZES({2, 0}, {2, 1}, {13, 0}, {13, 12}, {40, 7}, {300, 299}));
    for_random_sizes("rows n", row_alone, 40, (int64_t[]){1, 1}, (int64_t[]){9, 140});
    extreme_logits();
    expect(gpu_log_softmax(0, 5, NULL, NULL) == FMOE_OK, "no rows: %s", fmoe_error_message());
}

/* The public function on the problem that a step draws, and only what is asked for. */
static const char *public_router(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2], type = size[3], training = size[4], with_log_probs = size[5];
    if (training && T == 1)
        return DOES_NOT_APPLY;
    fmoe_problem p FREED(fmoe_problem_free) = new_problem(&fmoe_step_router, seed, "T%d-d%d-n%d-%s%s", (int)T, (int)d,
                                                          (int)n, type_name(type), training ? "-train" : "");
    const fmoe_router_args *a = p.args;
    gpu_router_args args = {.training = training,
                            .T = T,
                            .d = d,
                            .n = n,
                            .dtype = (fmoe_dtype)type,
                            .x = a->x,
                            .gate = a->gate,
                            .running_mean = a->running_mean,
                            .running_var = a->running_var,
                            .logits = a->logits,
                            .log_probs = with_log_probs ? a->log_probs : NULL};
    CALL(gpu_router(&args));
    if (!with_log_probs)
        CALL(fmoe_log_softmax(2 * T, n, a->logits, a->log_probs));
    char why[256] = "";
    double error = fmoe_problem_error(&p, why);
    return error <= fmoe_error_limit(FMOE_F32) ? HOLDS : because("error %.2g: %s", error, why);
}

CUDA_SENTENCE(2, 22, "fmoe_cuda_router takes any size and type, and log-probabilities are optional.",
              "it chooses among the rungs, and no choice may show", "the reference") {
    for_sizes("T d n type training log_probs", public_router,
              SIZES({1, 1, 1, 0, 0, 1}, {29, 72, 13, 0, 1, 0}, {29, 72, 13, 1, 0, 1}, {65, 1024, 128, 2, 0, 1},
                    {65, 1024, 128, 2, 1, 0}, {40, 60, 300, 2, 1, 1}, {7, 4, 1024, 1, 0, 0}, {200, 129, 17, 2, 0, 1}));
    for_random_sizes("T d n type training log_probs", public_router, 30, (int64_t[]){1, 1, 1, 0, 0, 0},
                     (int64_t[]){200, 200, 200, 2, 1, 1});
}

CUDA_SENTENCE(2, 23, "Every GPU rung of the router writes the same bits in every run.",
              "sums over blocks have an order that no scheduler decides", "three runs") {
    ladder = cuda_router_rungs;
    for_sizes("T d n type training", bits_repeat,
              SIZES({1, 5, 3, 0, 0}, {29, 72, 13, 0, 1}, {2000, 256, 128, 2, 1}, {1030, 170, 33, 1, 0},
                    {4096, 64, 20, 0, 1}));
}

CUDA_SENTENCE(2, 24, "A call depends on its arguments alone: captured in a graph and replayed, or beside another call.",
              "no hidden state, no wait, no memory of its own: that is what a stream and a workspace are for",
              "the reference on data that the capture has not seen; two streams that start together") {
    static const char *const cases[] = {"T129-d72-n13-f32", "T1000-d256-n64-bf16", "T1000-d256-n64-bf16-train",
                                        "T300-d33-n130-f16-train", "T2000-d64-n32-f32-train"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *wrong = rungs_replay(&fmoe_step_router, cuda_router_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
        wrong = rungs_side_by_side(&fmoe_step_router, cuda_router_rungs, fresh_seed(), cases[i]);
        expect(wrong == HOLDS, "%s: %s", cases[i], wrong);
    }
}

/* One value of one token is NaN, infinite, or (kind 3) so far from a mean of variance zero that x̂ is no float16. */
static const char *broken_token(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], d = size[1], n = size[2], type = size[3], kind = size[4];
    static const float wild[] = {NAN, INFINITY, -INFINITY, 1000};
    fmoe_problem p FREED(fmoe_problem_free) =
        new_problem(&fmoe_step_router, seed, "T%d-d%d-n%d-%s", (int)T, (int)d, (int)n, type_name(type));
    int64_t bad = (int64_t)(seed % (uint64_t)T), unit = (int64_t)(seed / 7 % (uint64_t)d), count = 2 * T * n;
    ((float *)fmoe_problem_find(&p, "running_var")->pristine)[unit] = kind == 3 ? 0 : 1;
    float *x OWNED = fmoe_problem_f32(&p, "x");
    x[bad * d + unit] = wild[kind];
    fmoe_from_f32((fmoe_dtype)type, T * d, x, fmoe_problem_find(&p, "x")->data);
    CALL(p.step->reference(&p));
    const fmoe_argument *logits = fmoe_problem_find(&p, "logits");
    const float *out = logits->data, *ref = logits->expected;
    for (const fmoe_rung *rung = ladder; rung->run; rung++) {
        double unused;
        fmoe_status status = fmoe_rung_check(rung, &p, &unused, NULL);
        if (status == FMOE_UNSUPPORTED)
            continue;
        CALL(status);
        double scale = 1;
        for (int64_t i = 0; i < count; i++)
            scale = isfinite(ref[i]) ? fmax(scale, fabs((double)ref[i])) : scale;
        for (int64_t i = 0; i < count; i++)
            if (!(fabs((double)out[i] - ref[i]) < 2e-5 * scale) && out[i] != ref[i] &&
                !(isnan(out[i]) && isnan(ref[i])))
                return because("%s: token %d, key %d is %.9g, should be %.9g", rung->name, (int)(i / n % T),
                               (int)(i % n), out[i], ref[i]);
    }
    return HOLDS;
}

CUDA_SENTENCE(2, 25,
              "In evaluation a token with NaN or infinity has the reference's logits, and no other token notices.",
              "x̂ is split in two where a product takes 16 bits, and infinity cannot be split", "the reference") {
    ladder = cuda_router_rungs;
    for_sizes("T d n type kind", broken_token,
              SIZES({1, 1, 1, 0, 0}, {67, 40, 13, 1, 0}, {67, 40, 13, 1, 1}, {67, 40, 13, 2, 2}, {67, 40, 13, 1, 3},
                    {130, 136, 300, 1, 3}, {130, 136, 300, 2, 1}, {65, 33, 20, 0, 1}, {129, 256, 128, 2, 0}));
    for_random_sizes("T d n type kind", broken_token, 40, (int64_t[]){1, 1, 1, 0, 0}, (int64_t[]){150, 200, 200, 2, 3});
}

CUDA_HOST_SENTENCE(2, 26, "The GPU's router names bad arguments before it launches anything; no tokens are no work.",
                   "what the host can see it says at once", "the contract") {
    float m[4] = {0};
    void *x = m, *w = m;
    const size_t plenty = (size_t)1 << 40;
#define ROUTER(training, T, d, n, dtype, x, gate, mean, var, logits, workspace, bytes)                                 \
    fmoe_cuda_router(training, T, d, n, dtype, x, gate, mean, var, logits, NULL, workspace, bytes, NULL)
    refused(ROUTER(false, -1, 2, 2, FMOE_F32, x, x, m, m, m, w, plenty), FMOE_BAD_SIZE, "tokens = -1");
    refused(ROUTER(false, 2, 0, 2, FMOE_F32, x, x, m, m, m, w, plenty), FMOE_BAD_SIZE, "hidden_size = 0");
    refused(ROUTER(false, 2, 2, -3, FMOE_F32, x, x, m, m, m, w, plenty), FMOE_BAD_SIZE, "num_keys = -3");
    refused(ROUTER(true, 1, 2, 2, FMOE_F32, x, x, m, m, m, w, plenty), FMOE_BATCH_OF_ONE, "tokens = 1");
    refused(ROUTER(false, INT64_MAX / 2, 1000, 2, FMOE_F32, x, x, m, m, m, w, plenty), FMOE_OVERFLOW, "tokens");
    refused(ROUTER(false, 2, 2, 2, FMOE_I32, x, x, m, m, m, w, plenty), FMOE_UNSUPPORTED, "dtype = 3");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, NULL, x, m, m, m, w, plenty), FMOE_NULL_POINTER, "x");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, x, NULL, m, m, m, w, plenty), FMOE_NULL_POINTER, "router_gate");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, x, x, NULL, m, m, w, plenty), FMOE_NULL_POINTER, "running_mean");
    refused(ROUTER(true, 2, 2, 2, FMOE_F32, x, x, m, NULL, m, w, plenty), FMOE_NULL_POINTER, "running_var");
    refused(ROUTER(false, 2, 2, 2, FMOE_F32, x, x, m, m, NULL, w, plenty), FMOE_NULL_POINTER, "router_logits");
    size_t needed = fmoe_cuda_router_workspace(true, 2, 2, 2, FMOE_F32);
    expect(needed > 0, "training needs no workspace");
    refused(ROUTER(true, 2, 2, 2, FMOE_F32, x, x, m, m, m, w, needed - 1), FMOE_BAD_WORKSPACE, "workspace_bytes");
    refused(ROUTER(true, 2, 2, 2, FMOE_F32, x, x, m, m, m, NULL, needed), FMOE_NULL_POINTER, "workspace");
    for (int training = 0; training < 2; training++)
        expect(ROUTER(training, 0, 2, 2, FMOE_F32, NULL, x, m, m, NULL, w, plenty) == FMOE_OK, "T = 0: %s",
               fmoe_error_message());
#undef ROUTER
    refused(fmoe_cuda_log_softmax(2, -1, m, m, NULL), FMOE_BAD_SIZE, "num_keys = -1");
    refused(fmoe_cuda_log_softmax(-2, 2, m, m, NULL), FMOE_BAD_SIZE, "rows = -2");
    refused(fmoe_cuda_log_softmax(2, 2, NULL, m, NULL), FMOE_NULL_POINTER, "logits");
    refused(fmoe_cuda_log_softmax(2, 2, m, NULL, NULL), FMOE_NULL_POINTER, "log_probs");
    expect(fmoe_cuda_log_softmax(0, 2, NULL, NULL, NULL) == FMOE_OK, "no rows: %s", fmoe_error_message());
}
