/* Chapter 0: storage types, the error measure, cases, random numbers, routing, the check of a rung, the chapters'
 * program. What every other sentence and every figure rests on. */
#include "../chapters/device.h"
#include "../chapters/program.h"
#include "values.h"

#include <ctype.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Storage types ----------------------------------------------------------------------------------------------- */

typedef struct {
    fmoe_dtype dtype;
    int mantissa_bits, exponent_bits;
} format;

static const format formats[] = {{FMOE_F16, 10, 5}, {FMOE_BF16, 7, 8}};

static int infinity_of(const format *f) {
    return ((1 << f->exponent_bits) - 1) << f->mantissa_bits;
}

/* IEEE 754's definition of a non-negative value from its bits. Infinity's bits give the value that would come next. */
static double value_of(const format *f, int bits) {
    int exponent = bits >> f->mantissa_bits, mantissa = bits & ((1 << f->mantissa_bits) - 1);
    int bias = (1 << (f->exponent_bits - 1)) - 1;
    if (exponent == 0)
        return ldexp(mantissa, 1 - bias - f->mantissa_bits);
    return ldexp(mantissa + (1 << f->mantissa_bits), exponent - bias - f->mantissa_bits);
}

static float widened(const format *f, uint16_t bits) {
    float value;
    fmoe_to_f32(f->dtype, 1, &bits, &value);
    return value;
}

static uint16_t narrowed(const format *f, double value) {
    float single = (float)value;
    uint16_t bits;
    fmoe_from_f32(f->dtype, 1, &single, &bits);
    return bits;
}

SENTENCE(0, 1, "Every float16 and bfloat16 value is converted to float32 exactly.", "both are subsets of float32",
         "IEEE 754's definition, with ldexp, on all 65,536 patterns") {
    for (int i = 0; i < 2; i++) {
        const format *f = &formats[i];
        for (int bits = 0; bits < 0x10000; bits++) {
            float got = widened(f, (uint16_t)bits);
            int magnitude = bits & 0x7fff;
            double expected = magnitude == infinity_of(f) ? INFINITY : value_of(f, magnitude);
            if (magnitude > infinity_of(f))
                expect(isnan(got), "%s 0x%04x is %g, not a NaN", fmoe_dtype_name(f->dtype), bits, got);
            else
                expect(got == (bits & 0x8000 ? -expected : expected) && !signbit(got) == !(bits & 0x8000),
                       "%s 0x%04x is %g and should be %s%g", fmoe_dtype_name(f->dtype), bits, got,
                       bits & 0x8000 ? "-" : "", expected);
        }
    }
}

/* Rounds `value` and its negative. */
static void expect_rounded(const format *f, double value, int bits) {
    for (int sign = 0; sign < 2; sign++) {
        uint16_t got = narrowed(f, sign ? -value : value), expected = (uint16_t)(bits | sign << 15);
        expect(got == expected, "%s of %s%.9g is 0x%04x and should be 0x%04x", fmoe_dtype_name(f->dtype),
               sign ? "-" : "", value, got, expected);
    }
}

SENTENCE(0, 2, "A conversion to 16 bits picks the nearest value, and the even one of two that are equally near.",
         "round once, at the store, and never twice in one direction",
         "the midpoints of all neighbouring values and the float32 on either side of them") {
    for (int i = 0; i < 2; i++) {
        const format *f = &formats[i];
        for (int bits = 0; bits < infinity_of(f); bits++) {
            float middle = (float)(0.5 * (value_of(f, bits) + value_of(f, bits + 1)));
            expect_rounded(f, value_of(f, bits), bits);
            expect_rounded(f, nextafterf(middle, 0), bits);
            expect_rounded(f, middle, bits + (bits & 1));
            expect_rounded(f, nextafterf(middle, INFINITY), bits + 1);
        }
    }
}

#if defined(__FLT16_MAX__) && !defined(__clang__)
static void expect_compilers_rounding(float value) {
    _Float16 half = (_Float16)value;
    uint16_t expected, got = narrowed(&formats[0], value);
    memcpy(&expected, &half, sizeof expected);
    expect(got == expected || isnan(value), "f16 of %.9g is 0x%04x, the compiler says 0x%04x", value, got, expected);
}
#else
static void expect_compilers_rounding(float value) { /* this compiler has no type to compare with */
    expect(!isnan(value) || isnan(widened(&formats[0], narrowed(&formats[0], value))), "NaN became a number");
}
#endif

SENTENCE(0, 3,
         "What lies beyond the largest value becomes infinity, NaN stays NaN, and any other float32 rounds right.",
         "an overflow must show", "the definition, and the compiler's own float16") {
    for (int i = 0; i < 2; i++) {
        const format *f = &formats[i];
        expect_rounded(f, INFINITY, infinity_of(f));
        expect_rounded(f, 3.4e38 + 0x1p103, infinity_of(f)); /* within a thousandth of float32's largest */
        for (int sign = 0; sign < 2; sign++)
            for (int payload = 1; payload < 1 << 23; payload = 2 * payload + 1) {
                uint32_t pattern = (uint32_t)sign << 31 | 0x7f800000u | (uint32_t)payload;
                float nan;
                memcpy(&nan, &pattern, sizeof nan);
                uint16_t bits;
                fmoe_from_f32(f->dtype, 1, &nan, &bits);
                expect(isnan(widened(f, bits)), "a NaN with payload %d became %g in %s", payload, widened(f, bits),
                       fmoe_dtype_name(f->dtype));
            }
    }
    uint64_t seed = fresh_seed();
    for (uint64_t i = 0; i < 100000; i++) {
        uint32_t pattern = (uint32_t)fmoe_random_bits(seed, 0, i);
        float value;
        memcpy(&value, &pattern, sizeof value);
        expect_compilers_rounding(value);
    }
}

/* ---- Error ------------------------------------------------------------------------------------------------------- */

static const char *error_is_relative_norm(const int64_t *size, uint64_t seed) {
    int64_t count = size[0];
    float *ref OWNED = floats(count), *out OWNED = floats(count);
    long double difference = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        ref[i] = fmoe_random_normal(seed, 1, (uint64_t)i);
        out[i] = ref[i] + 1e-3f * fmoe_random_normal(seed, 2, (uint64_t)i);
        long double d = (long double)out[i] - ref[i];
        difference += d * d;
        norm += (long double)ref[i] * ref[i];
    }
    double expected = (double)sqrtl(difference / norm), got = fmoe_relative_error(count, out, ref, 0);
    double same = fmoe_relative_error(count, ref, ref, 0);
    if (!(fabs(got - expected) <= 1e-9 * expected))
        return because("%lld elements: error %.12g, the definition says %.12g", (long long)count, got, expected);
    if (same != 0)
        return because("a tensor is %g from itself", same);
    return HOLDS;
}

SENTENCE(0, 4, "The error is ‖out − ref‖ / ‖ref‖ over the whole tensor.", "one figure a tensor, the same everywhere",
         "the definition in long double") {
    for_sizes("count", error_is_relative_norm, SIZES({1}, {2}, {7}, {1000}, {100003}));
    float none = 0;
    expect(fmoe_relative_error(0, &none, &none, 0) == 0, "an empty tensor has an error");
}

SENTENCE(0, 5, "A NaN that only one side has is an infinite error; a NaN on both sides is none.",
         "a comparison with NaN is false, so a careless measure passes it", "closed form") {
    float nan[] = {1, NAN, 3}, number[] = {1, 2, 3}, other[] = {1, NAN, 6}, infinite[] = {1, INFINITY, 3};
    expect(isinf(fmoe_relative_error(3, nan, number, 0)), "a NaN in out passes");
    expect(isinf(fmoe_relative_error(3, number, nan, 0)), "a NaN in ref passes");
    expect(fmoe_relative_error(3, nan, nan, 0) == 0, "NaN on both sides has error %g",
           fmoe_relative_error(3, nan, nan, 0));
    expect(fabs(fmoe_relative_error(3, other, nan, 0) - 3 / sqrt(10)) < 1e-12, "numbers beside a NaN do not count");
    double error = fmoe_relative_error(3, infinite, number, 0);
    expect(!(error <= fmoe_error_limit(FMOE_BF16)), "an infinity in out has error %g", error);
}

SENTENCE(0, 6, "A result that cancels to nothing is measured against the terms it was summed from.",
         "rounding noise over nearly zero says nothing", "closed form") {
    float out[] = {3e-8f, 4e-8f}, zero[] = {0, 0}, small[] = {6e-7f, 8e-7f}, large[] = {6e-6f, 8e-6f};
    double error = fmoe_relative_error(2, out, zero, 1);
    expect(fabs(error - 5e-8) < 1e-14, "against zero, scale 1: %g, not 5e-8", error);
    error = fmoe_relative_error(2, out, zero, 10);
    expect(fabs(error - 5e-9) < 1e-15, "against zero, scale 10: %g, not 5e-9", error);
    error = fmoe_relative_error(2, out, small, 2);
    expect(fabs(error - 2.5e-8) < 1e-14, "‖ref‖ = 1e-6, scale 2: %g, not ‖out‖ / 2", error);
    error = fmoe_relative_error(2, out, large, 2);
    expect(fabs(error - 0.995) < 1e-6, "‖ref‖ = 1e-5, scale 2: %g, not relative to ref", error);
    expect(fmoe_error_limit(FMOE_F32) == 1e-5 && fmoe_error_limit(FMOE_F16) == 6e-4 &&
               fmoe_error_limit(FMOE_BF16) == 4e-3,
           "the limits are not 1e-5, 6e-4 and 4e-3");
}

/* x side 0 to n−1, y side n times that: every pair has a sum of its own, its index in a shuffled order. */
static const char *sets_are_compared(const int64_t *size, uint64_t seed) {
    int64_t T = size[0], n = size[1], K = size[2];
    if (K >= n * n)
        return DOES_NOT_APPLY;
    float *logits OWNED = floats(2 * T * n);
    int32_t *a OWNED = integers(T * K), *b OWNED = integers(T * K);
    int64_t turn = (int64_t)(fmoe_random_bits(seed, 0, 0) % (uint64_t)n);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t i = 0; i < n; i++) {
            logits[t * n + i] = (float)((i + turn) % n);
            logits[(T + t) * n + i] = (float)(n * ((i + turn + t) % n));
        }
        for (int64_t k = 0; k < K; k++) {
            int64_t sum = n * n - 1 - k, i = (sum % n - turn + n) % n, j = ((sum / n - turn - t) % n + n) % n;
            a[t * K + k] = (int32_t)(i * n + j);
            b[t * K + (k + 1) % K] = a[t * K + k];
        }
    }
    int64_t same = fmoe_compare_indices(T, n, K, logits, a, b);
    /* The last token's best pair gives way to the one after the K-th. */
    int64_t sum = n * n - 1 - K, i = (sum % n - turn + n) % n, j = ((sum / n - turn - (T - 1)) % n + n) % n;
    a[(T - 1) * K] = (int32_t)(i * n + j);
    int64_t wrong = fmoe_compare_indices(T, n, K, logits, a, b), swapped = fmoe_compare_indices(T, n, K, logits, b, a);
    if (same != -1)
        return because("token %lld is refused though only the order differs", (long long)same);
    if (wrong != T - 1 || swapped != T - 1)
        return because("a wrong pair in token %lld: compared one way %lld is refused, the other way %lld",
                       (long long)(T - 1), (long long)wrong, (long long)swapped);
    return HOLDS;
}

SENTENCE(0, 7, "Choices are compared as sets, and pairs may differ only where they nearly tie with the K-th.",
         "equal scores may come in any order, but nothing else may", "grids whose order is known") {
    for_sizes("T n K", sets_are_compared, SIZES({1, 2, 1}, {2, 3, 4}, {5, 8, 7}, {3, 13, 168}, {4, 20, 399}));
    const int32_t best[] = {2}, second[] = {0};
    float near[] = {0, 8e-6f, 0, -1}, apart[] = {0, 3e-5f, 0, -1}, large[] = {0, 3e-5f, 0, -100};
    const int32_t twice[] = {2, 2}, both[] = {2, 0}, outside[] = {2, 4};
    expect(fmoe_compare_indices(1, 2, 1, near, second, best) == -1, "a gap of 8e-6 is refused");
    expect(fmoe_compare_indices(1, 2, 2, near, both, both) == -1, "a choice is refused by itself");
    expect(fmoe_compare_indices(1, 2, 2, near, twice, both) == 0, "a pair chosen twice is accepted");
    expect(fmoe_compare_indices(1, 2, 2, near, outside, both) == 0, "an index of 4 with n = 2 is accepted");
    expect(fmoe_compare_indices(1, 2, 1, apart, second, best) == 0, "a gap of 3e-5 is accepted");
    expect(fmoe_compare_indices(1, 2, 1, large, second, best) == -1, "a gap of 3e-5 beside a logit of 100 is refused");
}

/* ---- Cases ------------------------------------------------------------------------------------------------------- */

static const char *name_is_read(const int64_t *size, uint64_t seed) {
    static const char letters[] = "TdINK";
    static const char *const routings[] = {"", "-uniform", "-normal", "-trained", "-hot"};
    static const char *const dtypes[] = {"-f32", "-f16", "-bf16"};
    uint64_t draw = fmoe_random_bits(seed, 0, 0);
    int routing = (int)(draw % 5), dtype = (int)(draw / 5 % 3), first = (int)(draw / 15 % 5);
    bool train = draw / 75 % 2, norm = draw / 150 % 2;
    char name[96] = "";
    for (int i = 0; i < 5; i++) {
        int s = (first + i) % 5;
        snprintf(name + strlen(name), sizeof name - strlen(name), "%s%c%lld", i ? "-" : "", letters[s],
                 (long long)size[s]);
    }
    snprintf(name + strlen(name), sizeof name - strlen(name), "%s%s%s%s", train ? "-train" : "", routings[routing],
             dtypes[dtype], norm ? "-norm" : "");
    fmoe_case c;
    if (fmoe_case_parse(name, &c) != FMOE_OK)
        return because("%s is refused: %s", name, fmoe_error_message());
    if (c.T != size[0] || c.d != size[1] || c.I != size[2] || c.N != size[3] || c.K != size[4] || strcmp(c.name, name))
        return because("%s is read as T%lld d%lld I%lld N%lld K%lld", name, (long long)c.T, (long long)c.d,
                       (long long)c.I, (long long)c.N, (long long)c.K);
    if ((int)c.routing != routing || (int)c.dtype != dtype || c.training != train || c.norm_topk_prob != norm)
        return because("%s: a word is read as another one", name);
    if (c.n * c.n > c.N || (c.n + 1) * (c.n + 1) <= c.N)
        return because("%s: n = %lld is not floor(sqrt(N))", name, (long long)c.n);
    return HOLDS;
}

SENTENCE(0, 8, "A case name says its sizes, routing, type and mode, in any order.",
         "the name is all that a recorded figure keeps of its case", "names written from known sizes") {
    const int64_t low[] = {0, 1, 1, 1, 1}, high[] = {100000, 8192, 30000, 2000000, 5000};
    for_random_sizes("T d I N K", name_is_read, 500, low, high);
    fmoe_case c;
    expect(fmoe_case_parse("K6-n13-T29-normal-bf16", &c) == FMOE_OK && c.n == 13 && c.N == 0,
           "n13 without N is n = %lld, N = %lld", (long long)c.n, (long long)c.N);
    expect(fmoe_case_parse("T1-N170-n13", &c) == FMOE_OK && c.n == 13 && c.N == 170, "N170-n13 is refused: %s",
           fmoe_error_message());
}

SENTENCE(0, 9, "A name that cannot be read is refused, and the message quotes what is wrong with it.",
         "a mistyped case must not be timed as another one", "names with one mistake each") {
    static const struct {
        const char *name, *quoted;
    } bad[] = {
        {"T16-K4-normall", "'normall'"},
        {"T16-Q4", "'Q4'"},
        {"T16-T17", "T twice"},
        {"T16-K4x", "'K4x'"},
        {"T16-K", "'K'"},
        {"T16-K-4", "'K'"},
        {"T16--K4", "''"},
        {"T16-K4-", "''"},
        {"", "empty"},
        {"T16-d0", "d is 0"},
        {"T9223372036854775808", "2^63"},
        {"T99999999999999999999999", "2^63"},
        {"T16-f32-bf16", "'bf16'"},
        {"T16-normal-hot", "'hot'"},
        {"T16-norm-norm", "'norm'"},
        {"T16-N168-n13", "exceeds N"},
        {"T16-d1234567890123456789-I1234567890123456789-N1234567890123456789-K1234567890123456789-n1-normal", "95"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        fmoe_case c;
        expect(fmoe_case_parse(bad[i].name, &c) == FMOE_BAD_SIZE, "'%s' is accepted", bad[i].name);
        expect(strstr(fmoe_error_message(), bad[i].quoted), "'%s': the message lacks %s: %s", bad[i].name,
               bad[i].quoted, fmoe_error_message());
    }
    fmoe_case c;
    expect(fmoe_case_parse("T9223372036854775807", &c) == FMOE_OK, "2^63 - 1 is refused");
}

/* ---- Random numbers ---------------------------------------------------------------------------------------------- */

static const char *fill_is_its_numbers(const int64_t *size, uint64_t seed) {
    int64_t count = size[0];
    float *values OWNED = floats(count + 1);
    values[count] = 42;
    omp_set_num_threads((int)size[1]);
    fmoe_fill_normal(seed, 5, 0.5f, count, values);
    for (int64_t i = 0; i < count; i++)
        if (values[i] != 0.5f * fmoe_random_normal(seed, 5, (uint64_t)i))
            return because("number %lld of a fill by %lld threads is not random_normal's", (long long)i,
                           (long long)size[1]);
    if (values[count] != 42)
        return because("the fill goes on after its last number");
    return HOLDS;
}

SENTENCE(0, 10, "A random number depends on its seed, stream and index, and on nothing else.",
         "the same problem on any machine with any number of threads",
         "numbers drawn one at a time; counting coincidences") {
    for_sizes("count threads", fill_is_its_numbers,
              SIZES({1, 1}, {2, 2}, {1001, 1}, {1001, 2}, {1001, 3}, {1001, 7}, {4096, 5}));
    uint64_t seed = fresh_seed();
    int64_t same[4] = {0};
    for (uint64_t i = 0; i < 10000; i++) {
        uint64_t bits = fmoe_random_bits(seed, 3, i);
        same[0] += bits == fmoe_random_bits(seed, 4, i);
        same[1] += bits == fmoe_random_bits(seed + 1, 3, i);
        same[2] += bits == fmoe_random_bits(seed, 3, i + 1);
        same[3] += bits == fmoe_random_bits(seed + 1, 2, i) || bits == fmoe_random_bits(seed, 2, i + 1);
    }
    static const char *const what[] = {"stream", "seed", "index", "combination"};
    for (int i = 0; i < 4; i++)
        expect(same[i] == 0, "%lld of 10,000 numbers are the same in another %s", (long long)same[i], what[i]);
}

SENTENCE(0, 11, "Uniform numbers fill (0, 1) evenly; normal ones have mean 0, variance 1 and a normal's tails.",
         "routing and rounding depend on the distribution", "the moments, within five standard errors") {
    enum { COUNT = 1000000 };
    uint64_t seed = fresh_seed();
    double mean = 0, square = 0, fourth = 0, uniform_mean = 0, product = 0, last = 0;
    int64_t bins[16] = {0}, beyond_two = 0;
    for (uint64_t i = 0; i < COUNT; i++) {
        double u = fmoe_random_uniform(seed, 1, i), x = fmoe_random_normal(seed, 2, i);
        expect(u > 0 && u < 1, "uniform number %llu is %g", (unsigned long long)i, u);
        bins[(int)(16 * u)]++;
        uniform_mean += u / COUNT;
        mean += x / COUNT;
        square += x * x / COUNT;
        fourth += x * x * x * x / COUNT;
        product += x * last / COUNT;
        last = x;
        beyond_two += fabs(x) > 2;
    }
    double error = 5 / sqrt(COUNT);
    expect(fabs(uniform_mean - 0.5) < error * sqrt(1 / 12.), "uniform mean %g", uniform_mean);
    for (int i = 0; i < 16; i++)
        expect(fabs((double)bins[i] / COUNT - 1 / 16.) < error * sqrt(15) / 16, "bin %d of 16 holds %lld of %d", i,
               (long long)bins[i], COUNT);
    expect(fabs(mean) < error, "normal mean %g", mean);
    expect(fabs(square - 1) < error * sqrt(2), "normal variance %g", square);
    expect(fabs(fourth - 3) < error * sqrt(96), "normal fourth moment %g, not 3", fourth);
    expect(fabs(product) < error, "a number and the next correlate by %g", product);
    expect(fabs((double)beyond_two / COUNT - 0.0455003) < error * 0.21, "%lld of %d beyond two standard deviations",
           (long long)beyond_two, COUNT);
}

/* ---- Routing ----------------------------------------------------------------------------------------------------- */

static const char *flat_routing(const int64_t *size, uint64_t seed, bool hot) {
    int64_t T = size[0], N = size[1], K = size[2], pairs = T * K, counts[64] = {0};
    int32_t *indices OWNED = integers(pairs);
    float *weights OWNED = floats(pairs);
    char name[96];
    snprintf(name, sizeof name, "T%lld-N%lld-K%lld-%s", (long long)T, (long long)N, (long long)K,
             hot ? "hot" : "uniform");
    fmoe_case c;
    CALL(fmoe_case_parse(name, &c));
    CALL(fmoe_case_route(&c, seed, indices, weights));
    for (int64_t i = 0; i < pairs; i++) {
        if (indices[i] < 0 || indices[i] >= N)
            return because("%s: index %d", name, indices[i]);
        if (!(weights[i] > 0 && weights[i] < 1.0 / (double)K))
            return because("%s: weight %g of pair %lld is outside (0, 1/K)", name, weights[i], (long long)i);
        counts[indices[i] % 64]++;
    }
    for (int64_t t = 0; t < T && hot; t++) {
        bool chosen = false;
        for (int64_t k = 0; k < K; k++)
            chosen |= indices[t * K + k] == 0;
        if (!chosen)
            return because("%s: token %lld does not choose expert 0", name, (long long)t);
    }
    double mean = (double)pairs / (double)N, spread = 6 * sqrt(mean) + 1;
    for (int64_t e = 0; e < N && N <= 64 && !hot; e++)
        if (fabs((double)counts[e] - mean) > spread)
            return because("%s: expert %lld is chosen %lld times, %g is expected", name, (long long)e,
                           (long long)counts[e], mean);
    return HOLDS;
}

static const char *uniform_routing(const int64_t *size, uint64_t seed) {
    CHECK(flat_routing(size, seed, false));
    return flat_routing(size, seed, true);
}

SENTENCE(0, 12, "Uniform routing chooses every expert equally often; hot routing also sends every token to expert 0.",
         "one flat and one badly balanced case of known shape", "counts within six standard deviations") {
    for_sizes("T N K", uniform_routing, SIZES({1, 1, 1}, {100, 7, 3}, {2000, 64, 8}, {50, 1000000, 16}));
}

SENTENCE(0, 13, "Trained routing is the recorded model's: 7,080 experts are ever chosen, the busiest by 828 tokens.",
         "real routing is skewed, and that decides what is fast", "the statistics published with the file") {
    enum { T = 4096, K = 64, N = 16384 };
    fmoe_case c;
    int32_t *indices OWNED = integers(T * K);
    float *weights OWNED = floats(T * K);
    fmoe_case_parse("T4096-N16384-K64-trained", &c);
    expect(fmoe_case_route(&c, 1, indices, weights) == FMOE_OK, "%s", fmoe_error_message());
    int *counts OWNED = zeros(N, sizeof *counts), chosen = 0, busiest = 0;
    for (int i = 0; i < T * K; i++)
        chosen += counts[indices[i]]++ == 0;
    for (int e = 0; e < N; e++)
        busiest = counts[e] > busiest ? counts[e] : busiest;
    expect(chosen == 7080 && busiest == 828, "%d experts chosen, the busiest by %d tokens", chosen, busiest);
    fmoe_case_parse("T10-N16384-K64-trained", &c);
    int32_t few[10 * K];
    fmoe_case_route(&c, 2, few, weights);
    expect(!memcmp(few, indices, sizeof few), "the first ten tokens are routed differently when alone");
    fmoe_case_parse("T4097-N16384-K64-trained", &c);
    expect(fmoe_case_route(&c, 1, indices, weights) == FMOE_BAD_SIZE && strstr(fmoe_error_message(), "4097"),
           "4,097 tokens of 4,096 are accepted");
    fmoe_case_parse("T16-N1024-K4-trained", &c);
    expect(fmoe_case_route(&c, 1, indices, weights) == FMOE_BAD_SIZE && strstr(fmoe_error_message(), "n = 32"),
           "n = 32 keys are accepted");
}

/* ---- The check of a rung ----------------------------------------------------------------------------------------- */

/* A step to break: y = 2·x, and total moves by x. */
typedef struct {
    int64_t T;
    const float *x;
    float *y, *total;
    int32_t *count;
} toy_args;

static fmoe_status toy_draw(fmoe_problem *p) {
    toy_args *a = p->args;
    a->T = p->c.T;
    const int64_t shape[] = {a->T}, one[] = {1};
    fmoe_argument *x, *total;
    if (!(x = fmoe_problem_add(p, "x", offsetof(toy_args, x), FMOE_F32, ROLE_INPUT, 1, shape)) ||
        !fmoe_problem_add(p, "y", offsetof(toy_args, y), FMOE_F32, ROLE_OUTPUT, 1, shape) ||
        !(total = fmoe_problem_add(p, "total", offsetof(toy_args, total), FMOE_F32, ROLE_INOUT, 1, shape)) ||
        !fmoe_problem_add(p, "count", offsetof(toy_args, count), FMOE_I32, ROLE_OUTPUT, 1, one))
        return FMOE_OUT_OF_MEMORY;
    fmoe_fill_normal(p->seed, 1, 1, a->T, x->data);
    fmoe_fill_normal(p->seed, 2, 1, a->T, total->data);
    return FMOE_OK;
}

static fmoe_status toy_reference(fmoe_problem *p) {
    const toy_args *a = p->args;
    float *y = fmoe_problem_find(p, "y")->expected, *total = fmoe_problem_find(p, "total")->expected;
    for (int64_t i = 0; i < a->T; i++) {
        y[i] = 2 * a->x[i];
        total[i] = a->total[i] + a->x[i];
    }
    *(int32_t *)fmoe_problem_find(p, "count")->expected = (int32_t)a->T;
    return FMOE_OK;
}

static fmoe_work toy_work(const fmoe_problem *p, const fmoe_ceilings *ceilings) {
    double bytes = 16 * (double)p->c.T;
    return (fmoe_work){bytes, (double)p->c.T, bytes / ceilings->copy_gbs * 1e-6, "x in, y out"};
}

static const fmoe_step toy = {"toy", sizeof(toy_args), toy_draw, toy_reference, NULL, toy_work};

static size_t toy_workspace(const void *args) {
    return (size_t)((const toy_args *)args)->T * sizeof(float) + 3;
}

static fmoe_status toy_right(const void *args, void *workspace, size_t bytes, void *stream) {
    const toy_args *a = args;
    (void)stream;
    memset(workspace, 1, bytes);
    for (int64_t i = 0; i < a->T; i++) {
        a->y[i] = 2 * a->x[i];
        a->total[i] += a->x[i];
    }
    *a->count = (int32_t)a->T;
    return FMOE_OK;
}

static fmoe_status toy_idle(const void *args, void *workspace, size_t bytes, void *stream) {
    (void)args, (void)workspace, (void)bytes, (void)stream;
    return FMOE_OK;
}

static fmoe_status toy_nan(const void *args, void *workspace, size_t bytes, void *stream) {
    toy_right(args, workspace, bytes, stream);
    const toy_args *a = args;
    a->y[a->T - 1] = NAN;
    return FMOE_OK;
}

static fmoe_status toy_slightly_wrong(const void *args, void *workspace, size_t bytes, void *stream) {
    toy_right(args, workspace, bytes, stream);
    const toy_args *a = args;
    for (int64_t i = 0; i < a->T; i++)
        a->y[i] *= 1.00002f;
    return FMOE_OK;
}

static fmoe_status toy_slightly_moved(const void *args, void *workspace, size_t bytes, void *stream) {
    toy_right(args, workspace, bytes, stream);
    ((const toy_args *)args)->total[0] += 1;
    return FMOE_OK;
}

static fmoe_status toy_miscounted(const void *args, void *workspace, size_t bytes, void *stream) {
    toy_right(args, workspace, bytes, stream);
    --*((const toy_args *)args)->count;
    return FMOE_OK;
}

static fmoe_status toy_beyond(const void *args, void *workspace, size_t bytes, void *stream) {
    toy_right(args, workspace, bytes, stream);
    ((unsigned char *)workspace)[bytes] = 0;
    return FMOE_OK;
}

static fmoe_status toy_before(const void *args, void *workspace, size_t bytes, void *stream) {
    toy_right(args, workspace, bytes, stream);
    ((unsigned char *)workspace)[-1] = 0;
    return FMOE_OK;
}

static fmoe_status toy_counts_on_zeros(const void *args, void *workspace, size_t bytes, void *stream) {
    float first;
    memcpy(&first, workspace, sizeof first);
    toy_right(args, workspace, bytes, stream);
    ((const toy_args *)args)->y[0] += first;
    return FMOE_OK;
}

static fmoe_status toy_fails(const void *args, void *workspace, size_t bytes, void *stream) {
    toy_right(args, workspace, bytes, stream);
    return FMOE_BAD_WORKSPACE;
}

static bool never(const void *args) {
    (void)args;
    return false;
}

static bool not_here(void) {
    return false;
}

/* The rung's status and error at 100 elements. */
static fmoe_status check(fmoe_rung_fn *run, double *error, char *why) {
    fmoe_problem p FREED(fmoe_problem_free) = new_problem(&toy, fresh_seed(), "T100-f32");
    fmoe_rung rung = {.name = "toy", .run = run, .workspace = toy_workspace};
    return fmoe_rung_check(&rung, &p, error, why);
}

SENTENCE(0, 14, "The check of a rung passes a right one and refuses every way of being wrong that it is shown.",
         "a wrong rung is often a fast one", "rungs with one planted mistake each") {
    double error;
    char why[200];
    fmoe_status status = check(toy_right, &error, why);
    expect(status == FMOE_OK && error == 0, "the right one is refused: error %g, %s", error, why);
    static const struct {
        fmoe_rung_fn *run;
        const char *what, *names;
    } wrong[] = {
        {toy_idle, "writes nothing", "y[0]"},
        {toy_nan, "writes a NaN", "y[99]"},
        {toy_slightly_wrong, "is off by 2e-5", "y"},
        {toy_slightly_moved, "moves an in-out argument wrongly", "total[0]"},
        {toy_miscounted, "has one wrong integer", "count[0] is 99 and should be 100"},
        {toy_counts_on_zeros, "counts on a zeroed workspace", "y[0]"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        status = check(wrong[i].run, &error, why);
        expect(status == FMOE_OK && !(error <= fmoe_error_limit(FMOE_F32)), "one that %s passes with error %g",
               wrong[i].what, error);
        expect(strstr(why, wrong[i].names), "one that %s: the reason lacks %s: %s", wrong[i].what, wrong[i].names, why);
    }
    expect(check(toy_beyond, &error, why) == FMOE_BAD_WORKSPACE && strstr(why, "beyond"),
           "writing one byte beyond the workspace passes");
    expect(check(toy_before, &error, why) == FMOE_BAD_WORKSPACE && strstr(why, "before"),
           "writing one byte before the workspace passes");
    expect(check(toy_fails, &error, why) == FMOE_BAD_WORKSPACE && !(error <= 1), "a rung's own status is lost");
}

static struct {
    size_t bytes, misaligned;
    bool finite;
} seen;

static fmoe_status toy_looks(const void *args, void *workspace, size_t bytes, void *stream) {
    float first;
    memcpy(&first, workspace, sizeof first);
    seen.bytes = bytes;
    seen.misaligned = (uintptr_t)workspace % 256;
    seen.finite = isfinite(first);
    return toy_right(args, workspace, bytes, stream);
}

SENTENCE(0, 15, "A rung gets the workspace it asked for, 256-byte aligned, and runs only where it says it can.",
         "what holds in the check holds for any caller", "a rung that looks") {
    double error;
    char why[200];
    check(toy_looks, &error, why);
    expect(seen.bytes == 403, "%zu bytes came, 403 were asked for", seen.bytes);
    expect(seen.misaligned == 0, "the workspace is %zu bytes off", seen.misaligned);
    expect(!seen.finite, "the workspace comes with usable contents");
    fmoe_problem p FREED(fmoe_problem_free) = new_problem(&toy, 1, "T4-f32");
    const fmoe_rung rungs[] = {{.name = "a", .run = toy_right, .workspace = toy_workspace, .supports = never},
                               {.name = "b", .run = toy_right, .workspace = toy_workspace, .available = not_here},
                               {.name = "c", .run = toy_right, .backend = BACKEND_CUDA, .level = LEVEL_HOPPER + 1}};
    const fmoe_device *gpu = fmoe_device_get();
    const char *const reasons[] = {"support", "available", gpu->present ? "newer GPU" : gpu->why_not};
    for (int i = 0; i < 3; i++)
        expect(fmoe_rung_check(&rungs[i], &p, &error, why) == FMOE_UNSUPPORTED && strstr(why, reasons[i]),
               "rung %s is run: %s", rungs[i].name, why);
}

SENTENCE(0, 16, "A problem that does not fit memory is refused with a status.", "a typing error is not a crash",
         "sizes whose product overflows") {
    fmoe_case c;
    fmoe_problem p;
    static const char *const names[] = {"T9223372036854775807", "T4611686018427387905", "T1000000000000000"};
    for (int i = 0; i < 3; i++) {
        fmoe_case_parse(names[i], &c);
        fmoe_status status = fmoe_problem_new(&toy, &c, 1, &p);
        expect(status == FMOE_OUT_OF_MEMORY, "%s: status %s", names[i], fmoe_status_name(status));
        expect(strstr(fmoe_error_message(), "x:"), "%s: the message does not name x: %s", names[i],
               fmoe_error_message());
    }
}

/* ---- Timing and ceilings ----------------------------------------------------------------------------------------- */

static void sleep_a_while(void *context) {
    int *calls = context;
    usleep(*calls == 0 ? 200000 : *calls % 5 == 0 ? 30000 : 2000);
    ++*calls;
}

SENTENCE(0, 17, "A timing is the median of its runs: the first call and a slow run in five do not move it.",
         "other programs run too", "calls that sleep for known times") {
    int calls = 0;
    fmoe_timing t = fmoe_time(sleep_a_while, &calls);
    expect(t.runs >= 3 && t.runs <= 200 && calls == t.runs + 1, "%d calls for %d runs", calls, t.runs);
    expect(t.min_ms >= 2 && t.min_ms <= t.median_ms && t.median_ms <= t.max_ms, "%g, %g, %g ms are out of order",
           t.min_ms, t.median_ms, t.max_ms);
    expect(t.median_ms < 25, "the median of runs of 2 ms and a few of 30 ms is %g ms", t.median_ms);
    expect(t.max_ms >= 30 && t.max_ms < 190, "the longest run is %g ms", t.max_ms);
}

SENTENCE(0, 18,
         "The gather rate of a table is the measured one at the measured sizes and lies between two of them else.",
         "every floor of a gather rests on it", "closed form") {
    fmoe_ceilings m = {.copy_gbs = 7, .num_gather = 3, .gather_mb = {1, 4, 64}, .gather_gbs = {100, 60, 20}};
    static const double mb[] = {0.001, 1, 2, 4, 16, 64, 1e6}, gbs[] = {100, 100, 80, 60, 40, 20, 20};
    for (int i = 0; i < 7; i++)
        expect(fabs(fmoe_gather_gbs(&m, mb[i] * 1e6) - gbs[i]) < 1e-9, "%g MB: %g GB/s, not %g", mb[i],
               fmoe_gather_gbs(&m, mb[i] * 1e6), gbs[i]);
}

/* ---- The chapters' program --------------------------------------------------------------------------------------- */

static bool write_file(const char *path, const char *text) {
    make_folders(path);
    FILE *file = fopen(path, "w");
    return file && fputs(text, file) >= 0 && !fclose(file);
}

/* An empty folder to run in, with the ceilings of a machine that is not measured but made up. */
static void enter_folder(void) {
    char folder[] = "/tmp/flashmoe-chapter-XXXXXX", path[160];
    expect(mkdtemp(folder) && !chdir(folder), "no folder under /tmp");
    snprintf(path, sizeof path, "build/ceilings-%s.csv", machine_slug());
    expect(write_file(path, "copy_gbs,,10\ngather_gbs,1,50\nfma_gflops,,100\nfork_join_us,,1\n"), "no file");
}

static void leave_folder(void) {
    char folder[256], command[300];
    if (getcwd(folder, sizeof folder) && !strncmp(folder, "/tmp/flashmoe-chapter-", 22) && !chdir("/")) {
        snprintf(command, sizeof command, "rm -r '%s'", folder);
        expect(system(command) == 0, "%s stays", folder);
    }
}

static char output[1 << 16];

/* Runs the chapter in a process of its own with these arguments, NULL at the end. Its status; what it printed. */
static int run_chapter(const fmoe_chapter *chapter, const char *const *arguments) {
    char *argv[16] = {"chapter"};
    int argc = 1;
    for (; arguments[argc - 1]; argc++)
        argv[argc] = (char *)arguments[argc - 1];
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("output.txt", "w", stdout) || dup2(STDOUT_FILENO, STDERR_FILENO) < 0)
            _exit(99);
        int status = fmoe_chapter_main(chapter, argc, argv);
        fflush(NULL);
        _exit(status);
    }
    int status = -1;
    waitpid(child, &status, 0);
    FILE *file = fopen("output.txt", "r");
    size_t length = file ? fread(output, 1, sizeof output - 1, file) : 0;
    output[length] = 0;
    if (file)
        fclose(file);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static const char *const toy_cases[] = {"T1000-f32", NULL};
static const fmoe_rung toy_rungs[] = {
    {"right", LEVEL_CORE, BACKEND_CPU, "The definition.", toy_right, .workspace = toy_workspace},
    {"other, \"quoted\"", LEVEL_ADVANCED, BACKEND_CPU, "The same.", toy_right, .workspace = toy_workspace},
    {"library", LEVEL_CORE, BACKEND_CPU, "A library's.", toy_right, .workspace = toy_workspace, .library = true},
    {"elsewhere", LEVEL_CORE, BACKEND_CPU, "Not here.", toy_right, .available = not_here},
    {0},
};
static const fmoe_rung broken_rungs[] = {
    {"right", LEVEL_CORE, BACKEND_CPU, "The definition.", toy_right, .workspace = toy_workspace},
    {"slightly wrong", LEVEL_CORE, BACKEND_CPU, "Off.", toy_slightly_wrong, .workspace = toy_workspace},
    {0},
};
static const fmoe_ladder toy_ladders[] = {{&toy, toy_rungs, toy_cases, toy_cases, NULL, NULL}, {0}};
static const fmoe_ladder broken_ladders[] = {{&toy, broken_rungs, toy_cases, toy_cases, NULL, NULL}, {0}};
static const fmoe_chapter toy_chapter = {.number = 7, .title = "a toy", .ladders = toy_ladders};
static const fmoe_chapter broken_chapter = {.number = 7, .title = "a toy", .ladders = broken_ladders};

#define RUN(chapter, ...) run_chapter(chapter, (const char *const[]){__VA_ARGS__, NULL})

SENTENCE(0, 19, "A chapter ends with status 0 when every rung is right and with 1, and FAILED, when one is wrong.",
         "a table with a wrong rung in it is not a result", "a chapter with a planted mistake") {
    enter_folder();
    expect(RUN(&toy_chapter, "--quick") == 0 && strstr(output, "pass") && !strstr(output, "FAILED"), "%s", output);
    expect(strstr(output, "not available on this machine"), "a rung that is not available goes unmentioned:\n%s",
           output);
    expect(RUN(&broken_chapter, "--quick") == 1, "the wrong rung ends with status 0:\n%s", output);
    expect(strstr(output, "FAILED: error 2.0e-05 over 1e-05"), "no reason is given:\n%s", output);
    expect(RUN(&broken_chapter, "--quick", "--only", "right") == 0, "the right rung alone fails:\n%s", output);
    leave_folder();
}

SENTENCE(0, 20, "An option or a value that makes no sense is named, and the status is 2.",
         "what was not understood must not be measured", "one mistake at a time") {
    enter_folder();
    static const char *const bad[][2] = {
        {"--quik", NULL},        {"--only", "nothing"}, {"--only", "right,"}, {"--only", "righ"},
        {"--level", "expert"},   {"--dtype", "f64"},    {"--dtype", "i32"},   {"--seed", "-1"},
        {"--seed", "1x"},        {"--threads", "0"},    {"--threads", "two"}, {"--threads", "99999999999999999999"},
        {"--case", "T12-wrong"}, {"--case", "T12-T13"}, {"--csv", ""},        {"--csv", "/dev/null/here.csv"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        const char *const arguments[] = {bad[i][0], bad[i][1], NULL};
        int status = run_chapter(&toy_chapter, arguments);
        expect(status == 2 && strstr(output, bad[i][0]), "%s %s ends with status %d:\n%s", bad[i][0],
               bad[i][1] ? bad[i][1] : "", status, output);
    }
    static const char *const hungry[] = {"--case", "--only", "--level", "--dtype", "--seed", "--threads", "--csv"};
    for (size_t i = 0; i < sizeof hungry / sizeof hungry[0]; i++)
        expect(RUN(&toy_chapter, hungry[i]) == 2 && strstr(output, "needs a value"), "%s without a value:\n%s",
               hungry[i], output);
    expect(RUN(&toy_chapter, "--list") == 0 && strstr(output, "The definition."), "--list:\n%s", output);
    expect(RUN(&toy_chapter, "--help") == 0 && strstr(output, "--predict"), "--help:\n%s", output);
    expect(RUN(&toy_chapter, "--quick", "--level", "core", "--dtype", "bf16") == 0 && strstr(output, "T1000-bf16") &&
               !strstr(output, "quoted"),
           "--level core --dtype bf16:\n%s", output);
    leave_folder();
}

SENTENCE(0, 21, "What is written to a CSV file is read back the same, whatever the names hold.",
         "figures outlive the run that made them", "a round trip") {
    omp_set_num_threads(2); // the made-up ceilings are those of so many threads
    enter_folder();
    expect(RUN(&toy_chapter, "--quick", "--csv", "out/here.csv", "--threads", "2") == 0, "%s", output);
    csv_file file;
    expect(csv_read("out/here.csv", &file) == FMOE_OK && file.count == 3, "%lld rows, not 3", (long long)file.count);
    for (int i = 0; i < 3; i++) {
        const csv_row *row = &file.rows[i];
        expect(!strcmp(row->variant, toy_rungs[i].name), "rung '%s' is read back as '%s'", toy_rungs[i].name,
               row->variant);
        expect(row->chapter == 7 && !strcmp(row->op, "toy") && !strcmp(row->case_name, "T1000-f32") &&
                   !strcmp(row->backend, "cpu") && !strcmp(row->dtype, "f32") && row->threads == 2 &&
                   !strcmp(row->level, i == 1 ? "advanced" : "core"),
               "row %d names another measurement", i);
        expect(row->bytes == 16000 && row->flops == 1000 && fabs(row->floor_ms - 0.0016) < 1e-9 && row->rel_err == 0,
               "row %d: %g bytes, %g flops, floor %g ms, error %g", i, row->bytes, row->flops, row->floor_ms,
               row->rel_err);
        expect(row->min_ms > 0 && row->min_ms <= row->median_ms && row->median_ms <= row->max_ms, "row %d: times", i);
        expect(strstr(row->device, "(2 threads)") && strlen(row->date) == 10, "row %d: '%s', '%s'", i, row->device,
               row->date);
    }
    csv_free(&file);
    FILE *text = fopen("out/here.csv", "r");
    size_t length = fread(output, 1, sizeof output - 1, text);
    output[length] = 0;
    fclose(text);
    expect(strstr(output, "\nchapter,op,case,variant,level,backend,dtype,median_ms,min_ms,max_ms,rel_err,bytes,flops,"
                          "floor_ms,threads,device,date\n"),
           "the columns are others");
    static const char *const comments[] = {
        "# device: ", "\n# compiler: ", "\n# clocks seen: ", "\n# date: ", "\n# commit: "};
    for (int i = 0; i < 5; i++)
        expect(strstr(output, comments[i]), "no header comment '%s'", comments[i]);
    leave_folder();
}

SENTENCE(0, 22,
         "Without a GPU, rungs recorded elsewhere are shown beside that machine's own best CPU rung, and marked.",
         "a reader without a GPU sees what a GPU did, and whose figure it is", "a recorded file made up for it") {
    enter_folder();
    setenv("FMOE_PLOTS", "made-up", 1);
    expect(RUN(&toy_chapter, "--quick") == 0 && !strstr(output, "recorded"), "without files:\n%s", output);
    expect(
        write_file("made-up/data/some-gpu/chapter7.csv",
                   "# device: SomeGPU\n"
                   "chapter,op,case,variant,level,backend,dtype,median_ms,min_ms,max_ms,rel_err,bytes,flops,"
                   "floor_ms,threads,device,date\n"
                   "7,toy,T1000-f32,its serial rung,core,cpu,f32,40,40,40,0,1,1,1,9,\"Host, of SomeGPU\",2026-11-02\n"
                   "7,toy,T1000-f32,its best,core,cpu,f32,8,8,8,0,1,1,1,9,\"Host, of SomeGPU\",2026-11-02\n"
                   "7,toy,T1000-f32,kernel,core,cuda,f32,0.5,0.5,0.5,1e-7,1,1,0.1,0,SomeGPU,2026-11-03\n"
                   "7,toy,T2000-f32,kernel,core,cuda,f32,0.75,0.7,0.8,1e-7,1,1,0.1,0,SomeGPU,2026-11-03\n") &&
            write_file("made-up/data/some-gpu/peers.csv", "op,case,variant,backend,median_ms,rel_err,device,date\n"
                                                          "toy,T1000-f32,somebody else,peer,2.5,,SomeGPU,2026-11-04\n"),
        "no files");
    expect(RUN(&toy_chapter, "--quick") == 0, "%s", output);
    static const char *const shown[] = {"recorded on SomeGPU, 2026-11-03",
                                        "its best",
                                        "kernel",
                                        "somebody else",
                                        "toy  T2000-f32",
                                        "0.5000",
                                        "16.0",
                                        "peer"};
    for (size_t i = 0; i < sizeof shown / sizeof shown[0]; i++)
        expect(strstr(output, shown[i]), "'%s' is not shown:\n%s", shown[i], output);
    expect(!strstr(output, "its serial rung"), "a rung that is not the best is shown:\n%s", output);
    expect(RUN(&toy_chapter, "--quick", "--case", "T1000-f32") == 0 && !strstr(output, "T2000"),
           "--case shows recorded cases that nobody asked for:\n%s", output);
    leave_folder();
}
