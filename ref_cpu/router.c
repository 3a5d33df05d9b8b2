/* Router: batch normalisation over the tokens, projection onto 2n keys, log-softmax of each side; and back.
 *
 * Statistics run down columns. Each thread owns whole blocks of columns and walks the tokens in order, so every sum
 * has one owner and one order. */
#include "check.h"

#include <math.h>

static fmoe_status check_norm(bool training, int64_t T, int64_t d) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    if (training && T == 1)
        return fmoe_fail(FMOE_BATCH_OF_ONE, "tokens = 1 is below 2, which the unbiased variance needs in training");
    return FMOE_OK;
}

// [batch-statistics]
/* Mean and biased variance of `width` columns. Two passes: the square of a mean far from zero would swallow the
 * variance if it were subtracted from the mean of the squares. */
static void batch_statistics(int64_t T, int64_t d, int64_t width, const float *x, double *mean, double *var) {
    for (int64_t c = 0; c < width; c++)
        mean[c] = var[c] = 0;
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < width; c++)
            mean[c] += x[t * d + c];
    for (int64_t c = 0; c < width; c++)
        mean[c] /= (double)T;
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < width; c++)
            var[c] += (x[t * d + c] - mean[c]) * (x[t * d + c] - mean[c]);
    for (int64_t c = 0; c < width; c++)
        var[c] /= (double)T;
}
// [/batch-statistics]

// [norm]
static void move_average(int64_t width, double scale, const double *batch, float *running) {
    for (int64_t c = 0; c < width; c++)
        running[c] = (float)((1 - FMOE_NORM_MOMENTUM) * running[c] + FMOE_NORM_MOMENTUM * scale * batch[c]);
}

fmoe_status fmoe_router_norm(bool training, int64_t T, int64_t d, const float *x, float *running_mean,
                             float *running_var, float *x_hat) {
    TRY(check_norm(training, T, d));
    TRY(fmoe_check_pointer("x", x, T * d));
    TRY(fmoe_check_pointer("router_norm.running_mean", running_mean, d));
    TRY(fmoe_check_pointer("router_norm.running_var", running_var, d));
    TRY(fmoe_check_pointer("x_hat", x_hat, T * d));
    if (T == 0)
        return FMOE_OK;

#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < d; first += FMOE_BLOCK) {
        double mean[FMOE_BLOCK], var[FMOE_BLOCK], scale[FMOE_BLOCK];
        int64_t width = fmoe_block_width(first, d);
        if (training) {
            batch_statistics(T, d, width, x + first, mean, var);
            move_average(width, 1, mean, running_mean + first);
            move_average(width, (double)T / (double)(T - 1), var, running_var + first);
        } else {
            for (int64_t c = 0; c < width; c++) {
                mean[c] = running_mean[first + c];
                var[c] = running_var[first + c];
            }
        }
        for (int64_t c = 0; c < width; c++)
            scale[c] = 1 / sqrt(var[c] + FMOE_NORM_EPS);
        for (int64_t t = 0; t < T; t++)
            for (int64_t c = 0; c < width; c++)
                x_hat[t * d + first + c] = (float)((x[t * d + first + c] - mean[c]) * scale[c]);
    }
    return FMOE_OK;
}
// [/norm]

// [norm-backward]
/* One column through the batch statistics: x̂ moves with its own x, with the mean and with the variance, so
 * dx = (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)) / sqrt(var + eps). */
static void norm_backward_column(int64_t T, int64_t d, double mean, double scale, const float *x, const float *dx_hat,
                                 float *dx) {
    double sum = 0, sum_with_x_hat = 0;
    for (int64_t t = 0; t < T; t++) {
        sum += dx_hat[t * d];
        sum_with_x_hat += dx_hat[t * d] * (x[t * d] - mean) * scale;
    }
    sum /= (double)T;
    sum_with_x_hat /= (double)T;
    for (int64_t t = 0; t < T; t++)
        dx[t * d] = (float)((dx_hat[t * d] - sum - (x[t * d] - mean) * scale * sum_with_x_hat) * scale);
}

fmoe_status fmoe_router_norm_backward(bool training, int64_t T, int64_t d, const float *x, const float *running_mean,
                                      const float *running_var, const float *dx_hat, float *dx) {
    TRY(check_norm(training, T, d));
    TRY(fmoe_check_pointer("x", x, T * d));
    if (!training) {
        TRY(fmoe_check_pointer("router_norm.running_mean", running_mean, d));
        TRY(fmoe_check_pointer("router_norm.running_var", running_var, d));
    }
    TRY(fmoe_check_pointer("dx_hat", dx_hat, T * d));
    TRY(fmoe_check_pointer("dx", dx, T * d));

#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < d; first += FMOE_BLOCK) {
        double mean[FMOE_BLOCK], var[FMOE_BLOCK];
        int64_t width = fmoe_block_width(first, d);
        if (training)
            batch_statistics(T, d, width, x + first, mean, var);
        for (int64_t c = first; c < first + width; c++) {
            double scale = 1 / sqrt((training ? var[c - first] : running_var[c]) + FMOE_NORM_EPS);
            if (training)
                norm_backward_column(T, d, mean[c - first], scale, x + c, dx_hat + c, dx + c);
            for (int64_t t = 0; !training && t < T; t++)
                dx[t * d + c] = (float)(dx_hat[t * d + c] * scale);
        }
    }
    return FMOE_OK;
}
// [/norm-backward]

static fmoe_status check_logits(int64_t T, int64_t d, int64_t n) {
    TRY(fmoe_check_tokens(T));
    TRY(fmoe_check_size("hidden_size", d));
    TRY(fmoe_check_size("num_keys", n));
    TRY(fmoe_check_shape("tokens", T, "hidden_size", d));
    TRY(fmoe_check_shape("num_keys", n, "hidden_size", d));
    TRY(fmoe_check_shape("tokens", T, "num_keys", n));
    return FMOE_OK;
}

/* Where token t's logit of gate row j lies in logits [2, T, n]. */
static inline int64_t logit_at(int64_t T, int64_t n, int64_t t, int64_t j) {
    return ((j / n) * T + t) * n + j % n;
}

// [logits]
fmoe_status fmoe_router_logits(int64_t T, int64_t d, int64_t n, const float *x_hat, const float *gate, float *logits) {
    TRY(check_logits(T, d, n));
    TRY(fmoe_check_pointer("x_hat", x_hat, T * d));
    TRY(fmoe_check_pointer("router_gate.weight", gate, 2 * n * d));
    TRY(fmoe_check_pointer("router_logits", logits, 2 * T * n));
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t j = 0; j < 2 * n; j++)
            logits[logit_at(T, n, t, j)] = (float)fmoe_dot(d, x_hat + t * d, gate + j * d);
    return FMOE_OK;
}
// [/logits]

// [logits-backward]
fmoe_status fmoe_router_logits_backward(int64_t T, int64_t d, int64_t n, const float *x_hat, const float *gate,
                                        const float *dlogits, fmoe_write write, float *dx_hat, float *dgate) {
    TRY(check_logits(T, d, n));
    TRY(fmoe_check_pointer("x_hat", x_hat, T * d));
    TRY(fmoe_check_pointer("router_gate.weight", gate, 2 * n * d));
    TRY(fmoe_check_pointer("dlogits", dlogits, 2 * T * n));

    /* z = x̂ · gateᵀ, so dx̂ = dz · gate (a row for each token) ... */
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < (dx_hat ? T : 0); t++)
        for (int64_t first = 0; first < d; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, d);
            for (int64_t j = 0; j < 2 * n; j++)
                fmoe_add_row(width, dlogits[logit_at(T, n, t, j)], gate + j * d + first, sum);
            fmoe_store_row(width, sum, FMOE_OVERWRITE, dx_hat + t * d + first);
        }

        /* ... and dgate = dzᵀ · x̂ (a row for each key). */
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < (dgate ? 2 * n : 0); j++)
        for (int64_t first = 0; first < d; first += FMOE_BLOCK) {
            double sum[FMOE_BLOCK] = {0};
            int64_t width = fmoe_block_width(first, d);
            for (int64_t t = 0; t < T; t++)
                fmoe_add_row(width, dlogits[logit_at(T, n, t, j)], x_hat + t * d + first, sum);
            fmoe_store_row(width, sum, write, dgate + j * d + first);
        }
    return FMOE_OK;
}
// [/logits-backward]

static fmoe_status check_rows(int64_t rows, int64_t n) {
    if (rows < 0)
        return fmoe_fail(FMOE_BAD_SIZE, "rows = %lld is below 0", (long long)rows);
    TRY(fmoe_check_size("num_keys", n));
    return fmoe_check_shape("rows", rows, "num_keys", n);
}

// [log-sum-exp]
/* log Σ exp z in two parts: the best logit is taken out, so that exp cannot overflow, and stays apart, because one of
 * 1e30 would swallow the rest. NaN if a logit is NaN or +∞. */
double fmoe_log_sum_exp(int64_t n, const float *z, double *best) {
    double largest = z[0];
    for (int64_t i = 1; i < n; i++)
        largest = z[i] > largest ? z[i] : largest;
    double sum = exp(z[0] - largest);
    for (int64_t i = 1; i < n; i++)
        sum += exp(z[i] - largest);
    *best = largest;
    return log(sum);
}
// [/log-sum-exp]

// [log-softmax]
fmoe_status fmoe_log_softmax(int64_t rows, int64_t n, const float *logits, float *log_probs) {
    TRY(check_rows(rows, n));
    TRY(fmoe_check_pointer("logits", logits, rows * n));
    TRY(fmoe_check_pointer("log_probs", log_probs, rows * n));
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        double best, log_sum = fmoe_log_sum_exp(n, logits + r * n, &best);
        for (int64_t i = 0; i < n; i++)
            log_probs[r * n + i] = (float)(logits[r * n + i] - best - log_sum);
    }
    return FMOE_OK;
}
// [/log-softmax]

// [log-softmax-backward]
fmoe_status fmoe_log_softmax_backward(int64_t rows, int64_t n, const float *logits, const float *dlog_probs,
                                      float *dlogits) {
    TRY(check_rows(rows, n));
    TRY(fmoe_check_pointer("logits", logits, rows * n));
    TRY(fmoe_check_pointer("dlog_probs", dlog_probs, rows * n));
    TRY(fmoe_check_pointer("dlogits", dlogits, rows * n));
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        double best, log_sum = fmoe_log_sum_exp(n, logits + r * n, &best), total = 0;
        for (int64_t i = 0; i < n; i++)
            total += dlog_probs[r * n + i];
        for (int64_t i = 0; i < n; i++)
            dlogits[r * n + i] = (float)(dlog_probs[r * n + i] - exp(logits[r * n + i] - best - log_sum) * total);
    }
    return FMOE_OK;
}
// [/log-softmax-backward]
