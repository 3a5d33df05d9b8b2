/* --dump and --verify: see verify.h. */
#include "verify.h"
#include "doors.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 2 * FMOE_MAX_ARGUMENTS, NAME = 64 };

static bool is_integer(fmoe_dtype dtype) {
    return dtype == FMOE_I32 || dtype == FMOE_I64;
}

/* ---- Which step, which case -------------------------------------------------------------------------------------- */

static const char *first_case(const fmoe_ladder *ladder) {
    return ladder->quick_cases ? ladder->quick_cases[0] : ladder->cases ? ladder->cases[0] : NULL;
}

/* The first ladder whose cases spell these sizes. */
static const fmoe_step *step_for(const fmoe_chapter *chapter, const char *case_name) {
    for (const fmoe_ladder *ladder = chapter->ladders; ladder && ladder->step; ladder++)
        if (!case_name || (first_case(ladder) && case_letters(first_case(ladder)) == case_letters(case_name)))
            return ladder->step;
    return NULL;
}

static const fmoe_step *step_named(const fmoe_chapter *chapter, const char *op) {
    for (const fmoe_ladder *ladder = chapter->ladders; ladder && ladder->step; ladder++)
        if (!strcmp(ladder->step->op, op))
            return ladder->step;
    return NULL;
}

static fmoe_status open_case(const fmoe_step *step, const char *name, uint64_t seed, verify_case *v) {
    fmoe_case c;
    TRY(fmoe_case_parse(name, &c));
    return verify_case_new(step, &c, seed, v);
}

static int complain(const char *option) {
    fprintf(stderr, "%s: %s\n", option, fmoe_error_message());
    return 2;
}

/* ---- Writing ----------------------------------------------------------------------------------------------------- */

typedef struct {
    int count;
    fmoe_tensor tensors[MOST];
    char names[MOST][NAME];
} tensor_list;

static void add(tensor_list *list, const char *prefix, const fmoe_argument *a, fmoe_dtype dtype, const void *data) {
    fmoe_tensor *t = &list->tensors[list->count];
    char *name = list->names[list->count++];
    snprintf(name, NAME, "%s%s", prefix, a->name);
    *t = (fmoe_tensor){.name = name, .dtype = dtype, .rank = a->rank, .count = a->count, .data = data};
    memcpy(t->shape, a->shape, (size_t)a->rank * sizeof *t->shape);
}

static void list_case(const verify_case *v, tensor_list *list) {
    const fmoe_problem *part;
    list->count = 0;
    for (int i = 0; i < v->count; i++)
        for (int k = 0; k < v->parts[i].num_arguments; k++) {
            const fmoe_argument *a = &v->parts[i].arguments[k];
            if (verify_is_input(v, i, a))
                add(list, "in.", a, a->dtype, a->role == ROLE_INOUT ? a->pristine : a->data);
        }
    for (int i = 0; i < v->count; i++)
        for (int k = 0; k < v->parts[i].num_arguments; k++) {
            const fmoe_argument *a = &v->parts[i].arguments[k];
            if (verify_find(v, a->name, true, &part) == a)
                add(list, "expected.", a, is_integer(a->dtype) ? a->dtype : FMOE_F32, a->expected);
        }
}

int verify_dump(const fmoe_chapter *chapter, const char *path, const char *case_name) {
    const fmoe_step *step = step_for(chapter, case_name);
    if (!step) {
        fprintf(stderr, "--dump: chapter %d has no step for %s\n", chapter->number, case_name ? case_name : "a case");
        return 2;
    }
    const char *name = case_name ? case_name : first_case(chapter->ladders);
    char seed[32], limit[32];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)fmoe_opt.seed);
    verify_case v;
    if (open_case(step, name, fmoe_opt.seed, &v) != FMOE_OK)
        return complain("--dump");
    snprintf(limit, sizeof limit, "%g", fmoe_error_limit(v.parts[0].c.dtype));
    const fmoe_metadata metadata[] = {{"step", step->op}, {"case", name}, {"seed", seed}, {"error_limit", limit}};
    tensor_list *list = malloc(sizeof *list);
    fmoe_status status = list ? FMOE_OK : fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for a list of tensors");
    if (status == FMOE_OK) {
        list_case(&v, list);
        make_folders(path);
        status = fmoe_file_write(path, list->count, list->tensors, 4, metadata);
    }
    if (status == FMOE_OK)
        printf("%s: %s at %s, seed %s, %d tensors\n", path, step->op, name, seed, list->count);
    free(list);
    verify_case_free(&v);
    return status == FMOE_OK ? 0 : complain("--dump");
}

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

#define BAD(...) fmoe_fail(FMOE_BAD_FILE, __VA_ARGS__)

static fmoe_status same_shape(const char *path, const fmoe_tensor *t, const fmoe_argument *a) {
    bool same = t->rank == a->rank;
    for (int i = 0; same && i < a->rank; i++)
        same = t->shape[i] == a->shape[i];
    char is[128] = "", should[128] = "";
    for (int i = 0; i < t->rank; i++)
        snprintf(is + strlen(is), sizeof is - strlen(is), "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    for (int i = 0; i < a->rank; i++)
        snprintf(should + strlen(should), sizeof should - strlen(should), "%s%lld", i ? ", " : "",
                 (long long)a->shape[i]);
    return same ? FMOE_OK : BAD("%s: tensor %s: its shape is [%s] and should be [%s]", path, t->name, is, should);
}

/* Inputs may be left out of a filled-in file; those that are there show that it belongs to the case. */
static fmoe_status check_input(const char *path, const fmoe_tensor *t, const fmoe_argument *a, const fmoe_case *c) {
    TRY(same_shape(path, t, a));
    const void *drawn = a->role == ROLE_INOUT ? a->pristine : a->data;
    if (t->dtype != a->dtype || memcmp(t->data, drawn, (size_t)a->count * fmoe_dtype_size(a->dtype)) != 0)
        return BAD("%s: tensor %s: not what %s has there: the file is of another case, another seed, or was changed",
                   path, t->name, c->name);
    return FMOE_OK;
}

static int64_t integer_at(const fmoe_tensor *t, int64_t i) {
    int64_t wide = 0;
    int32_t narrow;
    if (t->dtype == FMOE_I64) {
        memcpy(&wide, (const char *)t->data + 8 * i, 8);
        return wide;
    }
    memcpy(&narrow, (const char *)t->data + 4 * i, 4);
    return narrow;
}

static fmoe_status read_integers(const char *path, const fmoe_tensor *t, const fmoe_argument *a) {
    if (!is_integer(t->dtype))
        return BAD("%s: tensor %s: %s, and integers are expected", path, t->name, fmoe_dtype_name(t->dtype));
    for (int64_t i = 0; i < t->count; i++) {
        int64_t value = integer_at(t, i);
        if (value != (int32_t)value)
            return BAD("%s: tensor %s: element %lld = %lld does not fit 32 bits", path, t->name, (long long)i,
                       (long long)value);
        ((int32_t *)a->data)[i] = (int32_t)value;
    }
    return FMOE_OK;
}

/* Into the argument's own memory, rounded to its storage type where the file has it wider. */
static fmoe_status read_output(const fmoe_file *file, const char *path, const fmoe_tensor *t, const fmoe_argument *a) {
    TRY(same_shape(path, t, a));
    if (is_integer(a->dtype))
        return read_integers(path, t, a);
    if (is_integer(t->dtype))
        return BAD("%s: tensor %s: %s, and floats are expected", path, t->name, fmoe_dtype_name(t->dtype));
    float *values;
    TRY(fmoe_file_read_f32(file, t->name, t->rank, t->shape, &values));
    fmoe_from_f32(a->dtype, a->count, values, a->data);
    free(values);
    return FMOE_OK;
}

/* Until the file says otherwise, every output is as it should be. */
static void expect_all(const verify_case *v) {
    for (int i = 0; i < v->count; i++)
        for (int k = 0; k < v->parts[i].num_arguments; k++) {
            const fmoe_argument *a = &v->parts[i].arguments[k];
            if (a->role == ROLE_INPUT || !a->data)
                continue;
            if (is_integer(a->dtype))
                memcpy(a->data, a->expected, (size_t)a->count * fmoe_dtype_size(a->dtype));
            else
                fmoe_from_f32(a->dtype, a->count, a->expected, a->data);
        }
}

static bool starts_with(const char *text, const char *start) {
    return strncmp(text, start, strlen(start)) == 0;
}

static fmoe_status take_tensor(const fmoe_file *file, const char *path, const fmoe_tensor *t, const verify_case *v,
                               int *filled) {
    const fmoe_problem *part;
    const fmoe_argument *a = NULL;
    if (starts_with(t->name, "in.") && (a = verify_find(v, t->name + 3, false, &part)))
        return check_input(path, t, a, &part->c);
    if (starts_with(t->name, "expected.") && verify_find(v, t->name + 9, true, &part))
        return FMOE_OK;
    if (starts_with(t->name, "out.") && (a = verify_find(v, t->name + 4, true, &part))) {
        ++*filled;
        return read_output(file, path, t, a);
    }
    return BAD("%s: tensor %s: unknown; %s has no %s of that name", path, t->name, v->parts[0].c.name,
               starts_with(t->name, "in.") ? "input" : "result");
}

/* ---- Judging ----------------------------------------------------------------------------------------------------- */

static double error_of(const fmoe_problem *p, const fmoe_argument *a, double *limit) {
    *limit = fmoe_error_limit(p->step->error && a->dtype == FMOE_F32 ? FMOE_F32 : p->c.dtype);
    if (is_integer(a->dtype)) {
        *limit = 0;
        return memcmp(a->data, a->expected, (size_t)a->count * fmoe_dtype_size(a->dtype)) == 0 ? 0 : INFINITY;
    }
    float *values = fmoe_problem_f32(p, a->name);
    double error = values ? fmoe_relative_error(a->count, values, a->expected, a->natural_scale) : INFINITY;
    free(values);
    return error;
}

/* A line a tensor. A choice that differs within its rule is right, and so is what belongs to it. */
static bool judge(const fmoe_problem *p, const fmoe_argument *a) {
    char where[DOOR_TEXT], hint[DOOR_TEXT], why[200];
    double limit, error = error_of(p, a, &limit);
    bool ok = error <= limit;
    bool by_rule = !ok && p->step->error && fmoe_problem_error(p, why) <= fmoe_error_limit(p->c.dtype);
    printf("  %-20s %10.2e %10.2e  %s\n", a->name, error, limit,
           ok        ? "ok"
           : by_rule ? "ok: another choice of the same worth"
                     : "FAILED");
    if (ok || by_rule)
        return true;
    door_explain_tensor(p, a, where, hint);
    printf("    %s\n", where);
    if (*hint)
        printf("    hint: %s\n", hint);
    return false;
}

static bool judge_all(const fmoe_file *file, const verify_case *v) {
    const fmoe_problem *part;
    char missing[400] = "";
    bool right = true;
    printf("  %-20s %10s %10s\n", "tensor", "error", "limit");
    for (int i = 0; i < v->count; i++)
        for (int k = 0; k < v->parts[i].num_arguments; k++) {
            const fmoe_argument *a = &v->parts[i].arguments[k];
            char name[NAME];
            snprintf(name, sizeof name, "out.%s", a->name);
            if (verify_find(v, a->name, true, &part) != a)
                continue;
            if (fmoe_file_find(file, name))
                right &= judge(part, a);
            else
                snprintf(missing + strlen(missing), sizeof missing - strlen(missing), "%s%s", *missing ? ", " : "",
                         name);
        }
    if (*missing)
        printf("  not filled in: %s\n", missing);
    printf("\n%s\n", right ? "Every result that was filled in is within its limit."
                           : "A result is over its limit: see FAILED above.");
    return right;
}

/* ---- The file ---------------------------------------------------------------------------------------------------- */

/* save_file of the Python packages drops the metadata unless it is handed on, so --case may stand in for it. */
static fmoe_status identify(const fmoe_chapter *chapter, const fmoe_file *file, const char *path, const char *given,
                            verify_case *v) {
    const char *op = fmoe_file_metadata(file, "step"), *name = fmoe_file_metadata(file, "case");
    const char *seed = fmoe_file_metadata(file, "seed");
    if (!name && !given)
        return BAD("%s: its metadata names no case; --case NAME (and --seed) can say which one it is", path);
    if (name && given && strcmp(name, given) != 0)
        return BAD("%s: its metadata says case %.90s, --case says %.90s", path, name, given);
    name = name ? name : given;
    const fmoe_step *step = op ? step_named(chapter, op) : step_for(chapter, name);
    if (!step)
        return BAD("%s: %.40s at %.90s is no step of chapter %d", path, op ? op : "what is computed", name,
                   chapter->number);
    char *end = NULL;
    errno = 0;
    uint64_t number = seed ? strtoull(seed, &end, 10) : fmoe_opt.seed;
    if (seed && (end == seed || *end || errno))
        return BAD("%s: metadata seed = \"%.40s\" is not a number", path, seed);
    return open_case(step, name, number, v);
}

static int verify_open(const fmoe_chapter *chapter, const fmoe_file *file, const char *path, const char *case_name) {
    verify_case v;
    if (identify(chapter, file, path, case_name, &v) != FMOE_OK)
        return complain("--verify");
    int filled = 0;
    fmoe_status status = FMOE_OK;
    expect_all(&v);
    for (int64_t i = 0; i < fmoe_file_count(file) && status == FMOE_OK; i++)
        status = take_tensor(file, path, fmoe_file_tensor(file, i), &v, &filled);
    if (status == FMOE_OK && filled == 0)
        status = BAD("%s: no tensor out.NAME: nothing is filled in", path);
    bool right = false;
    if (status == FMOE_OK) {
        printf("%s: %s at %s\n", path, v.step->op, v.parts[0].c.name);
        right = judge_all(file, &v);
    }
    verify_case_free(&v);
    if (status != FMOE_OK)
        return complain("--verify");
    return right ? 0 : 1;
}

int verify_file(const fmoe_chapter *chapter, const char *path, const char *case_name) {
    fmoe_file *file;
    if (fmoe_file_open(path, &file) != FMOE_OK)
        return complain("--verify");
    int status = verify_open(chapter, file, path, case_name);
    fmoe_file_close(file);
    return status;
}
