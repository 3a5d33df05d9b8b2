/* Chapter 8, from sentence 20 on: weights from disk. Files are untrusted. */
#include "values.h"

#include "../chapters/golden.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- Files in memory --------------------------------------------------------------------------------------------- */

typedef struct {
    unsigned char bytes[4096];
    size_t size;
} image;

/* A file from its header, spelled out, and as many bytes of data: 0, 1, 2, ... */
static image spell(const char *header, size_t data_bytes) {
    image f = {.size = 8 + strlen(header) + data_bytes};
    uint64_t length = strlen(header);
    cr_assert(f.size <= sizeof f.bytes);
    memcpy(f.bytes, &length, 8);
    memcpy(f.bytes + 8, header, strlen(header));
    for (size_t i = 0; i < data_bytes; i++)
        f.bytes[8 + strlen(header) + i] = (unsigned char)i;
    return f;
}

static fmoe_file *parsed(const image *f) {
    fmoe_file *file;
    fmoe_status status = fmoe_file_parse(f->bytes, f->size, "memory", &file);
    cr_assert(status == FMOE_OK, "%s", fmoe_error_message());
    return file;
}

/* Refused as a bad file, with a message that names the file and holds `word`. */
static void expect_bad(const image *f, const char *word) {
    fmoe_file *file = (fmoe_file *)1;
    fmoe_status status = fmoe_file_parse(f->bytes, f->size, "some.safetensors", &file);
    const char *message = fmoe_error_message();
    expect(status == FMOE_BAD_FILE && file == NULL, "%s: %s", word, fmoe_status_name(status));
    expect(strncmp(message, "some.safetensors: ", 18) == 0 && strstr(message, word),
           "the message \"%s\" does not say the file and %s", message, word);
    if (status == FMOE_OK)
        fmoe_file_close(file);
}

static void expect_bad_header(const char *header, size_t data_bytes, const char *word) {
    image f = spell(header, data_bytes);
    expect_bad(&f, word);
}

/* A path of its own in the folder for temporary files; the caller unlinks it. */
static void temporary(char path[64]) {
    strcpy(path, "/tmp/flashmoe-test-XXXXXX");
    int descriptor = mkstemp(path);
    cr_assert(descriptor >= 0, "cannot make a temporary file");
    close(descriptor);
}

/* ---- Reading what others wrote ----------------------------------------------------------------------------------- */

SENTENCE(8, 20, "A file spelled out by hand is read: dtypes, shapes, offsets, metadata; scalars and empty tensors too.",
         "files are written by other programs", "the format's description") {
    image f = spell("{\"__metadata__\":{\"by\":\"hand\",\"note\":\"\\u00e9\"},"
                    "\"b\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[0,4]},"
                    "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,3],\"data_offsets\":[4,4]},"
                    "\"i\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[8,16]},"
                    "\"scalar\":{\"data_offsets\":[4,8],\"dtype\":\"F32\",\"shape\":[]},"
                    "\"first\":{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[0,0]},"
                    "\"last\":{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[24,24]},"
                    "\"j\":{\"dtype\":\"I32\",\"shape\":[2,1,1],\"data_offsets\":[16,24]}}   ",
                    24);
    fmoe_file *file = parsed(&f);
    expect(fmoe_file_count(file) == 7, "%lld tensors, not 7", (long long)fmoe_file_count(file));
    const char *names[] = {"b", "empty", "i", "scalar", "first", "last", "j"};
    const fmoe_dtype dtypes[] = {FMOE_BF16, FMOE_F16, FMOE_I64, FMOE_F32, FMOE_F16, FMOE_F16, FMOE_I32};
    const int ranks[] = {2, 2, 1, 0, 1, 1, 3}, counts[] = {2, 0, 1, 1, 0, 0, 2}, offsets[] = {0, 4, 8, 4, 0, 24, 16};
    const unsigned char *first = fmoe_file_find(file, "b")->data;
    for (int i = 0; i < 7; i++) {
        const fmoe_tensor *t = fmoe_file_find(file, names[i]);
        expect(t && t->dtype == dtypes[i] && t->rank == ranks[i] && t->count == counts[i], "tensor %s", names[i]);
        expect(t && (const unsigned char *)t->data - first == offsets[i], "tensor %s lies elsewhere", names[i]);
    }
    expect(memcmp(first, f.bytes + f.size - 24, 24) == 0, "the data are not the file's");
    for (int64_t i = 1; i < 7; i++)
        expect(fmoe_file_tensor(file, i)->data >= fmoe_file_tensor(file, i - 1)->data, "tensors are not in order");
    expect(!fmoe_file_tensor(file, 7) && !fmoe_file_tensor(file, -1), "a tensor beyond the last");
    expect(!fmoe_file_find(file, "c") && !fmoe_file_find(file, "__metadata__"), "found a tensor that is not there");
    expect(!strcmp(fmoe_file_metadata(file, "by"), "hand"), "metadata by");
    expect(!strcmp(fmoe_file_metadata(file, "note"), "é"), "metadata note");
    expect(!fmoe_file_metadata(file, "nothing"), "metadata that is not there");
    fmoe_file_close(file);
}

SENTENCE(8, 21, "Values convert to float32 exactly, at whatever byte they lie.", "offsets need not be aligned",
         "bit patterns with known values") {
    /* 3 F16 values, then F32 and BF16 values at odd multiples of their size. */
    image f = spell("{\"h\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[0,6]},"
                    "\"f\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[6,14]},"
                    "\"b\":{\"dtype\":\"BF16\",\"shape\":[600],\"data_offsets\":[14,1214]},"
                    "\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[1214,1218]}}",
                    1218);
    unsigned char *data = f.bytes + f.size - 1218;
    const uint16_t halves[] = {0x3c00, 0xc100, 0x0001};
    const float plain[] = {1.5f, -0.1f}, scalar = 3;
    memcpy(data, halves, 6);
    memcpy(data + 6, plain, 8);
    for (int i = 0; i < 600; i++) {
        uint16_t bits = (uint16_t)(0x3f80 + i); /* 1, 1 + 1/128, ... */
        memcpy(data + 14 + 2 * i, &bits, 2);
    }
    memcpy(data + 1214, &scalar, 4);
    /* Every alignment of the whole file too. */
    for (int shift = 0; shift < 4; shift++) {
        image moved = f;
        memmove(moved.bytes + shift, f.bytes, f.size);
        fmoe_file *file;
        cr_assert(fmoe_file_parse(moved.bytes + shift, f.size, "memory", &file) == FMOE_OK);
        float *h OWNED = NULL, *p OWNED = NULL, *b OWNED = NULL, *s OWNED = NULL;
        cr_assert(fmoe_file_read_f32(file, "h", 1, (int64_t[]){3}, &h) == FMOE_OK, "%s", fmoe_error_message());
        cr_assert(fmoe_file_read_f32(file, "f", 1, (int64_t[]){2}, &p) == FMOE_OK, "%s", fmoe_error_message());
        cr_assert(fmoe_file_read_f32(file, "b", 1, (int64_t[]){600}, &b) == FMOE_OK, "%s", fmoe_error_message());
        cr_assert(fmoe_file_read_f32(file, "s", 0, NULL, &s) == FMOE_OK, "%s", fmoe_error_message());
        expect(h[0] == 1 && h[1] == -2.5f && h[2] == 0x1p-24f, "float16: %g %g %g", h[0], h[1], h[2]);
        expect(p[0] == 1.5f && p[1] == -0.1f && s[0] == 3, "float32: %g %g %g", p[0], p[1], s[0]);
        for (int i = 0; i < 600; i++) {
            float expected = ldexpf(1 + (float)(i % 128) / 128, i / 128);
            expect(b[i] == expected, "bfloat16: element %d is %g, not %g", i, b[i], expected);
        }
        fmoe_file_close(file);
    }
}

/* ---- Reading what was written here ------------------------------------------------------------------------------- */

static bool same_tensor(const fmoe_tensor *a, const fmoe_tensor *b) {
    return strcmp(a->name, b->name) == 0 && a->dtype == b->dtype && a->rank == b->rank && a->count == b->count &&
           memcmp(a->shape, b->shape, sizeof(int64_t) * (size_t)a->rank) == 0 &&
           memcmp(a->data, b->data, (size_t)a->count * fmoe_dtype_size(a->dtype)) == 0;
}

static const char *round_trip(const int64_t *size, uint64_t seed) {
    static const char *const names[] = {"a", "model.layers.3.mlp.gate_proj.weight", "quote \" and \\ and ü", "",
                                        "line\nbreak"};
    unsigned char data[2048];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)fmoe_random_bits(seed, 1, i);
    fmoe_tensor tensors[5] = {0};
    int64_t count = size[0];
    for (int64_t i = 0; i < count; i++) {
        fmoe_tensor *t = &tensors[i];
        *t = (fmoe_tensor){.name = names[i], .dtype = (fmoe_dtype)((size[1] + i) % 5), .count = 1, .data = data + i};
        t->rank = (int)((size[2] + i) % (FMOE_MAX_RANK + 1));
        for (int k = 0; k < t->rank; k++) {
            t->shape[k] = k < 3 ? (int64_t)(fmoe_random_bits(seed, 2, (uint64_t)(i * 8 + k)) % 5) : 1;
            t->count *= t->shape[k];
        }
    }
    const fmoe_metadata metadata[] = {{"num_experts_per_tok", "7"}, {"note", "ünïcode \" \\"}};
    char path[64];
    temporary(path);
    const char *result = HOLDS;
    fmoe_file *file = NULL;
    if (fmoe_file_write(path, count, tensors, size[3], metadata) != FMOE_OK || fmoe_file_open(path, &file) != FMOE_OK) {
        result = because("%s", fmoe_error_message());
    } else {
        if (fmoe_file_count(file) != count)
            result = because("%lld tensors came back", (long long)fmoe_file_count(file));
        for (int64_t i = 0; i < count && result == HOLDS; i++) {
            const fmoe_tensor *t = fmoe_file_find(file, names[i]);
            if (!t || !same_tensor(t, &tensors[i]))
                result = because("tensor %lld did not come back as it was", (long long)i);
        }
        for (int64_t i = 0; i < size[3] && result == HOLDS; i++) {
            const char *value = fmoe_file_metadata(file, metadata[i].key);
            if (!value || strcmp(value, metadata[i].value) != 0)
                result = because("metadata %s came back as %s", metadata[i].key, value ? value : "nothing");
        }
        for (int64_t i = 0; i < count && result == HOLDS; i++)
            if (count == 1 && (uintptr_t)fmoe_file_tensor(file, 0)->data % 8 != 0)
                result = because("the data do not begin at a multiple of 8");
    }
    fmoe_file_close(file);
    unlink(path);
    return result;
}

SENTENCE(8, 22, "What is written is read back bit for bit, with its names, dtypes, shapes and metadata.",
         "writer and reader are two programs", "the tensors before writing") {
    for_random_sizes("tensors dtype rank metadata", round_trip, 60, (int64_t[]){0, 0, 0, 0},
                     (int64_t[]){5, 4, FMOE_MAX_RANK, 2});
}

SENTENCE(8, 23, "The writer refuses what the reader would: sizes, ranks, names, types and missing data.",
         "a file that cannot be read back is lost work", "the status of each") {
    float data[6] = {0};
    const fmoe_tensor good = {.name = "a", .dtype = FMOE_F32, .rank = 2, .shape = {2, 3}, .count = 6, .data = data};
    fmoe_tensor bad[9];
    for (int i = 0; i < 9; i++)
        bad[i] = good;
    bad[0].name = NULL;
    bad[1].data = NULL;
    bad[2].shape[0] = -2, bad[2].count = -6;
    bad[3].count = 5;
    bad[4].rank = FMOE_MAX_RANK + 1;
    bad[5].dtype = (fmoe_dtype)17;
    bad[6].shape[0] = INT64_MAX / 2;
    bad[7].name = "__metadata__";
    bad[8].name = "\xff";
    const fmoe_status expected[] = {FMOE_NULL_POINTER, FMOE_NULL_POINTER, FMOE_BAD_SIZE, FMOE_BAD_SIZE, FMOE_BAD_SIZE,
                                    FMOE_UNSUPPORTED,  FMOE_OVERFLOW,     FMOE_BAD_FILE, FMOE_BAD_FILE};
    char path[64];
    temporary(path);
    for (int i = 0; i < 9; i++) {
        fmoe_status status = fmoe_file_write(path, 1, &bad[i], 0, NULL);
        expect(status == expected[i], "bad tensor %d: %s, %s", i, fmoe_status_name(status), fmoe_error_message());
    }
    fmoe_status status = fmoe_file_write(path, 2, (fmoe_tensor[]){good, good}, 0, NULL);
    expect(status == FMOE_BAD_FILE && strstr(fmoe_error_message(), "tensor a"), "the same name twice: %s",
           fmoe_status_name(status));
    expect(fmoe_file_write(path, 1, &good, 1, (fmoe_metadata[]){{"key", NULL}}) == FMOE_NULL_POINTER, "no value");
    expect(fmoe_file_write(path, -1, &good, 0, NULL) == FMOE_BAD_SIZE, "a negative number of tensors");
    expect(fmoe_file_write(NULL, 1, &good, 0, NULL) == FMOE_NULL_POINTER, "no path");
    expect(fmoe_file_write("/no such folder/file", 1, &good, 0, NULL) == FMOE_IO, "no such folder");
    if (access("/dev/full", W_OK) == 0)
        expect(fmoe_file_write("/dev/full", 1, &good, 0, NULL) == FMOE_IO, "a full disk");
    unlink(path);
}

/* ---- Malformed files --------------------------------------------------------------------------------------------- */

SENTENCE(8, 24, "Every beginning of a file that is not the whole of it is refused.", "downloads stop anywhere",
         "all lengths from nothing on") {
    image f = spell("{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
                    "\"b\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[16,22]}}",
                    22);
    for (image part = f; part.size > 0; part.size--) {
        if (part.size < f.size)
            expect_bad(&part, "");
    }
    image nothing = {.size = 0};
    expect_bad(&nothing, "few");
    fmoe_file_close(parsed(&f));
}

SENTENCE(8, 25, "A header length beyond the file or beyond the format's limit is refused before it is believed.",
         "eight bytes could ask for 2^64", "the message names the file") {
    image f = spell("{}", 0);
    const uint64_t lengths[] = {3, 100, 99999999, 100000001, 1ull << 40, INT64_MAX, UINT64_MAX, UINT64_MAX - 7};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        memcpy(f.bytes, &lengths[i], 8);
        expect_bad(&f, lengths[i] > 100000000 ? "exceeds the limit" : "truncated");
    }
    expect_bad_header("", 0, "not a safetensors file");
    expect_bad_header("[]", 0, "not a safetensors file");
    expect_bad_header(" {}", 0, "not a safetensors file");
}

#define ENTRY(name, dtype, shape, offsets)                                                                             \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

SENTENCE(8, 26, "A header that is not JSON of the format's form is refused, and so is a name given twice.",
         "a parser that guesses can be led astray", "each deviation by itself") {
    expect_bad_header("{", 0, "not JSON");
    expect_bad_header("{}x", 0, "not JSON");
    expect_bad_header("{\"a\":1}", 0, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("a", "F32", "[1]", "[4,8]") "}", 8, "duplicate");
    expect_bad_header("{\"__metadata__\":{\"k\":\"v\",\"k\":\"w\"}}", 0, "duplicate");
    expect_bad_header("{\"__metadata__\":[]}", 0, "__metadata__");
    expect_bad_header("{\"__metadata__\":{\"k\":1}}", 0, "__metadata__ k");
    expect_bad_header("{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor a: no dtype");
    expect_bad_header("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "tensor a: no shape");
    expect_bad_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[0,4,8]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[0,\"4\"]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[0,4.0]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F64", "[1]", "[0,8]") "}", 8, "tensor a: dtype F64");
    expect_bad_header("{" ENTRY("a", "f32", "[1]", "[0,4]") "}", 4, "tensor a: dtype f32");
    expect_bad_header("{" ENTRY("a", "F3", "[1]", "[0,4]") "}", 4, "tensor a: dtype F3");
    expect_bad_header("{" ENTRY("a\\u0000b", "F32", "[1]", "[0,4]") "}", 4, "not JSON");
}

SENTENCE(8, 27, "A negative size, one that is no integer, a product that overflows and a rank above 8 are refused.",
         "a shape is multiplied before it is used", "each by itself, and the largest that is legal") {
    expect_bad_header("{" ENTRY("a", "F32", "[-1]", "[0,4]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[-1,-1]", "[0,4]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1.0]", "[0,4]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[null]", "[0,4]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "1", "[0,4]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[4294967296,4294967296]", "[0,0]") "}", 0, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[9223372036854775807,3]", "[0,4]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[4611686018427387905]", "[0,4]") "}", 4, "tensor a: its size in bytes");
    expect_bad_header("{" ENTRY("a", "F32", "[18446744073709551617]", "[0,4]") "}", 4, "");
    expect_bad_header("{" ENTRY("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "tensor a: rank 9");
    image f = spell("{" ENTRY("a", "F32", "[1,1,1,1,1,1,1,1]", "[0,4]") "}", 4);
    fmoe_file_close(parsed(&f));
}

SENTENCE(8, 28,
         "Every byte of data belongs to one tensor: no hole, no overlap, nothing behind the end, sizes that fit.",
         "a byte that two tensors share, or none, is how a file hides things", "each by itself, in any order") {
    image f = spell("{" ENTRY("b", "F32", "[1]", "[4,8]") "," ENTRY("a", "F32", "[1]", "[0,4]") "}", 8);
    fmoe_file_close(parsed(&f));
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[4,8]") "}", 8, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("b", "F32", "[1]", "[8,12]") "}", 12, "tensor b");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[0,4]") "}", 5, "belong to no tensor");
    expect_bad_header("{}", 1, "belong to no tensor");
    expect_bad_header("{" ENTRY("a", "F32", "[2]", "[0,8]") "," ENTRY("b", "F32", "[1]", "[4,8]") "}", 8,
                      "tensor b: overlaps tensor a");
    expect_bad_header("{" ENTRY("b", "F32", "[2]", "[0,8]") "," ENTRY("a", "F32", "[2]", "[0,8]") "}", 8, "overlaps");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[0,8]") "}", 8, "tensor a: data_offsets span 8");
    expect_bad_header("{" ENTRY("a", "F32", "[2]", "[0,4]") "}", 4, "tensor a: data_offsets span 4");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[4,0]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[-4,0]") "}", 4, "data_offsets [-4, 0] do not lie");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[1,5]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[0]", "[5,5]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[1]", "[9223372036854775804,9223372036854775807]") "}", 4, "tensor a");
    expect_bad_header("{" ENTRY("a", "F32", "[2]", "[-9223372036854775808,-9223372036854775800]") "}", 8, "tensor a");
}

/* Reads all there is; true if every tensor lies within the file. */
static bool usable(const fmoe_file *file, const image *f) {
    int64_t bytes = 0, sum = 0;
    for (int64_t i = 0; i < fmoe_file_count(file); i++) {
        const fmoe_tensor *t = fmoe_file_tensor(file, i);
        int64_t size = t->count * (int64_t)fmoe_dtype_size(t->dtype);
        for (int64_t k = 0; k < size && k < (int64_t)f->size; k++)
            sum += ((const unsigned char *)t->data)[k];
        bytes += size;
    }
    return sum >= 0 && bytes <= (int64_t)f->size;
}

static const char *spoilt(const int64_t *size, uint64_t seed) {
    image f = spell("{\"__metadata__\":{\"k\":\"v\"}," ENTRY("a", "F32", "[2,2]", "[0,16]") "," ENTRY(
                        "b", "BF16", "[3]", "[16,22]") "," ENTRY("c", "I64", "[1]", "[22,30]") "}",
                    30);
    for (int64_t i = 0; i < size[0]; i++) {
        uint64_t bits = fmoe_random_bits(seed, 3, (uint64_t)i);
        size_t at = bits % f.size;
        switch (bits >> 32 & 3) {
        case 0:
            f.bytes[at] = (unsigned char)(bits >> 40);
            break;
        case 1: /* another digit or sign */
            f.bytes[at] = (unsigned char)"0123456789-.,[]{}\""[(bits >> 40) % 18];
            break;
        case 2: /* a byte less */
            memmove(f.bytes + at, f.bytes + at + 1, f.size - at - 1);
            f.size--;
            break;
        default: /* a byte of the file elsewhere */
            f.bytes[at] = f.bytes[(bits >> 40) % f.size];
        }
    }
    fmoe_file *file;
    fmoe_status status = fmoe_file_parse(f.bytes, f.size, "memory", &file);
    const char *result = HOLDS;
    if ((status == FMOE_OK) != (file != NULL))
        result = because("status %s with%s a file", fmoe_status_name(status), file ? "" : "out");
    else if (file && !usable(file, &f))
        result = because("tensors reach beyond the file");
    else if (!file && (status != FMOE_BAD_FILE || strncmp(fmoe_error_message(), "memory: ", 8) != 0))
        result = because("status %s: %s", fmoe_status_name(status), fmoe_error_message());
    fmoe_file_close(file);
    return result;
}

SENTENCE(8, 29, "A file spoilt at random is refused with a message or can be read from end to end.",
         "nobody lists all ways to be wrong; `make fuzz` goes on from here", "random changes of a good file") {
    for_random_sizes("changes", spoilt, 3000, (int64_t[]){1}, (int64_t[]){6});
}

/* ---- Tensors by name --------------------------------------------------------------------------------------------- */

SENTENCE(8, 30, "A tensor that is missing, misshapen or not of a float type is refused by its name and its file's.",
         "the reader knows what it needs, the file does not", "the message") {
    image f = spell("{" ENTRY("weight", "F32", "[2,3]", "[0,24]") "," ENTRY("index", "I32", "[2]", "[24,32]") "}", 32);
    fmoe_file *file = parsed(&f);
    const struct {
        const char *name;
        int rank;
        int64_t shape[3];
        const char *message;
    } bad[] = {
        {"wait", 2, {2, 3}, "memory: tensor wait: missing"},
        {"weight", 2, {3, 2}, "memory: tensor weight: shape [2, 3]"},
        {"weight", 1, {6}, "memory: tensor weight: shape [2, 3]"},
        {"weight", 3, {2, 3, 1}, "is not [2, 3, 1]"},
        {"weight", 0, {0}, "is not []"},
        {"index", 1, {2}, "memory: tensor index: dtype I32"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        float *values = (float *)1;
        fmoe_status status = fmoe_file_read_f32(file, bad[i].name, bad[i].rank, bad[i].shape, &values);
        expect(status == FMOE_BAD_FILE && values == NULL, "%s: %s", bad[i].message, fmoe_status_name(status));
        expect(strstr(fmoe_error_message(), bad[i].message) != NULL, "the message is \"%s\"", fmoe_error_message());
    }
    float *values;
    expect(fmoe_file_read_f32(file, "weight", 9, NULL, &values) == FMOE_NULL_POINTER, "no shape");
    expect(fmoe_file_read_f32(file, "weight", -1, NULL, &values) == FMOE_BAD_SIZE, "a negative rank");
    expect(fmoe_file_read_f32(NULL, "weight", 0, NULL, &values) == FMOE_NULL_POINTER, "no file");
    expect(fmoe_file_read_f32(file, NULL, 0, NULL, &values) == FMOE_NULL_POINTER, "no name");
    expect(fmoe_file_read_f32(file, "weight", 0, NULL, NULL) == FMOE_NULL_POINTER, "nowhere to put it");
    fmoe_file_close(file);
}

SENTENCE(8, 31, "A file that is not there, a folder and a device are refused without waiting; NULL is refused.",
         "a pipe would be waited for and a device never ends", "the status") {
    const char *const paths[] = {"/no such folder/file", "/tmp", "/dev/zero"};
    for (int i = 0; i < 3; i++) {
        fmoe_file *file = (fmoe_file *)1;
        fmoe_status status = fmoe_file_open(paths[i], &file);
        expect(status == FMOE_IO && file == NULL, "%s: %s", paths[i], fmoe_status_name(status));
        expect(strstr(fmoe_error_message(), paths[i]) != NULL, "the message is \"%s\"", fmoe_error_message());
    }
    fmoe_file *file;
    expect(fmoe_file_open(NULL, &file) == FMOE_NULL_POINTER, "no path");
    expect(fmoe_file_open("x", NULL) == FMOE_NULL_POINTER, "nowhere to put it");
    expect(fmoe_file_parse(NULL, 5, "x", &file) == FMOE_NULL_POINTER, "no bytes");
    expect(fmoe_file_parse("x", 1, NULL, &file) == FMOE_NULL_POINTER, "no name");
    expect(fmoe_file_parse("x", 1, "x", NULL) == FMOE_NULL_POINTER, "nowhere to put it");
    fmoe_file_close(NULL);
    expect(fmoe_file_count(NULL) == 0 && !fmoe_file_tensor(NULL, 0) && !fmoe_file_find(NULL, "x"), "no file");
}

/* ---- A layer's weights ------------------------------------------------------------------------------------------- */

enum { d = 3, I = 5, N = 11, WEIGHTS = 8 }; /* n = 3 */

static const char *const weight_names[WEIGHTS] = {
    "router_gate.weight", "down_embed.weight", "up_embed.weight",          "gate_proj.weight",
    "up_proj.weight",     "down_proj.weight",  "router_norm.running_mean", "router_norm.running_var"};
static const int64_t weight_shapes[WEIGHTS][2] = {{6, d}, {N, d}, {N, d}, {I, d}, {I, d}, {d, I}, {d}, {d}};

/* A layer on disk, without tensor `left_out`, with tensor `misshapen` a row longer; -1 for neither. Weight w holds
 * 100 w, 100 w + 1, ... The file is open and has no name any more. */
static fmoe_file *layer_file(const char *prefix, const char *buffer_suffix, int left_out, int misshapen,
                             const fmoe_metadata *metadata, int64_t num_metadata) {
    static float values[WEIGHTS][64];
    static char names[WEIGHTS][128];
    fmoe_tensor tensors[WEIGHTS];
    int64_t count = 0;
    for (int w = 0; w < WEIGHTS; w++) {
        if (w == left_out)
            continue;
        snprintf(names[w], sizeof names[w], "%s%s%s", prefix, weight_names[w], w >= 6 ? buffer_suffix : "");
        fmoe_tensor *t = &tensors[count++];
        *t = (fmoe_tensor){.name = names[w], .dtype = FMOE_F32, .rank = w < 6 ? 2 : 1, .data = values[w]};
        t->shape[0] = weight_shapes[w][0] + (w == misshapen);
        t->shape[1] = weight_shapes[w][1];
        t->count = t->shape[0] * (w < 6 ? t->shape[1] : 1);
        for (int i = 0; i < 64; i++)
            values[w][i] = (float)(100 * w + i);
    }
    char path[64];
    temporary(path);
    fmoe_file *file;
    cr_assert(fmoe_file_write(path, count, tensors, num_metadata, metadata) == FMOE_OK &&
                  fmoe_file_open(path, &file) == FMOE_OK,
              "%s", fmoe_error_message());
    unlink(path);
    return file;
}

static bool counts_up(const float *values, int w) {
    int64_t count = weight_shapes[w][0] * (w < 6 ? weight_shapes[w][1] : 1);
    for (int64_t i = 0; i < count; i++)
        if (values[i] != (float)(100 * w + i))
            return false;
    return true;
}

SENTENCE(8, 32, "A layer's weights come back under any prefix, with the sizes of their shapes.",
         "a state dict of a whole model has many layers", "the values before writing") {
    static const char *const prefixes[] = {"", "model.layers.3.mlp."}, *const suffixes[] = {"", ".before"};
    for (int i = 0; i < 4; i++) {
        fmoe_file *file = layer_file(prefixes[i / 2], suffixes[i % 2], -1, -1, NULL, 0);
        fmoe_config config = {.num_experts_per_tok = 4, .norm_topk_prob = true};
        fmoe_weights w;
        fmoe_status status = fmoe_weights_load(file, prefixes[i / 2], &config, &w);
        cr_assert(status == FMOE_OK, "%s", fmoe_error_message());
        expect(config.hidden_size == d && config.intermediate_size == I && config.num_experts == N, "sizes");
        expect(config.num_experts_per_tok == 4 && config.norm_topk_prob, "what the caller set did not stay");
        const float *all[] = {w.router_gate, w.down_embed, w.up_embed,     w.gate_proj,
                              w.up_proj,     w.down_proj,  w.running_mean, w.running_var};
        for (int k = 0; k < WEIGHTS; k++)
            expect(counts_up(all[k], k), "%s has other values", weight_names[k]);
        fmoe_weights_free(&w);
        expect(!w.router_gate && !w.running_var, "freed weights still point somewhere");
        expect(fmoe_weights_load(file, "other.", &config, &w) == FMOE_BAD_FILE, "another prefix");
        fmoe_file_close(file);
    }
    fmoe_weights_free(NULL);
}

SENTENCE(8, 33, "num_experts_per_tok and norm_topk_prob come from the metadata, if they are numbers that can be.",
         "they are in no shape", "the metadata as written") {
    const struct {
        const char *K, *norm;
        fmoe_status status;
    } all[] = {{"7", "1", FMOE_OK},       {"9", "0", FMOE_OK},        {"10", "0", FMOE_BAD_FILE},
               {"0", "0", FMOE_BAD_FILE}, {"-1", "0", FMOE_BAD_FILE}, {"7x", "0", FMOE_BAD_FILE},
               {"", "0", FMOE_BAD_FILE},  {"7", "2", FMOE_BAD_FILE},  {"99999999999999999999", "0", FMOE_BAD_FILE}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const fmoe_metadata metadata[] = {{"num_experts_per_tok", all[i].K}, {"norm_topk_prob", all[i].norm}};
        fmoe_file *file = layer_file("", "", -1, -1, metadata, 2);
        fmoe_config config = {.num_experts_per_tok = 2};
        fmoe_weights w;
        fmoe_status status = fmoe_weights_load(file, "", &config, &w);
        expect(status == all[i].status, "K \"%s\", norm \"%s\": %s", all[i].K, all[i].norm, fmoe_status_name(status));
        if (status == FMOE_OK)
            expect(config.num_experts_per_tok == atoi(all[i].K) && config.norm_topk_prob == (*all[i].norm == '1'),
                   "K = %lld, norm = %d", (long long)config.num_experts_per_tok, config.norm_topk_prob);
        else
            expect(config.num_experts_per_tok == 2 && config.hidden_size == 0, "a refused file changed the settings");
        fmoe_weights_free(&w);
        fmoe_file_close(file);
    }
}

SENTENCE(8, 34, "A layer with a weight missing or a row too long is refused, and nothing of it is kept.",
         "half a layer must not run", "each weight in turn") {
    for (int w = 0; w < WEIGHTS; w++)
        for (int misshapen = 0; misshapen < 2; misshapen++) {
            fmoe_file *file = layer_file("", "", misshapen ? -1 : w, misshapen ? w : -1, NULL, 0);
            fmoe_config config = {.num_experts_per_tok = 2};
            fmoe_weights loaded;
            fmoe_status status = fmoe_weights_load(file, "", &config, &loaded);
            expect(status == FMOE_BAD_FILE, "%s %s: %s", weight_names[w], misshapen ? "misshapen" : "missing",
                   fmoe_status_name(status));
            /* A longer down_embed or gate_proj makes its partner the odd one. */
            expect(strstr(fmoe_error_message(), misshapen ? "shape" : weight_names[w]) != NULL, "the message is \"%s\"",
                   fmoe_error_message());
            expect(!loaded.router_gate && !loaded.running_mean, "something was kept");
            expect(config.num_experts == 0, "the settings changed");
            fmoe_weights_free(&loaded);
            fmoe_file_close(file);
        }
}

/* ---- Golden files of one's own ----------------------------------------------------------------------------------- */

/* A golden file made here: a small layer with random weights, and the reference's results. */
typedef struct {
    fmoe_config c;
    bool training;
    int64_t T, n;
    int num_tensors, num_metadata;
    fmoe_tensor tensors[32];
    fmoe_metadata metadata[8];
    float values[32][128];
    int32_t indices[64];
} own_golden;

static float *add_tensor(own_golden *g, const char *name, int64_t rows, int64_t columns, double scale, uint64_t seed) {
    int i = g->num_tensors++;
    cr_assert(i < 32 && rows * columns <= 128);
    g->tensors[i] = (fmoe_tensor){.name = name,
                                  .dtype = FMOE_F32,
                                  .rank = 2,
                                  .shape = {rows, columns},
                                  .count = rows * columns,
                                  .data = g->values[i]};
    fmoe_fill_normal(seed, (uint64_t)i, (float)scale, rows * columns, g->values[i]);
    return g->values[i];
}

static own_golden *new_golden(bool training, bool norm, int64_t K) {
    own_golden *g = zeros(1, sizeof *g);
    int64_t T = g->T = 7, n = g->n = 3;
    uint64_t seed = fresh_seed();
    g->c = (fmoe_config){d, I, N, K, norm};
    g->training = training;
    float *x = add_tensor(g, "x", T, d, 1, seed), *dy = add_tensor(g, "dy", T, d, 1, seed);
    fmoe_weights w = {0};
    w.router_gate = add_tensor(g, "router_gate.weight", 2 * n, d, 1, seed);
    w.down_embed = add_tensor(g, "down_embed.weight", N, d, 1, seed);
    w.up_embed = add_tensor(g, "up_embed.weight", N, d, 1, seed);
    w.gate_proj = add_tensor(g, "gate_proj.weight", I, d, 1, seed);
    w.up_proj = add_tensor(g, "up_proj.weight", I, d, 1, seed);
    w.down_proj = add_tensor(g, "down_proj.weight", d, I, 1, seed);
    const char *before[] = {"router_norm.running_mean.before", "router_norm.running_var.before"};
    const char *after[] = {"router_norm.running_mean.after", "router_norm.running_var.after"};
    float *buffers[2];
    for (int i = 0; i < 2; i++) {
        float *values = add_tensor(g, before[i], 1, d, 0.1, seed);
        buffers[i] = add_tensor(g, after[i], 1, d, 0, seed);
        for (int h = 0; h < d; h++)
            buffers[i][h] = values[h] = values[h] * values[h] + (float)i;
        for (int k = 1; k < 3; k++)
            g->tensors[g->num_tensors - k].rank = 1, g->tensors[g->num_tensors - k].shape[0] = d;
    }
    w.running_mean = buffers[0];
    w.running_var = buffers[1];
    fmoe_outputs out = {.indices = g->indices};
    out.y = add_tensor(g, "y", T, d, 0, seed);
    out.router_logits = add_tensor(g, "router_logits", 2 * T, n, 0, seed);
    g->tensors[g->num_tensors - 1].rank = 3;
    memcpy(g->tensors[g->num_tensors - 1].shape, (int64_t[]){2, T, n}, 3 * sizeof(int64_t));
    out.scores = add_tensor(g, "scores", T, K, 0, seed);
    fmoe_gradients all = {.dx = add_tensor(g, "dx", T, d, 0, seed)};
    all.router_gate = add_tensor(g, "grad.router_gate.weight", 2 * n, d, 0, seed);
    all.down_embed = add_tensor(g, "grad.down_embed.weight", N, d, 0, seed);
    all.up_embed = add_tensor(g, "grad.up_embed.weight", N, d, 0, seed);
    all.gate_proj = add_tensor(g, "grad.gate_proj.weight", I, d, 0, seed);
    all.up_proj = add_tensor(g, "grad.up_proj.weight", I, d, 0, seed);
    all.down_proj = add_tensor(g, "grad.down_proj.weight", d, I, 0, seed);
    g->tensors[g->num_tensors++] = (fmoe_tensor){
        .name = "indices", .dtype = FMOE_I32, .rank = 2, .shape = {T, K}, .count = T * K, .data = g->indices};
    cr_assert(fmoe_layer_forward(&g->c, &w, training, T, x, NULL, &out) == FMOE_OK, "%s", fmoe_error_message());
    cr_assert(fmoe_layer_backward(&g->c, &w, training, T, x, g->indices, dy, FMOE_OVERWRITE, &all) == FMOE_OK, "%s",
              fmoe_error_message());
    static const char *const digits[] = {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"};
    const fmoe_metadata metadata[] = {{"training", digits[training]},
                                      {"norm_topk_prob", digits[norm]},
                                      {"num_experts_per_tok", digits[K]},
                                      {"hidden_size", "3"}};
    memcpy(g->metadata, metadata, sizeof metadata);
    g->num_metadata = 4;
    return g;
}

static int tensor_of(const own_golden *g, const char *name) {
    for (int i = 0; i < g->num_tensors; i++)
        if (strcmp(g->tensors[i].name, name) == 0)
            return i;
    cr_assert(false, "no tensor %s", name);
    return 0;
}

static fmoe_status check_own(const own_golden *g, golden_report *report) {
    char path[64];
    temporary(path);
    cr_assert(fmoe_file_write(path, g->num_tensors, g->tensors, g->num_metadata, g->metadata) == FMOE_OK, "%s",
              fmoe_error_message());
    fmoe_status status = golden_check(path, report);
    unlink(path);
    return status;
}

static void expect_passed(const own_golden *g, int lines, const char *what) {
    golden_report report;
    fmoe_status status = check_own(g, &report);
    expect(status == FMOE_OK, "%s: %s", what, fmoe_error_message());
    for (int i = 0; i < report.num_lines; i++)
        expect(report.lines[i].ok, "%s: %s: error %g", what, report.lines[i].name, report.lines[i].error);
    expect(status != FMOE_OK || report.num_lines == lines, "%s: %d lines, not %d", what, report.num_lines, lines);
}

enum { ALL_LINES = 14 }; /* logits twice, indices, scores, y, two buffers, seven gradients */

SENTENCE(8, 35,
         "A golden file of one's own is checked too: other sizes and ranks, results left out, gradients that cancel.",
         "a reader's model has its own", "the reference's results, written and read back") {
    for (int mode = 0; mode < 4; mode++) {
        own_golden *g OWNED = new_golden(mode & 1, mode & 2, 4);
        expect_passed(g, ALL_LINES, "complete");
        int y = tensor_of(g, "y"), x = tensor_of(g, "x"), dy = tensor_of(g, "dy"), dx = tensor_of(g, "dx");
        const int with_tokens[] = {x, y, dy, dx};
        for (int i = 0; i < 4; i++) {
            fmoe_tensor *t = &g->tensors[with_tokens[i]];
            t->rank = 3;
            memcpy(t->shape, (int64_t[]){1, 7, d}, 3 * sizeof(int64_t));
        }
        expect_passed(g, ALL_LINES, "x of rank 3");
        /* Two places of a token exchanged: the file's choice is as good, and its results belong to it. */
        float *scores = g->values[tensor_of(g, "scores")], score = scores[0];
        int32_t index = g->indices[0];
        scores[0] = scores[1], g->indices[0] = g->indices[1];
        scores[1] = score, g->indices[1] = index;
        expect_passed(g, ALL_LINES, "another order");
        g->tensors[y] = g->tensors[--g->num_tensors]; /* indices in the place of y */
        expect_passed(g, ALL_LINES - 1, "without y");
        g->num_tensors -= 6;
        expect_passed(g, ALL_LINES - 7, "without weight gradients");
        /* One expert, weight 1 whatever its score: no gradient to the router. */
        own_golden *single OWNED = new_golden(mode & 1, true, 1);
        for (int i = 0; i < 18; i++)
            single->values[tensor_of(single, "grad.router_gate.weight")][i] = (float)(i % 3 - 1) * 1e-12f;
        expect_passed(single, ALL_LINES, "gradients that cancel");
    }
}

SENTENCE(8, 36, "Every result that is off is a line FAILED, and only its own; a file that says too little is refused.",
         "a check that cannot fail checks nothing", "each tensor spoilt in turn") {
    static const char *const spoils[] = {"y",
                                         "router_logits",
                                         "scores",
                                         "router_norm.running_mean.after",
                                         "router_norm.running_var.after",
                                         "dx",
                                         "grad.router_gate.weight",
                                         "grad.down_embed.weight",
                                         "grad.up_embed.weight",
                                         "grad.gate_proj.weight",
                                         "grad.up_proj.weight",
                                         "grad.down_proj.weight"};
    own_golden *g OWNED = new_golden(true, false, 4);
    golden_report report;
    for (size_t i = 0; i < sizeof spoils / sizeof *spoils; i++) {
        float *value = g->values[tensor_of(g, spoils[i])], kept = *value;
        *value += 0.01f;
        expect(check_own(g, &report) == FMOE_OK && !golden_passed(&report), "%s spoilt: passed", spoils[i]);
        for (int k = 0; k < report.num_lines; k++)
            expect(report.lines[k].ok != (strcmp(report.lines[k].name, spoils[i]) == 0), "%s spoilt: line %s is %s",
                   spoils[i], report.lines[k].name, report.lines[k].ok ? "ok" : "FAILED");
        *value = kept;
    }
    int32_t index = g->indices[0];
    g->indices[0] = g->indices[1];
    expect(check_own(g, &report) == FMOE_OK && !golden_passed(&report), "the same expert twice: passed");
    g->indices[0] = 9;
    expect(check_own(g, &report) == FMOE_BAD_FILE && strstr(fmoe_error_message(), "indices"), "index 9 of 9");
    g->indices[0] = index;
    for (int i = 0; i < g->num_metadata; i++) {
        fmoe_metadata kept = g->metadata[i];
        g->metadata[i].value = "x";
        expect(check_own(g, &report) == FMOE_BAD_FILE && strstr(fmoe_error_message(), kept.key), "%s = x", kept.key);
        g->metadata[i].key = "other";
        if (strcmp(kept.key, "hidden_size") != 0)
            expect(check_own(g, &report) == FMOE_BAD_FILE && strstr(fmoe_error_message(), kept.key), "no %s", kept.key);
        g->metadata[i] = kept;
    }
    g->metadata[3].value = "4";
    expect(check_own(g, &report) == FMOE_BAD_FILE && strstr(fmoe_error_message(), "hidden_size = 4"), "another size");
    g->metadata[3] = (fmoe_metadata){"hidden_act", "gelu"};
    expect(check_own(g, &report) == FMOE_BAD_FILE && strstr(fmoe_error_message(), "gelu"), "another activation");
    g->num_metadata = 3;
    g->num_tensors = tensor_of(g, "router_norm.running_var.after");
    g->tensors[tensor_of(g, "router_norm.running_mean.after")].name = "something else";
    expect(check_own(g, &report) == FMOE_BAD_FILE && strstr(fmoe_error_message(), "no results"), "no results");
    g->tensors[0].name = "not x";
    expect(check_own(g, &report) == FMOE_BAD_FILE && strstr(fmoe_error_message(), "tensor x: missing"), "no x");
}
