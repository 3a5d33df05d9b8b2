/* A step at one case: named tensors with data, what they should become, and how far off they are. */
#include "device.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGN_TENSOR = 64, ALIGN_WORKSPACE = 256, GUARD = 4096, WHY = 200 };

static bool is_float(fmoe_dtype dtype) {
    return dtype == FMOE_F32 || dtype == FMOE_F16 || dtype == FMOE_BF16;
}

static size_t stored_bytes(const fmoe_argument *a) {
    return (size_t)a->count * fmoe_dtype_size(a->dtype);
}

/* Exactly as many bytes as asked for, so that a sanitizer sees the first one beyond. */
static void *allocate(size_t alignment, size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, alignment, bytes ? bytes : 1) ? NULL : memory;
}

fmoe_argument *fmoe_problem_find(const fmoe_problem *p, const char *name) {
    for (int i = 0; i < p->num_arguments; i++)
        if (!strcmp(p->arguments[i].name, name))
            return (fmoe_argument *)&p->arguments[i];
    return NULL;
}

static void free_argument(fmoe_argument *a) {
    free(a->data);
    free(a->expected);
    free(a->pristine);
    *a = (fmoe_argument){0};
}

fmoe_argument *fmoe_problem_add(fmoe_problem *p, const char *name, size_t slot, fmoe_dtype dtype, fmoe_role role,
                                int rank, const int64_t *shape) {
    if (p->num_arguments == FMOE_MAX_ARGUMENTS) {
        fmoe_fail(FMOE_OVERFLOW, "%s is argument number %d, the limit is %d", name, p->num_arguments + 1,
                  FMOE_MAX_ARGUMENTS);
        return NULL;
    }
    fmoe_argument a = {.name = name, .slot = slot, .dtype = dtype, .role = role, .rank = rank, .count = 1};
    for (int i = 0; i < rank; i++) {
        a.shape[i] = shape[i];
        if (shape[i] < 0 || __builtin_mul_overflow(a.count, shape[i], &a.count) || a.count > FMOE_MAX_ELEMENTS) {
            fmoe_fail(shape[i] < 0 ? FMOE_BAD_SIZE : FMOE_OUT_OF_MEMORY, "%s: dimension %d of %lld %s", name, i,
                      (long long)shape[i], shape[i] < 0 ? "is negative" : "makes it larger than any memory");
            return NULL;
        }
    }
    /* expected is float32 whatever the storage type; integers keep theirs. */
    size_t expected_size = is_float(dtype) ? sizeof(float) : fmoe_dtype_size(dtype);
    a.data = allocate(ALIGN_TENSOR, stored_bytes(&a));
    a.expected = role == ROLE_INPUT ? NULL : allocate(ALIGN_TENSOR, (size_t)a.count * expected_size);
    a.pristine = role == ROLE_INOUT ? allocate(ALIGN_TENSOR, stored_bytes(&a)) : NULL;
    if (!a.data || (role != ROLE_INPUT && !a.expected) || (role == ROLE_INOUT && !a.pristine)) {
        fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for %s: %lld elements", name, (long long)a.count);
        free_argument(&a);
        return NULL;
    }
    memcpy((char *)p->args + slot, &a.data, sizeof a.data);
    fmoe_argument *added = &p->arguments[p->num_arguments++];
    *added = a;
    return added;
}

float *fmoe_problem_f32(const fmoe_problem *p, const char *name) {
    const fmoe_argument *a = fmoe_problem_find(p, name);
    if (!a || !a->data || !is_float(a->dtype))
        return NULL;
    float *values = malloc(a->count ? (size_t)a->count * sizeof *values : 1);
    if (values)
        fmoe_to_f32(a->dtype, a->count, a->data, values);
    return values;
}

fmoe_status fmoe_problem_new(const fmoe_step *step, const fmoe_case *c, uint64_t seed, fmoe_problem *p) {
    *p = (fmoe_problem){.step = step, .c = *c, .seed = seed, .args = calloc(1, step->args_size)};
    if (!p->args)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the arguments of %s", step->op);
    fmoe_status status = step->draw(p);
    for (int i = 0; i < p->num_arguments && status == FMOE_OK; i++) {
        const fmoe_argument *a = &p->arguments[i];
        if (a->role == ROLE_INOUT && a->data)
            memcpy(a->pristine, a->data, stored_bytes(a));
    }
    if (status == FMOE_OK)
        status = step->reference(p);
    if (status == FMOE_OK)
        fmoe_problem_poison(p);
    else
        fmoe_problem_free(p);
    return status;
}

void fmoe_problem_free(fmoe_problem *p) {
    for (int i = 0; i < p->num_arguments; i++)
        free_argument(&p->arguments[i]);
    free(p->args);
    *p = (fmoe_problem){0};
}

/* Bytes of 0xff are a NaN in every float type; 0x80808080 is a large negative integer. */
void fmoe_problem_poison(fmoe_problem *p) {
    for (int i = 0; i < p->num_arguments; i++) {
        const fmoe_argument *a = &p->arguments[i];
        if (a->data && a->role == ROLE_OUTPUT)
            memset(a->data, is_float(a->dtype) ? 0xff : 0x80, stored_bytes(a));
        if (a->data && a->role == ROLE_INOUT)
            memcpy(a->data, a->pristine, stored_bytes(a));
    }
}

/* ---- Error ------------------------------------------------------------------------------------------------------- */

/* "y[3, 17]" */
static void element_name(const fmoe_argument *a, int64_t at, char *text, size_t size) {
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

static bool is_compared(const fmoe_argument *a, int64_t row) {
    return a->rows_apart <= 1 || row % a->rows_apart == 0;
}

/* The first element further from its reference than the largest reference value times the type's limit. */
static int64_t first_off(const fmoe_argument *a, const float *out, double limit) {
    const float *ref = a->expected;
    int64_t columns = a->rows_apart > 1 ? a->count / a->shape[0] : 1;
    double largest = 0;
    for (int64_t i = 0; i < a->count; i++)
        if (is_compared(a, i / columns) && isfinite(ref[i]))
            largest = fmax(largest, fabs((double)ref[i]));
    for (int64_t i = 0; i < a->count; i++) {
        if (!is_compared(a, i / columns)) {
            if (isnan(out[i]))
                return i;
            continue;
        }
        bool same = out[i] == ref[i] || (isnan(out[i]) && isnan(ref[i]));
        if (!same && !(fabs((double)out[i] - ref[i]) <= limit * largest))
            return i;
    }
    return -1;
}

/* The relative error of all rows that are compared; infinity if another holds a NaN. */
static double sampled_error(const fmoe_argument *a, const float *out) {
    int64_t rows = a->shape[0], columns = rows ? a->count / rows : 0, sampled = 0;
    double off = 0, scale = 0;
    for (int64_t row = 0; row < rows; row++) {
        const float *is = out + row * columns, *should = (const float *)a->expected + row * columns;
        for (int64_t i = 0; i < columns; i++) {
            if (is_compared(a, row))
                off += pow((double)is[i] - should[i], 2), scale += pow((double)should[i], 2);
            else if (isnan(is[i]))
                return INFINITY;
        }
        sampled += is_compared(a, row);
    }
    double natural = a->natural_scale * sqrt((double)sampled / (double)(rows ? rows : 1));
    return sqrt(off) / sqrt(fmax(scale, 1e-12 * natural * natural));
}

static double float_error(const fmoe_argument *a, double limit, char *why) {
    float *values = a->data;
    if (a->dtype != FMOE_F32) {
        values = malloc(a->count ? (size_t)a->count * sizeof *values : 1);
        if (!values) {
            snprintf(why, WHY, "no memory to compare %s", a->name);
            return INFINITY;
        }
        fmoe_to_f32(a->dtype, a->count, a->data, values);
    }
    const float *expected = a->expected;
    double error = a->rows_apart > 1 ? sampled_error(a, values)
                                     : fmoe_relative_error(a->count, values, expected, a->natural_scale);
    int64_t off = error <= limit ? -1 : first_off(a, values, limit);
    char element[96];
    if (off >= 0) {
        element_name(a, off, element, sizeof element);
        snprintf(why, WHY, "%s is %g and should be %g", element, (double)values[off], (double)expected[off]);
    } else {
        snprintf(why, WHY, "%s", a->name);
    }
    if (values != a->data)
        free(values);
    return error;
}

static int64_t integer_at(const fmoe_argument *a, const void *values, int64_t i) {
    return a->dtype == FMOE_I64 ? ((const int64_t *)values)[i] : ((const int32_t *)values)[i];
}

static double integer_error(const fmoe_argument *a, char *why) {
    for (int64_t i = 0; i < a->count; i++) {
        long long is = integer_at(a, a->data, i), should = integer_at(a, a->expected, i);
        if (is == should)
            continue;
        char element[96];
        element_name(a, i, element, sizeof element);
        snprintf(why, WHY, "%s is %lld and should be %lld", element, is, should);
        return INFINITY;
    }
    snprintf(why, WHY, "%s", a->name);
    return 0;
}

double fmoe_problem_error(const fmoe_problem *p, char *why) {
    char reason[WHY] = "", worst_reason[WHY] = "";
    double worst = 0;
    if (p->step->error) {
        worst = p->step->error(p, worst_reason);
    } else {
        double limit = fmoe_error_limit(p->c.dtype);
        for (int i = 0; i < p->num_arguments; i++) {
            const fmoe_argument *a = &p->arguments[i];
            if (a->role == ROLE_INPUT || !a->data)
                continue;
            double error = is_float(a->dtype) ? float_error(a, limit, reason) : integer_error(a, reason);
            if (!(error <= worst)) {
                worst = error;
                memcpy(worst_reason, reason, sizeof reason);
            }
        }
    }
    if (why)
        memcpy(why, worst_reason, sizeof worst_reason);
    return worst;
}

/* ---- One checked run --------------------------------------------------------------------------------------------- */

/* A workspace of exactly `bytes`, 256-byte aligned, between two guard bands. Its contents are a NaN, so that a rung
 * that counts on zeros shows. */
fmoe_status workspace_new(size_t bytes, workspace *w) {
    *w = (workspace){.bytes = bytes};
    size_t total;
    if (__builtin_add_overflow(bytes, (size_t)2 * GUARD, &total) || !(w->block = allocate(ALIGN_WORKSPACE, total)))
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for a workspace of %zu bytes", bytes);
    w->memory = w->block + GUARD;
    memset(w->block, 0xa5, GUARD);
    memset(w->memory, 0xff, bytes);
    memset(w->memory + bytes, 0xa5, GUARD);
    return FMOE_OK;
}

static bool guard_broken(const unsigned char *guard, size_t *at) {
    for (*at = 0; *at < GUARD; ++*at)
        if (guard[*at] != 0xa5)
            return true;
    return false;
}

fmoe_status workspace_check(const workspace *w, char *why) {
    size_t at;
    if (guard_broken(w->memory + w->bytes, &at)) {
        snprintf(why, WHY, "wrote beyond its workspace of %zu bytes, at byte %zu", w->bytes, w->bytes + at);
        return fmoe_fail(FMOE_BAD_WORKSPACE, "%s", why);
    }
    if (guard_broken(w->block, &at)) {
        snprintf(why, WHY, "wrote before its workspace, %zu bytes ahead of it", (size_t)GUARD - at);
        return fmoe_fail(FMOE_BAD_WORKSPACE, "%s", why);
    }
    return FMOE_OK;
}

void workspace_free(workspace *w) {
    free(w->block);
    *w = (workspace){0};
}

fmoe_status rung_supports(const fmoe_rung *rung, const fmoe_problem *p, char *why) {
    const fmoe_device *gpu = rung->backend == BACKEND_CUDA ? fmoe_device_get() : NULL;
    if (gpu && !gpu->present)
        snprintf(why, WHY, "%s", gpu->why_not);
    else if (gpu && (int)rung->level > gpu->level)
        snprintf(why, WHY, "needs a newer GPU, or its code in this build");
    else if (rung->available && !rung->available())
        snprintf(why, WHY, "not available on this machine");
    else if (rung->supports && !rung->supports(p->args))
        snprintf(why, WHY, "does not support this case");
    else
        return FMOE_OK;
    return fmoe_fail(FMOE_UNSUPPORTED, "%s: %s", rung->name, why);
}

size_t rung_workspace(const fmoe_rung *rung, const fmoe_problem *p) {
    return rung->workspace ? rung->workspace(p->args) : 0;
}

fmoe_status fmoe_rung_check(const fmoe_rung *rung, fmoe_problem *p, double *error, char *why) {
    char local[WHY] = "";
    char *reason = why ? why : local;
    *reason = 0;
    *error = INFINITY;
    TRY(rung_supports(rung, p, reason));
    if (rung->backend == BACKEND_CUDA)
        return fmoe_device_rung_check(rung, p, error, reason);
    workspace w;
    fmoe_status status = workspace_new(rung_workspace(rung, p), &w);
    if (status == FMOE_OK) {
        fmoe_problem_poison(p);
        status = rung->run(p->args, w.memory, w.bytes, NULL);
    }
    if (status != FMOE_OK)
        snprintf(reason, WHY, "%s: %.150s", fmoe_status_name(status), fmoe_error_message());
    else if ((status = workspace_check(&w, reason)) == FMOE_OK)
        *error = fmoe_problem_error(p, reason);
    workspace_free(&w);
    return status;
}
