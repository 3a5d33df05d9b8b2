/* Cases by name, random numbers that depend on nothing but their number, and routing as a case describes it. */
#include "program.h"

#include "../ref_cpu/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Names ------------------------------------------------------------------------------------------------------- */

static const char size_letters[] = "TdINnK";

static int64_t *size_of(fmoe_case *c, char letter) {
    switch (letter) {
    case 'T':
        return &c->T;
    case 'd':
        return &c->d;
    case 'I':
        return &c->I;
    case 'N':
        return &c->N;
    case 'n':
        return &c->n;
    default:
        return &c->K;
    }
}

static bool is_digit(char ch) {
    return ch >= '0' && ch <= '9';
}

static bool is_size(const char *word) {
    return word[0] && strchr(size_letters, word[0]) && is_digit(word[1]);
}

static fmoe_status parse_size(const char *name, const char *word, fmoe_case *c, unsigned *seen) {
    unsigned bit = 1u << (strchr(size_letters, word[0]) - size_letters);
    if (*seen & bit)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s' gives %c twice", name, word[0]);
    *seen |= bit;
    int64_t value = 0;
    for (const char *digit = word + 1; *digit; digit++) {
        if (!is_digit(*digit))
            return fmoe_fail(FMOE_BAD_SIZE, "case '%s': '%s' is a size with something after its digits", name, word);
        if (value > (INT64_MAX - (*digit - '0')) / 10)
            return fmoe_fail(FMOE_BAD_SIZE, "case '%s': '%s' exceeds 2^63 - 1", name, word);
        value = 10 * value + (*digit - '0');
    }
    if (value == 0 && word[0] != 'T')
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s': %c is 0, only T may be", name, word[0]);
    *size_of(c, word[0]) = value;
    return FMOE_OK;
}

/* The words a name may hold besides its sizes. Two of the same kind contradict each other. */
enum { WORD_ROUTING, WORD_DTYPE, WORD_TRAIN, WORD_NORM };
static const struct {
    const char *word;
    int kind, value;
} words[] = {
    {"uniform", WORD_ROUTING, ROUTING_UNIFORM},
    {"normal", WORD_ROUTING, ROUTING_NORMAL},
    {"trained", WORD_ROUTING, ROUTING_TRAINED},
    {"hot", WORD_ROUTING, ROUTING_HOT},
    {"f32", WORD_DTYPE, FMOE_F32},
    {"f16", WORD_DTYPE, FMOE_F16},
    {"bf16", WORD_DTYPE, FMOE_BF16},
    {"train", WORD_TRAIN, 1},
    {"norm", WORD_NORM, 1},
};

static fmoe_status parse_word(const char *name, const char *word, fmoe_case *c, unsigned *seen) {
    size_t i = 0;
    while (i < sizeof words / sizeof words[0] && strcmp(words[i].word, word))
        i++;
    if (i == sizeof words / sizeof words[0])
        return fmoe_fail(FMOE_BAD_SIZE,
                         "case '%s': '%s' is neither a size (T, d, I, N, n or K and a number) nor one of uniform, "
                         "normal, trained, hot, f32, f16, bf16, train, norm",
                         name, word);
    if (*seen & 1u << words[i].kind)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s': '%s' comes after another word of its kind", name, word);
    *seen |= 1u << words[i].kind;
    switch (words[i].kind) {
    case WORD_ROUTING:
        c->routing = (fmoe_routing)words[i].value;
        break;
    case WORD_DTYPE:
        c->dtype = (fmoe_dtype)words[i].value;
        break;
    case WORD_TRAIN:
        c->training = true;
        break;
    default:
        c->norm_topk_prob = true;
    }
    return FMOE_OK;
}

fmoe_status fmoe_case_parse(const char *name, fmoe_case *c) {
    *c = (fmoe_case){0};
    if (!name)
        return fmoe_fail(FMOE_NULL_POINTER, "case name is NULL");
    if (strlen(name) >= sizeof c->name)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%.40s...' has %zu characters, the limit is %zu", name, strlen(name),
                         sizeof c->name - 1);
    if (!*name)
        return fmoe_fail(FMOE_BAD_SIZE, "case name is empty");
    strcpy(c->name, name);
    unsigned sizes_seen = 0, words_seen = 0;
    char buffer[sizeof c->name];
    strcpy(buffer, name);
    for (char *word = buffer, *next; word; word = next) {
        next = strchr(word, '-');
        if (next)
            *next++ = 0;
        TRY(is_size(word) ? parse_size(name, word, c, &sizes_seen) : parse_word(name, word, c, &words_seen));
    }
    if (!c->n)
        c->n = fmoe_num_keys(c->N);
    else if (c->N && c->n > fmoe_num_keys(c->N))
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s': n² = %lld² exceeds N = %lld", name, (long long)c->n,
                         (long long)c->N);
    return FMOE_OK;
}

unsigned case_letters(const char *name) {
    unsigned seen = 0;
    for (const char *word = name; word; word = strchr(word, '-')) {
        word += *word == '-';
        if (is_size(word))
            seen |= 1u << (strchr(size_letters, *word) - size_letters);
    }
    return seen;
}

/* ---- Random numbers ---------------------------------------------------------------------------------------------- */

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit. */
static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* splitmix64's step, 2^64 divided by the golden ratio: state i of the sequence that starts at a key is key + i·STEP. */
#define STEP 0x9e3779b97f4a7c15u

static uint64_t key_of(uint64_t seed, uint64_t stream) {
    return mix(mix(seed + STEP) ^ (stream + 1) * STEP);
}

uint64_t fmoe_random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    return mix(key_of(seed, stream) + (index + 1) * STEP);
}

/* The top 23 bits and a half: symmetric, and neither 0 nor 1 after rounding to float32. */
float fmoe_random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return ((float)(fmoe_random_bits(seed, stream, index) >> 41) + 0.5f) * 0x1p-23f;
}

/* Box and Muller (1958): two uniform numbers make two normal ones. Numbers 2·pair and 2·pair + 1. */
static void normal_pair(uint64_t key, uint64_t pair, double out[2]) {
    double radius = ((double)(mix(key + (2 * pair + 1) * STEP) >> 12) + 0.5) * 0x1p-52;
    double angle = (double)(mix(key + (2 * pair + 2) * STEP) >> 12) * 0x1p-52;
    radius = sqrt(-2 * log(radius));
    angle *= 2 * M_PI;
    out[0] = radius * cos(angle);
    out[1] = radius * sin(angle);
}

float fmoe_random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    double pair[2];
    normal_pair(key_of(seed, stream), index / 2, pair);
    return (float)pair[index % 2];
}

void fmoe_fill_normal(uint64_t seed, uint64_t stream, float scale, int64_t count, float *values) {
    uint64_t key = key_of(seed, stream);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i += 2) {
        double pair[2];
        normal_pair(key, (uint64_t)i / 2, pair);
        values[i] = scale * (float)pair[0];
        if (i + 1 < count)
            values[i + 1] = scale * (float)pair[1];
    }
}

/* ---- Routing ----------------------------------------------------------------------------------------------------- */

/* Streams of their own, away from the small numbers that steps draw their tensors with. */
enum { STREAM_LOGITS = 1000001, STREAM_INDICES, STREAM_WEIGHTS };

#define TRAINED_FILE "tests/golden/trained_logits_16384_layer0.safetensors"
enum { TRAINED_T = 4096, TRAINED_N = 128 };

/* The first T tokens of the trained model's logits. */
static fmoe_status trained_logits(const fmoe_case *c, float *logits) {
    if (c->T > TRAINED_T || c->n != TRAINED_N)
        return fmoe_fail(
            FMOE_BAD_SIZE,
            "case '%s': trained routing has T ≤ %d tokens and n = %d keys (N = %d), not T = %lld, n = %lld", c->name,
            TRAINED_T, TRAINED_N, TRAINED_N * TRAINED_N, (long long)c->T, (long long)c->n);
    fmoe_file *file;
    TRY(fmoe_file_open(TRAINED_FILE, &file));
    float *all = NULL;
    const int64_t shape[] = {2, TRAINED_T, TRAINED_N};
    fmoe_status status = fmoe_file_read_f32(file, "router_logits", 3, shape, &all);
    if (status == FMOE_OK)
        for (int side = 0; side < 2; side++)
            memcpy(logits + side * c->T * c->n, all + side * TRAINED_T * TRAINED_N,
                   (size_t)(c->T * c->n) * sizeof *logits);
    free(all);
    fmoe_file_close(file);
    return status;
}

fmoe_status fmoe_case_logits(const fmoe_case *c, uint64_t seed, float *logits) {
    if (c->n < 1)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s' gives neither n nor N", c->name);
    if (c->routing == ROUTING_TRAINED)
        return trained_logits(c, logits);
    if (c->routing != ROUTING_NORMAL)
        return fmoe_fail(FMOE_UNSUPPORTED, "case '%s': only normal and trained routing have logits", c->name);
    fmoe_fill_normal(seed, STREAM_LOGITS, 1, 2 * c->T * c->n, logits);
    return FMOE_OK;
}

/* By the router itself: the top-k of the case's logits. */
static fmoe_status route_by_logits(const fmoe_case *c, uint64_t seed, int32_t *indices, float *weights) {
    int64_t bytes;
    if (__builtin_mul_overflow(c->T, 2 * (int64_t)sizeof(float), &bytes) || __builtin_mul_overflow(bytes, c->n, &bytes))
        return fmoe_fail(FMOE_OVERFLOW, "case '%s': 2·T·n overflows", c->name);
    float *logits = malloc(bytes ? (size_t)bytes : 1);
    if (!logits)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for %lld bytes of router logits", (long long)bytes);
    fmoe_status status = fmoe_case_logits(c, seed, logits);
    if (status == FMOE_OK)
        status = fmoe_topk(c->T, c->n, c->K, c->norm_topk_prob, logits, indices, NULL, weights);
    free(logits);
    return status;
}

fmoe_status fmoe_case_route(const fmoe_case *c, uint64_t seed, int32_t *indices, float *weights) {
    if (c->K < 1)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s' does not give K", c->name);
    if (c->routing == ROUTING_NONE)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s' names no routing (uniform, normal, trained or hot)", c->name);
    if (c->routing == ROUTING_NORMAL || c->routing == ROUTING_TRAINED)
        return route_by_logits(c, seed, indices, weights);
    int64_t N = c->N ? c->N : c->n * c->n;
    if (N < 1 || N > INT32_MAX)
        return fmoe_fail(FMOE_BAD_SIZE, "case '%s': N = %lld is outside [1, 2^31)", c->name, (long long)N);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < c->T * c->K; i++) {
        uint64_t high = fmoe_random_bits(seed, STREAM_INDICES, (uint64_t)i) >> 32;
        indices[i] = (int32_t)(high * (uint64_t)N >> 32);
        weights[i] = fmoe_random_uniform(seed, STREAM_WEIGHTS, (uint64_t)i) / (float)c->K;
    }
    if (c->routing == ROUTING_HOT)
        for (int64_t t = 0; t < c->T; t++)
            indices[t * c->K] = 0;
    return FMOE_OK;
}
