#include "tools/quantize.h"

#include "kernels/cpu/pool.h"
#include "kernels/quant.h"
#include "tools/calibrate.h"
#include "tools/feedback.h"

#include <inttypes.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_AT_ONCE = 256 };

/* A quantised matrix on its way into the file. */
struct made {
    uint8_t *codes, *scales; /* NULL: not made yet, or written */
};

struct job {
    const struct ltn_checkpoint *src;
    const struct ltn_quantize_options *options;
    struct ltn_calibration *calibration; /* NULL: to the nearest code */
    struct made *made;                   /* [n_specs] */
    struct pool *pool;
    int n_threads;
    uint64_t done, total; /* parameters */
    struct ltn_error *err;
};

static enum ltn_status step(struct job *j, uint64_t parameters)
{
    j->done += parameters;
    if (!j->options->progress)
        return LTN_OK;
    enum ltn_status status = j->options->progress(j->options->ctx, j->done, j->total);
    return status == LTN_OK ? status : ltn_fail(j->err, status, "stopped");
}

/* ---- a matrix ------------------------------------------------------------------------------------------ */

static enum ltn_status read_row(const struct job *j, size_t spec, size_t row, float *out,
                                struct ltn_error *err)
{
    const struct ltn_st_tensor *t = j->src->tensors[spec];
    size_t cols = (size_t)t->shape[1], size = ltn_st_dtype_size(t->dtype);
    const uint8_t *from = j->src->file.map + t->offset + row * cols * size;
    enum ltn_dtype dtype;
    ltn_checkpoint_dtype(&dtype, t->dtype);
    for (size_t i = 0; i < cols; i++) {
        uint32_t word = 0; /* a tensor behind an odd one lies at any address */
        memcpy(&word, from + i * size, size);
        out[i] = ltn_load(&word, dtype, 0);
    }
    size_t bad = ltn_first_not_finite(out, LTN_F32, cols);
    if (bad == cols)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\", element %zu: %g is not a finite number",
                    j->src->file.path, t->name, row * cols + bad, (double)out[bad]);
}

/* A run of rows of one matrix, shared out among threads. */
struct rows_job {
    const struct job *job;
    size_t spec;
    enum ltn_dtype dtype;
    const struct ltn_feedback *feedback;  /* NULL: to the nearest code */
    float *room;                          /* [n_threads, room_floats] */
    size_t room_floats;                   /* a row and its scratch */
    size_t first;                         /* row of task 0 */
    enum ltn_status status[ROWS_AT_ONCE]; /* of each row */
    struct ltn_error errors[ROWS_AT_ONCE];
};

static enum ltn_status quantise_row(const struct rows_job *rj, size_t row, float *w, struct ltn_error *err)
{
    const struct ltn_tensor_spec *s = &rj->job->src->specs[rj->spec];
    const struct made *made = &rj->job->made[rj->spec];
    size_t cols = (size_t)s->shape[1];
    uint8_t *codes = made->codes + row * ltn_row_bytes(rj->dtype, cols);
    uint8_t *scales = made->scales + row * ltn_row_scale_bytes(rj->dtype, cols);
    LTN_TRY(read_row(rj->job, rj->spec, row, w, err));
    if (rj->feedback
            ? ltn_feedback_row(rj->feedback, rj->dtype, LTN_FEEDBACK_SWEEPS, w, w + cols, codes, scales)
            : ltn_quantise_row(rj->dtype, w, cols, codes, scales))
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\", row %zu: a weight is beyond the range of %s",
                    rj->job->src->file.path, s->name, row, ltn_dtype_name(rj->dtype));
}

static void quantise_task(void *ctx, int64_t task, int worker)
{
    struct rows_job *rj = ctx;
    float *w = rj->room + (size_t)worker * rj->room_floats;
    rj->status[task] = quantise_row(rj, rj->first + (size_t)task, w, &rj->errors[task]);
}

static enum ltn_status quantise_rows(struct job *j, struct rows_job *rj)
{
    const struct ltn_tensor_spec *s = &j->src->specs[rj->spec];
    size_t rows = (size_t)s->shape[0];
    for (size_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        size_t n = rows - first < ROWS_AT_ONCE ? rows - first : ROWS_AT_ONCE;
        rj->first = first;
        pool_run(j->pool, (int64_t)n, quantise_task, rj);
        for (size_t i = 0; i < n; i++)
            if (rj->status[i] != LTN_OK)
                return ltn_fail(j->err, rj->status[i], "%s", rj->errors[i].text);
        LTN_TRY(step(j, n * (size_t)s->shape[1]));
    }
    return LTN_OK;
}

static enum ltn_status make(struct job *j, size_t spec, enum ltn_dtype dtype)
{
    const struct ltn_tensor_spec *s = &j->src->specs[spec];
    size_t rows = (size_t)s->shape[0], cols = (size_t)s->shape[1];
    struct made *made = &j->made[spec];
    struct rows_job *rj = calloc(1, sizeof *rj);
    struct ltn_feedback feedback = {0};
    const float *gram = NULL;
    const size_t room_floats = cols + ltn_feedback_room(cols);
    float *room = malloc((size_t)j->n_threads * room_floats * sizeof *room);
    made->codes = malloc(rows * ltn_row_bytes(dtype, cols));
    made->scales = malloc(rows * ltn_row_scale_bytes(dtype, cols));
    enum ltn_status status = LTN_OK;
    if (!rj || !room || !made->codes || !made->scales)
        status = ltn_fail(j->err, LTN_ERR_MEMORY, "no memory for tensor \"%s\"", s->name);
    if (status == LTN_OK && j->calibration && ltn_calibration_listens(j->src, spec))
        status = ltn_calibration_gram(j->calibration, spec, &gram, j->err);
    if (status == LTN_OK && gram)
        status = ltn_feedback_open(&feedback, gram, cols, s->name, j->err);
    if (status == LTN_OK) {
        rj->job = j;
        rj->spec = spec;
        rj->dtype = dtype;
        rj->feedback = gram ? &feedback : NULL;
        rj->room = room;
        rj->room_floats = room_floats;
        status = quantise_rows(j, rj);
    }
    free(rj);
    ltn_feedback_close(&feedback);
    free(room);
    return status;
}

/* ---- the file ------------------------------------------------------------------------------------------ */

static enum ltn_status write_tensor(struct job *j, struct ltn_st_writer *writer, const struct ltn_stored *t)
{
    const struct ltn_tensor_spec *spec = &j->src->specs[t->spec];
    const struct ltn_st_tensor *from = j->src->tensors[t->spec];
    enum ltn_dtype dtype = ltn_checkpoint_matrix_dtype(j->options->dtype, spec);
    if (!spec->is_matrix) {
        LTN_TRY(step(j, from->bytes / ltn_st_dtype_size(from->dtype)));
        return ltn_st_write(writer, j->src->file.map + from->offset, from->bytes, j->err);
    }
    struct made *made = &j->made[t->spec];
    if (!made->codes && !made->scales)
        LTN_TRY(make(j, t->spec, dtype));
    uint8_t **part = t->is_scales ? &made->scales : &made->codes;
    enum ltn_status status = ltn_st_write(writer, *part, t->bytes, j->err);
    free(*part);
    *part = NULL;
    return status;
}

static enum ltn_status write_file(struct job *j, const char *path, const char *provenance,
                                  const struct ltn_stored *stored, size_t n, size_t *order,
                                  struct ltn_st_tensor *tensors)
{
    const struct ltn_checkpoint *src = j->src;
    const char *metadata[] = {
        "format",     "ltn",
        "version",    "1",
        "config",     ltn_st_metadata(&src->file, "config"),
        "dtype",      ltn_checkpoint_dtype_key(j->options->dtype),
        "checksum",   "00000000000000000000000000000000",
        "tokenizer",  src->tokenizer_json,
        "provenance", provenance,
    };
    for (size_t i = 0; i < n; i++) {
        const struct ltn_stored *t = &stored[order[i]];
        const struct ltn_st_tensor *from = src->tensors[t->spec];
        bool as_is = !src->specs[t->spec].is_matrix;
        tensors[i] = (struct ltn_st_tensor){.name = t->name,
                                            .dtype = as_is ? from->dtype : t->dtype,
                                            .rank = t->rank,
                                            .bytes = as_is ? from->bytes : t->bytes};
        memcpy(tensors[i].shape, t->shape, sizeof t->shape);
    }
    size_t all = n;
    if (src->tokenizer)
        tensors[all++] = src->file.tensors[src->file.n_tensors - 1];
    struct ltn_st_writer *writer;
    LTN_TRY(
        ltn_st_create(&writer, path, tensors, all, metadata, sizeof metadata / sizeof *metadata / 2, j->err));
    enum ltn_status status = LTN_OK;
    for (size_t i = 0; i < n && status == LTN_OK; i++)
        status = write_tensor(j, writer, &stored[order[i]]);
    if (status == LTN_OK && src->tokenizer)
        status = ltn_st_write(writer, src->tokenizer, src->tokenizer_bytes, j->err);
    if (status == LTN_OK)
        return ltn_st_finish(writer, j->err);
    ltn_st_abandon(writer);
    return status;
}

static enum ltn_status quantise(struct job *j, const char *path)
{
    const struct ltn_checkpoint *src = j->src;
    struct ltn_stored *stored;
    size_t n;
    LTN_TRY(ltn_checkpoint_stored(&stored, &n, src->specs, src->n_specs, j->options->dtype, j->err));
    struct ltn_st_tensor *tensors = calloc(n + 1, sizeof *tensors);
    uint64_t *bytes = calloc(n, sizeof *bytes);
    size_t *order = calloc(n, sizeof *order);
    char *provenance = NULL;
    if (asprintf(&provenance, "%s; %s %s by ltn-convert %s", ltn_st_metadata(&src->file, "provenance"),
                 ltn_checkpoint_dtype_key(j->options->dtype),
                 j->calibration ? "calibrated by a text" : "to the nearest", LTN_VERSION) < 0)
        provenance = NULL;
    enum ltn_status status = LTN_OK;
    if (!tensors || !bytes || !order || !provenance)
        status = ltn_fail(j->err, LTN_ERR_MEMORY, "no memory for %zu tensors", n);
    for (size_t i = 0; i < n && status == LTN_OK; i++) {
        const struct ltn_st_tensor *from = src->tensors[stored[i].spec];
        bool is_matrix = src->specs[stored[i].spec].is_matrix;
        bytes[i] = is_matrix ? stored[i].bytes : from->bytes;
        if (!stored[i].is_scales)
            j->total += from->bytes / ltn_st_dtype_size(from->dtype);
    }
    if (status == LTN_OK) {
        ltn_checkpoint_order(order, bytes, n);
        status = write_file(j, path, provenance, stored, n, order, tensors);
    }
    free(stored);
    free(tensors);
    free(bytes);
    free(order);
    free(provenance);
    return status;
}

enum ltn_status ltn_quantize(const struct ltn_checkpoint *src, const char *path,
                             const struct ltn_quantize_options *options, struct ltn_error *err)
{
    cpu_set_t cores;
    struct job j = {.src = src, .options = options, .err = err, .n_threads = options->n_threads};
    if (j.n_threads <= 0)
        j.n_threads = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    if (ltn_is_quantised(src->dtype))
        return ltn_fail(err, LTN_ERR_INPUT, "%s: already quantised, to %s: expected f32, bf16 or f16",
                        src->file.path, ltn_checkpoint_dtype_key(src->dtype));
    enum ltn_status status = LTN_OK;
    j.made = calloc(src->n_specs, sizeof *j.made);
    if (!j.made)
        status = ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu tensors", src->n_specs);
    if (status == LTN_OK)
        status = pool_open(&j.pool, j.n_threads, err);
    if (status == LTN_OK && options->calibrate) /* else the text would carry one bad weight into all sums */
        status = ltn_checkpoint_verify(src, err);
    if (status == LTN_OK && options->calibrate)
        status = ltn_calibration_open(&j.calibration, src, options->calibrate, options->n_threads, err);
    if (status == LTN_OK)
        status = quantise(&j, path);
    for (size_t i = 0; j.made && i < src->n_specs; i++) {
        free(j.made[i].codes);
        free(j.made[i].scales);
    }
    free(j.made);
    pool_close(j.pool);
    ltn_calibration_close(j.calibration);
    return status;
}
