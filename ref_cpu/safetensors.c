/* Weights from disk: the safetensors format (huggingface.co/docs/safetensors).
 *
 *     8 bytes            n, the header's length, little-endian
 *     n bytes            JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
 *     the rest           the tensors' bytes, little-endian, row-major; offsets count from here
 *
 * A file is untrusted. Nothing is allocated beyond a multiple of the file's own size, every offset is checked before a
 * pointer is made of it, and the tensors must cover the data exactly: no byte belongs to two tensors or to none. After
 * fmoe_file_parse has accepted a file, every tensor can be read from end to end.
 */
#include "check.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are used as they lie in the file");

#define LENGTH_BYTES 8
#define MAX_HEADER   100000000 /* the format's own limit */
#define METADATA     "__metadata__"
#define SHAPE_TEXT   (FMOE_MAX_RANK * 24)

struct fmoe_file {
    char *name;
    unsigned char *bytes;
    json_t *header; /* owns the tensors' names and the metadata */
    int64_t count;
    fmoe_tensor *tensors; /* in the order of their data */
};

static const char *const stored_dtype[] = {
    [FMOE_F32] = "F32", [FMOE_F16] = "F16", [FMOE_BF16] = "BF16", [FMOE_I32] = "I32", [FMOE_I64] = "I64",
};
#define NUM_DTYPES ((int)(sizeof stored_dtype / sizeof *stored_dtype))

#define BAD_TENSOR(file, tensor, format, ...)                                                                          \
    fmoe_fail(FMOE_BAD_FILE, "%s: tensor %s: " format, (file)->name, tensor, __VA_ARGS__)

static int64_t tensor_bytes(const fmoe_tensor *tensor) {
    return tensor->count * (int64_t)fmoe_dtype_size(tensor->dtype);
}

/* "[3, 4]" for messages. */
static const char *shape_text(int rank, const int64_t *shape, char text[SHAPE_TEXT]) {
    char *at = text;
    *at++ = '[';
    for (int i = 0; i < rank; i++)
        at += sprintf(at, "%s%lld", i ? ", " : "", (long long)shape[i]);
    strcpy(at, "]");
    return text;
}

/* ---- Reading ----------------------------------------------------------------------------------------------------- */

static fmoe_status parse_dtype(const fmoe_file *file, const char *name, const json_t *value, fmoe_dtype *dtype) {
    const char *text = json_string_value(value);
    if (!text)
        return BAD_TENSOR(file, name, "%s", "no dtype");
    for (int i = 0; i < NUM_DTYPES; i++)
        if (strcmp(text, stored_dtype[i]) == 0) {
            *dtype = (fmoe_dtype)i;
            return FMOE_OK;
        }
    return BAD_TENSOR(file, name, "dtype %.20s is not F32, F16, BF16, I32 or I64", text);
}

static fmoe_status parse_shape(const fmoe_file *file, const char *name, const json_t *value, fmoe_tensor *tensor) {
    if (!json_is_array(value))
        return BAD_TENSOR(file, name, "%s", "no shape");
    size_t rank = json_array_size(value);
    if (rank > FMOE_MAX_RANK)
        return BAD_TENSOR(file, name, "rank %zu exceeds %d", rank, FMOE_MAX_RANK);
    tensor->rank = (int)rank;
    tensor->count = 1;
    for (size_t i = 0; i < rank; i++) {
        const json_t *size = json_array_get(value, i);
        if (!json_is_integer(size) || json_integer_value(size) < 0)
            return BAD_TENSOR(file, name, "size %zu of its shape is not a number of elements", i);
        tensor->shape[i] = json_integer_value(size);
        if (__builtin_mul_overflow(tensor->count, tensor->shape[i], &tensor->count))
            return BAD_TENSOR(file, name, "%s", "the product of its shape overflows");
    }
    int64_t bytes;
    if (__builtin_mul_overflow(tensor->count, (int64_t)fmoe_dtype_size(tensor->dtype), &bytes))
        return BAD_TENSOR(file, name, "%s", "its size in bytes overflows");
    return FMOE_OK;
}

static fmoe_status parse_tensor(const fmoe_file *file, const char *name, const json_t *entry, const unsigned char *data,
                                int64_t data_bytes, fmoe_tensor *tensor) {
    if (!json_is_object(entry))
        return BAD_TENSOR(file, name, "%s", "its entry in the header is not an object");
    tensor->name = name;
    TRY(parse_dtype(file, name, json_object_get(entry, "dtype"), &tensor->dtype));
    TRY(parse_shape(file, name, json_object_get(entry, "shape"), tensor));

    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last))
        return BAD_TENSOR(file, name, "%s", "its data_offsets are not two integers");
    long long begin = json_integer_value(first), end = json_integer_value(last);
    if (begin < 0 || end < begin || end > data_bytes)
        return BAD_TENSOR(file, name, "data_offsets [%lld, %lld] do not lie within the file's %lld bytes of data",
                          begin, end, (long long)data_bytes);
    if (end - begin != tensor_bytes(tensor))
        return BAD_TENSOR(file, name, "data_offsets span %lld bytes, its shape and dtype need %lld", end - begin,
                          (long long)tensor_bytes(tensor));
    tensor->data = data + begin;
    return FMOE_OK;
}

/* By position; an empty tensor before the one that begins where it lies; then by name. */
static int by_position(const void *a, const void *b) {
    const fmoe_tensor *p = a, *q = b;
    if (p->data != q->data)
        return (const char *)p->data < (const char *)q->data ? -1 : 1;
    if (p->count != q->count)
        return p->count < q->count ? -1 : 1;
    return strcmp(p->name, q->name);
}

/* The sorted tensors follow one another from the first byte of data to the last. */
static fmoe_status check_cover(const fmoe_file *file, const unsigned char *data, int64_t data_bytes) {
    int64_t covered = 0;
    for (int64_t i = 0; i < file->count; i++) {
        const fmoe_tensor *tensor = &file->tensors[i];
        int64_t begin = (const unsigned char *)tensor->data - data;
        if (begin < covered)
            return BAD_TENSOR(file, tensor->name, "overlaps tensor %s", file->tensors[i - 1].name);
        if (begin > covered)
            return BAD_TENSOR(file, tensor->name, "the %lld bytes before it belong to no tensor",
                              (long long)(begin - covered));
        covered = begin + tensor_bytes(tensor);
    }
    if (covered < data_bytes)
        return fmoe_fail(FMOE_BAD_FILE, "%s: the last %lld bytes belong to no tensor", file->name,
                         (long long)(data_bytes - covered));
    return FMOE_OK;
}

static fmoe_status check_metadata(const fmoe_file *file) {
    json_t *metadata = json_object_get(file->header, METADATA);
    if (metadata && !json_is_object(metadata))
        return fmoe_fail(FMOE_BAD_FILE, "%s: " METADATA " is not an object", file->name);
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value))
            return fmoe_fail(FMOE_BAD_FILE, "%s: " METADATA " %s is not a string", file->name, key);
    }
    return FMOE_OK;
}

/* Reads the header and everything it says about the file's bytes. */
static fmoe_status parse_header(fmoe_file *file, size_t size) {
    if (size < LENGTH_BYTES)
        return fmoe_fail(FMOE_BAD_FILE, "%s: %zu bytes are too few for a safetensors file", file->name, size);
    uint64_t length;
    memcpy(&length, file->bytes, LENGTH_BYTES);
    if (length > MAX_HEADER)
        return fmoe_fail(FMOE_BAD_FILE, "%s: a header of %llu bytes exceeds the limit of %d: not a safetensors file?",
                         file->name, (unsigned long long)length, MAX_HEADER);
    if (length > size - LENGTH_BYTES)
        return fmoe_fail(FMOE_BAD_FILE, "%s: truncated: the header needs %llu bytes, the file has %zu", file->name,
                         (unsigned long long)length, size - LENGTH_BYTES);
    const char *text = (const char *)file->bytes + LENGTH_BYTES;
    if (length == 0 || *text != '{')
        return fmoe_fail(FMOE_BAD_FILE, "%s: the header does not begin with {: not a safetensors file", file->name);

    json_error_t error;
    file->header = json_loadb(text, length, JSON_REJECT_DUPLICATES, &error);
    if (!file->header)
        return fmoe_fail(FMOE_BAD_FILE, "%s: the header is not JSON: %s at byte %d", file->name, error.text,
                         error.position);
    TRY(check_metadata(file));

    const unsigned char *data = file->bytes + LENGTH_BYTES + length;
    int64_t data_bytes = (int64_t)(size - LENGTH_BYTES - length);
    file->tensors = calloc(json_object_size(file->header) + 1, sizeof *file->tensors);
    if (!file->tensors)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "%s: no memory for %zu tensors", file->name,
                         json_object_size(file->header));
    const char *name;
    json_t *entry;
    json_object_foreach(file->header, name, entry) {
        if (strcmp(name, METADATA) == 0)
            continue;
        TRY(parse_tensor(file, name, entry, data, data_bytes, &file->tensors[file->count]));
        file->count++;
    }
    qsort(file->tensors, (size_t)file->count, sizeof *file->tensors, by_position);
    return check_cover(file, data, data_bytes);
}

/* A file object with room for its bytes. */
static fmoe_status new_file(const char *name, size_t size, fmoe_file **file) {
    fmoe_file *f = calloc(1, sizeof *f);
    if (f) {
        f->name = strdup(name);
        f->bytes = malloc(size + 1);
    }
    if (!f || !f->name || !f->bytes) {
        fmoe_file_close(f);
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "%s: no memory for %zu bytes", name, size);
    }
    *file = f;
    return FMOE_OK;
}

fmoe_status fmoe_file_parse(const void *bytes, size_t size, const char *name, fmoe_file **file) {
    if (!file)
        return fmoe_fail(FMOE_NULL_POINTER, "file is NULL");
    *file = NULL;
    if (!bytes || !name)
        return fmoe_fail(FMOE_NULL_POINTER, "%s is NULL", bytes ? "name" : "bytes");
    fmoe_file *f = NULL;
    TRY(new_file(name, size, &f));
    memcpy(f->bytes, bytes, size);
    fmoe_status status = parse_header(f, size);
    if (status == FMOE_OK)
        *file = f;
    else
        fmoe_file_close(f);
    return status;
}

/* Only regular files: a pipe or a device has no size to hold the header against. */
static fmoe_status read_bytes(const char *path, fmoe_file **file, size_t *size) {
    struct stat about;
    if (stat(path, &about) != 0)
        return fmoe_fail(FMOE_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(about.st_mode))
        return fmoe_fail(FMOE_IO, "%s: not a regular file", path);
    FILE *stream = fopen(path, "rb");
    if (!stream)
        return fmoe_fail(FMOE_IO, "%s: %s", path, strerror(errno));
    *size = (size_t)about.st_size;
    fmoe_status status = new_file(path, *size, file);
    if (status == FMOE_OK && fread((*file)->bytes, 1, *size, stream) != *size)
        status = fmoe_fail(FMOE_IO, "%s: could not read %zu bytes", path, *size);
    fclose(stream);
    return status;
}

fmoe_status fmoe_file_open(const char *path, fmoe_file **file) {
    if (!file)
        return fmoe_fail(FMOE_NULL_POINTER, "file is NULL");
    *file = NULL;
    if (!path)
        return fmoe_fail(FMOE_NULL_POINTER, "path is NULL");
    fmoe_file *f = NULL;
    size_t size = 0;
    fmoe_status status = read_bytes(path, &f, &size);
    if (status == FMOE_OK)
        status = parse_header(f, size);
    if (status == FMOE_OK)
        *file = f;
    else
        fmoe_file_close(f);
    return status;
}

void fmoe_file_close(fmoe_file *file) {
    if (!file)
        return;
    json_decref(file->header);
    free(file->tensors);
    free(file->bytes);
    free(file->name);
    free(file);
}

int64_t fmoe_file_count(const fmoe_file *file) {
    return file ? file->count : 0;
}

const fmoe_tensor *fmoe_file_tensor(const fmoe_file *file, int64_t i) {
    return file && i >= 0 && i < file->count ? &file->tensors[i] : NULL;
}

const fmoe_tensor *fmoe_file_find(const fmoe_file *file, const char *name) {
    for (int64_t i = 0; name && i < fmoe_file_count(file); i++)
        if (strcmp(file->tensors[i].name, name) == 0)
            return &file->tensors[i];
    return NULL;
}

const char *fmoe_file_metadata(const fmoe_file *file, const char *key) {
    return file && key ? json_string_value(json_object_get(json_object_get(file->header, METADATA), key)) : NULL;
}

/* Stored values to float32, by way of a small aligned buffer: in the file they may lie at any byte. */
static void convert(const fmoe_tensor *tensor, float *values) {
    float buffer[256];
    int64_t size = (int64_t)fmoe_dtype_size(tensor->dtype), step = (int64_t)sizeof buffer / size;
    for (int64_t i = 0; i < tensor->count; i += step) {
        int64_t count = tensor->count - i < step ? tensor->count - i : step;
        memcpy(buffer, (const char *)tensor->data + i * size, (size_t)(count * size));
        fmoe_to_f32(tensor->dtype, count, buffer, values + i);
    }
}

fmoe_status fmoe_file_read_f32(const fmoe_file *file, const char *name, int rank, const int64_t *shape,
                               float **values) {
    if (!values)
        return fmoe_fail(FMOE_NULL_POINTER, "values is NULL");
    *values = NULL;
    if (!file || !name || (rank > 0 && !shape))
        return fmoe_fail(FMOE_NULL_POINTER, "%s is NULL", !file ? "file" : !name ? "name" : "shape");
    if (rank < 0 || rank > FMOE_MAX_RANK)
        return fmoe_fail(FMOE_BAD_SIZE, "rank = %d is not within 0 and %d", rank, FMOE_MAX_RANK);
    const fmoe_tensor *tensor = fmoe_file_find(file, name);
    if (!tensor)
        return BAD_TENSOR(file, name, "%s", "missing");
    if (tensor->dtype == FMOE_I32 || tensor->dtype == FMOE_I64)
        return BAD_TENSOR(file, name, "dtype %s is not a float type", stored_dtype[tensor->dtype]);
    if (tensor->rank != rank || (rank > 0 && memcmp(tensor->shape, shape, (size_t)rank * sizeof *shape) != 0)) {
        char found[SHAPE_TEXT], wanted[SHAPE_TEXT];
        return BAD_TENSOR(file, name, "shape %s is not %s", shape_text(tensor->rank, tensor->shape, found),
                          shape_text(rank, shape, wanted));
    }
    *values = fmoe_allocate(tensor->count, sizeof **values);
    if (!*values)
        return fmoe_no_memory(tensor->count, sizeof **values);
    convert(tensor, *values);
    return FMOE_OK;
}

/* ---- Writing ----------------------------------------------------------------------------------------------------- */

/* A tensor to write must be one that the reader would accept. */
static fmoe_status check_tensor(const fmoe_tensor *tensor) {
    if (!tensor->name)
        return fmoe_fail(FMOE_NULL_POINTER, "a tensor's name is NULL");
    if (tensor->rank < 0 || tensor->rank > FMOE_MAX_RANK)
        return fmoe_fail(FMOE_BAD_SIZE, "tensor %s: rank = %d is not within 0 and %d", tensor->name, tensor->rank,
                         FMOE_MAX_RANK);
    if ((int)tensor->dtype < 0 || (int)tensor->dtype >= NUM_DTYPES)
        return fmoe_fail(FMOE_UNSUPPORTED, "tensor %s: dtype = %d is unknown", tensor->name, (int)tensor->dtype);
    int64_t bytes = (int64_t)fmoe_dtype_size(tensor->dtype), count = 1;
    for (int i = 0; i < tensor->rank; i++) {
        if (tensor->shape[i] < 0)
            return fmoe_fail(FMOE_BAD_SIZE, "tensor %s: shape[%d] = %lld is negative", tensor->name, i,
                             (long long)tensor->shape[i]);
        if (__builtin_mul_overflow(count, tensor->shape[i], &count))
            return fmoe_fail(FMOE_OVERFLOW, "tensor %s: the product of its shape overflows", tensor->name);
    }
    if (__builtin_mul_overflow(bytes, count, &bytes))
        return fmoe_fail(FMOE_OVERFLOW, "tensor %s: its size in bytes overflows", tensor->name);
    if (count != tensor->count)
        return fmoe_fail(FMOE_BAD_SIZE, "tensor %s: count = %lld, its shape holds %lld", tensor->name,
                         (long long)tensor->count, (long long)count);
    if (count > 0 && !tensor->data)
        return fmoe_fail(FMOE_NULL_POINTER, "tensor %s: data is NULL", tensor->name);
    return FMOE_OK;
}

static fmoe_status add_metadata(json_t *header, int64_t num_metadata, const fmoe_metadata *metadata) {
    if (num_metadata == 0)
        return FMOE_OK;
    json_t *object = json_object();
    if (json_object_set_new(header, METADATA, object) != 0)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "no memory for the metadata");
    for (int64_t i = 0; i < num_metadata; i++) {
        if (!metadata[i].key || !metadata[i].value)
            return fmoe_fail(FMOE_NULL_POINTER, "metadata %lld has a key or value that is NULL", (long long)i);
        if (json_object_set_new(object, metadata[i].key, json_string(metadata[i].value)) != 0)
            return fmoe_fail(FMOE_BAD_FILE, "metadata %s is not UTF-8", metadata[i].key);
    }
    return FMOE_OK;
}

static fmoe_status add_tensor(json_t *header, const fmoe_tensor *tensor, int64_t *offset) {
    TRY(check_tensor(tensor));
    if (strcmp(tensor->name, METADATA) == 0 || json_object_get(header, tensor->name))
        return fmoe_fail(FMOE_BAD_FILE, "tensor %s: the name is taken", tensor->name);
    int64_t begin = *offset;
    if (__builtin_add_overflow(begin, tensor_bytes(tensor), offset))
        return fmoe_fail(FMOE_OVERFLOW, "tensor %s: the file's size overflows", tensor->name);
    json_t *shape = json_array();
    for (int i = 0; i < tensor->rank; i++)
        json_array_append_new(shape, json_integer(tensor->shape[i]));
    json_t *entry = json_pack("{s:s, s:o, s:[I, I]}", "dtype", stored_dtype[tensor->dtype], "shape", shape,
                              "data_offsets", (json_int_t)begin, (json_int_t)*offset);
    if (!entry)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "tensor %s: no memory for the header", tensor->name);
    if (json_object_set_new(header, tensor->name, entry) != 0)
        return fmoe_fail(FMOE_BAD_FILE, "tensor %s: the name is not UTF-8", tensor->name);
    return FMOE_OK;
}

/* The header, padded with blanks so that the data begin at a multiple of 8. */
static bool write_parts(FILE *stream, const char *header, int64_t num_tensors, const fmoe_tensor *tensors) {
    size_t length = strlen(header);
    uint64_t padded = (length + 7) / 8 * 8;
    bool ok = fwrite(&padded, LENGTH_BYTES, 1, stream) == 1;
    ok = ok && fprintf(stream, "%-*s", (int)padded, header) == (int)padded;
    for (int64_t i = 0; ok && i < num_tensors; i++) {
        size_t bytes = (size_t)tensor_bytes(&tensors[i]);
        ok = bytes == 0 || fwrite(tensors[i].data, 1, bytes, stream) == bytes;
    }
    return ok;
}

static fmoe_status write_file(const char *path, const char *header, int64_t num_tensors, const fmoe_tensor *tensors) {
    if (strlen(header) + 7 > MAX_HEADER)
        return fmoe_fail(FMOE_OVERFLOW, "%s: a header of %zu bytes exceeds the limit of %d", path, strlen(header),
                         MAX_HEADER);
    FILE *stream = fopen(path, "wb");
    if (!stream)
        return fmoe_fail(FMOE_IO, "%s: %s", path, strerror(errno));
    bool ok = write_parts(stream, header, num_tensors, tensors);
    int error = errno;
    if (fclose(stream) != 0 && ok) {
        ok = false;
        error = errno;
    }
    return ok ? FMOE_OK : fmoe_fail(FMOE_IO, "%s: %s", path, strerror(error));
}

fmoe_status fmoe_file_write(const char *path, int64_t num_tensors, const fmoe_tensor *tensors, int64_t num_metadata,
                            const fmoe_metadata *metadata) {
    if (!path)
        return fmoe_fail(FMOE_NULL_POINTER, "path is NULL");
    if (num_tensors < 0 || num_metadata < 0)
        return fmoe_fail(FMOE_BAD_SIZE, "%s = %lld is negative", num_tensors < 0 ? "num_tensors" : "num_metadata",
                         (long long)(num_tensors < 0 ? num_tensors : num_metadata));
    if ((num_tensors > 0 && !tensors) || (num_metadata > 0 && !metadata))
        return fmoe_fail(FMOE_NULL_POINTER, "%s is NULL", num_tensors > 0 && !tensors ? "tensors" : "metadata");
    json_t *header = json_object();
    fmoe_status status = add_metadata(header, num_metadata, metadata);
    int64_t offset = 0;
    for (int64_t i = 0; status == FMOE_OK && i < num_tensors; i++)
        status = add_tensor(header, &tensors[i], &offset);
    if (status == FMOE_OK) {
        char *text = json_dumps(header, JSON_COMPACT);
        status = text ? write_file(path, text, num_tensors, tensors)
                      : fmoe_fail(FMOE_OUT_OF_MEMORY, "%s: no memory for the header", path);
        free(text);
    }
    json_decref(header);
    return status;
}

/* ---- A layer's weights ------------------------------------------------------------------------------------------- */

/* The caller frees the name. NULL if there is no memory. */
static char *join(const char *a, const char *b, const char *c) {
    char *name;
    return asprintf(&name, "%s%s%s", a, b, c) < 0 ? NULL : name;
}

/* The sizes of a matrix that a layer's configuration is taken from. */
static fmoe_status matrix_sizes(const fmoe_file *file, const char *prefix, const char *suffix, int64_t *rows,
                                int64_t *columns) {
    char *name = join(prefix, suffix, ""), text[SHAPE_TEXT];
    if (!name)
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "%s: no memory for a name", file->name);
    const fmoe_tensor *tensor = fmoe_file_find(file, name);
    fmoe_status status = FMOE_OK;
    if (!tensor)
        status = BAD_TENSOR(file, name, "%s", "missing");
    else if (tensor->rank != 2 || tensor->count == 0)
        status =
            BAD_TENSOR(file, name, "shape %s is not that of a matrix", shape_text(tensor->rank, tensor->shape, text));
    else {
        *rows = tensor->shape[0];
        *columns = tensor->shape[1];
    }
    free(name);
    return status;
}

/* prefix + suffix, or that with ".before" appended, as the golden files call the buffers that training moves. */
static fmoe_status read_weight(const fmoe_file *file, const char *prefix, const char *suffix, int rank,
                               const int64_t *shape, float **values) {
    char *name = join(prefix, suffix, ""), *before = join(prefix, suffix, ".before");
    fmoe_status status;
    if (!name || !before)
        status = fmoe_fail(FMOE_OUT_OF_MEMORY, "%s: no memory for a name", file->name);
    else if (!fmoe_file_find(file, name) && fmoe_file_find(file, before))
        status = fmoe_file_read_f32(file, before, rank, shape, values);
    else
        status = fmoe_file_read_f32(file, name, rank, shape, values);
    free(name);
    free(before);
    return status;
}

/* A whole number in the metadata; *value stays as it is where there is none. */
static fmoe_status metadata_integer(const fmoe_file *file, const char *key, int64_t low, int64_t high, int64_t *value) {
    const char *text = fmoe_file_metadata(file, key);
    if (!text)
        return FMOE_OK;
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0 || number < low || number > high)
        return fmoe_fail(FMOE_BAD_FILE, "%s: metadata %s = \"%.40s\" is not a number within %lld and %lld", file->name,
                         key, text, (long long)low, (long long)high);
    *value = number;
    return FMOE_OK;
}

static fmoe_status read_config(const fmoe_file *file, const char *prefix, fmoe_config *config) {
    int64_t columns;
    TRY(matrix_sizes(file, prefix, "down_embed.weight", &config->num_experts, &config->hidden_size));
    TRY(matrix_sizes(file, prefix, "gate_proj.weight", &config->intermediate_size, &columns));
    int64_t n = fmoe_num_keys(config->num_experts), norm = config->norm_topk_prob;
    TRY(metadata_integer(file, "num_experts_per_tok", 1, n * n, &config->num_experts_per_tok));
    TRY(metadata_integer(file, "norm_topk_prob", 0, 1, &norm));
    config->norm_topk_prob = norm;
    return FMOE_OK;
}

fmoe_status fmoe_weights_load(const fmoe_file *file, const char *prefix, fmoe_config *config, fmoe_weights *weights) {
    if (!file || !prefix || !config || !weights)
        return fmoe_fail(FMOE_NULL_POINTER, "%s is NULL",
                         !file     ? "file"
                         : !prefix ? "prefix"
                         : !config ? "config"
                                   : "weights");
    *weights = (fmoe_weights){0};
    fmoe_config c = *config;
    TRY(read_config(file, prefix, &c));
    int64_t d = c.hidden_size, I = c.intermediate_size, N = c.num_experts, n = fmoe_num_keys(N);
    const struct {
        const char *suffix;
        int rank;
        int64_t shape[2];
    } all[] = {
        {"router_gate.weight", 2, {2 * n, d}}, {"down_embed.weight", 2, {N, d}},    {"up_embed.weight", 2, {N, d}},
        {"gate_proj.weight", 2, {I, d}},       {"up_proj.weight", 2, {I, d}},       {"down_proj.weight", 2, {d, I}},
        {"router_norm.running_mean", 1, {d}},  {"router_norm.running_var", 1, {d}},
    };
    float *values[sizeof all / sizeof *all] = {0};
    fmoe_status status = FMOE_OK;
    for (size_t i = 0; status == FMOE_OK && i < sizeof all / sizeof *all; i++)
        status = read_weight(file, prefix, all[i].suffix, all[i].rank, all[i].shape, &values[i]);
    *weights = (fmoe_weights){values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]};
    if (status == FMOE_OK)
        *config = c;
    else
        fmoe_weights_free(weights);
    return status;
}

void fmoe_weights_free(fmoe_weights *weights) {
    if (!weights)
        return;
    free((void *)weights->router_gate);
    free((void *)weights->down_embed);
    free((void *)weights->up_embed);
    free((void *)weights->gate_proj);
    free((void *)weights->up_proj);
    free((void *)weights->down_proj);
    free(weights->running_mean);
    free(weights->running_var);
    *weights = (fmoe_weights){0};
}
