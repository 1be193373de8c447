#include "src/engine.h"

#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/library.h"
#include "src/session_file.h"

const char *ltn_version(void)
{
    return LTN_VERSION;
}

/* ---- choosing a backend -------------------------------------------------------------------------------- */

#define CUDA_LIBRARY "libltn_cuda.so"

static enum ltn_status open_cuda(struct ltn_backend **out, int device, enum ltn_dtype dtype, bool *present,
                                 struct ltn_error *err)
{
    struct ltn_error why = {0};
    void *library = ltn_library_open(CUDA_LIBRARY, present, &why);
    if (!library)
        return ltn_fail(err, why.status, "CUDA: %s", why.text);
    ltn_cuda_open_fn *open;
    *(void **)&open = dlsym(library, LTN_CUDA_ENTRY); /* POSIX's way from a data to a function pointer */
    if (!open)
        return ltn_fail(err, LTN_ERR_DEVICE, "CUDA: %s", dlerror());
    return open(out, device, dtype, err);
}

enum ltn_status ltn_device_check(const char *device, struct ltn_error *err)
{
    int index;
    if (strcmp(device, "auto") == 0 || strcmp(device, "cpu") == 0 || ltn_cuda_device(device, &index))
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "device: expected auto, cpu, cuda or cuda:N, found '%s'", device);
}

enum ltn_status ltn_backend_open(struct ltn_backend **out, const char *device, enum ltn_dtype dtype,
                                 int n_threads, char (*notice)[512], struct ltn_error *err)
{
    bool is_auto = strcmp(device, "auto") == 0, present;
    int index = 0;

    *out = NULL;
    if (notice)
        **notice = 0;
    if (n_threads < 0)
        return ltn_fail(err, LTN_ERR_INPUT, "threads: expected 0 or more, found %d", n_threads);
    LTN_TRY(ltn_device_check(device, err));
    ltn_cuda_device(device, &index);
    if (strcmp(device, "cpu") != 0) {
        struct ltn_error why = {0};
        if (open_cuda(out, index, dtype, &present, &why) == LTN_OK)
            return LTN_OK;
        *out = NULL;
        if (!is_auto)
            return ltn_fail(err, why.status, "%s", why.text);
        if (present && notice)
            snprintf(*notice, sizeof *notice, "using the CPU: %.480s", why.text);
    }
    return ltn_cpu_open(out, n_threads, err);
}

/* ---- opening ------------------------------------------------------------------------------------------- */

static int available_cores(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

static void fill_info(struct ltn_engine *engine, int n_threads)
{
    const struct ltn_checkpoint *cp = &engine->checkpoint;
    const struct ltn_config *c = &cp->config;
    struct ltn_engine_info *info = &engine->info;

    info->vocab_size = c->vocab_size;
    info->embed_dim = c->embed_dim;
    info->n_layers = c->n_layers;
    info->n_heads = c->n_heads;
    info->head_dim = c->head_dim;
    info->bos_id = c->bos_id;
    info->eos_id = c->eos_id;
    info->state_bytes = ltn_state_offset(c, c->n_layers) * sizeof(float);
    info->decode_bytes = 2 * info->state_bytes;
    for (size_t i = 0; i < cp->n_specs; i++) {
        uint64_t count = 1;
        for (int32_t d = 0; d < cp->specs[i].rank; d++)
            count *= (uint64_t)cp->specs[i].shape[d];
        info->n_parameters += count;
        uint64_t bytes = cp->tensors[i]->bytes + (cp->scales[i] ? cp->scales[i]->bytes : 0);
        info->weights_bytes += bytes;
        /* an embedding that is not the head too is read one row at a time */
        if (c->tied || cp->specs[i].slot != LTN_SLOT_EMBED)
            info->decode_bytes += bytes;
    }
    info->chunk_rows = ltn_model_chunk_rows(&engine->model);
    if (engine->be->host_memory)
        info->n_threads = n_threads > 0 ? n_threads : available_cores();
    info->has_tokenizer = engine->tokenizer != NULL;
    info->dtype = ltn_dtype_name(cp->dtype);
    info->backend = engine->be->name;
    info->checksum = cp->checksum;
}

static enum ltn_status parse_prefill(const char *text, bool *fp8, struct ltn_error *err)
{
    *fp8 = text && strcmp(text, "fp8") == 0;
    if (text && !*fp8 && strcmp(text, "exact") != 0)
        return ltn_fail(err, LTN_ERR_INPUT, "prefill: expected \"exact\" or \"fp8\", found \"%.40s\"", text);
    return LTN_OK;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Opens the backend and puts the weights there. */
static enum ltn_status start_on(struct ltn_engine *engine, const char *device,
                                const struct ltn_engine_options *options, struct ltn_error *err)
{
    const double begin = now();
    LTN_TRY(ltn_backend_open(&engine->be, device, engine->checkpoint.dtype, options->n_threads,
                             &engine->notice, err));
    const double open = now();
    engine->info.start_seconds = open - begin;
    LTN_TRY(ltn_model_load(&engine->model, &engine->checkpoint, engine->be, options->progress,
                           options->progress_ctx, err));
    engine->info.load_seconds = now() - open;
    return LTN_OK;
}

/* Whether what a session's passes take fits beside the weights. */
static enum ltn_status try_workspace(const struct ltn_engine *engine, struct ltn_error *err)
{
    struct ltn_workspace ws;
    LTN_TRY(ltn_workspace_create(&ws, &engine->model, ltn_model_chunk_rows(&engine->model), 1, err));
    ltn_workspace_free(&ws);
    return LTN_OK;
}

/* "auto" passes over a device that weights and workspace do not fit, too. */
static enum ltn_status start(struct ltn_engine *engine, const char *device,
                             const struct ltn_engine_options *options, struct ltn_error *err)
{
    struct ltn_error why = {0};
    enum ltn_status status = start_on(engine, device, options, &why);
    const bool may_pass = strcmp(device, "auto") == 0 && engine->be && !engine->be->host_memory;
    if (status == LTN_OK && may_pass)
        status = try_workspace(engine, &why);
    if (status == LTN_ERR_MEMORY && may_pass) {
        ltn_model_free(&engine->model);
        engine->be->ops->close(engine->be);
        engine->be = NULL;
        LTN_TRY(start_on(engine, "cpu", options, err));
        snprintf(engine->notice, sizeof engine->notice, "using the CPU: %.480s", why.text);
        return LTN_OK;
    }
    return status == LTN_OK ? LTN_OK : ltn_fail(err, why.status, "%s", why.text);
}

static enum ltn_status open_all(struct ltn_engine *engine, const char *path,
                                const struct ltn_engine_options *options, struct ltn_error *err)
{
    struct ltn_checkpoint *cp = &engine->checkpoint;
    bool fp8;

    LTN_TRY(parse_prefill(options->prefill, &fp8, err));
    LTN_TRY(ltn_checkpoint_open(cp, path, err));
    if (cp->tokenizer) {
        struct ltn_error why = {0};
        if (ltn_tokenizer_open(&engine->tokenizer, cp->tokenizer, cp->tokenizer_bytes, cp->tokenizer_json,
                               &why) != LTN_OK)
            return ltn_fail(err, why.status, "%s: %.400s", path, why.text);
        if (ltn_tokenizer_size(engine->tokenizer) > cp->config.vocab_size)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "%s: tokenizer: expected at most vocab_size = %d ids, found %d", path,
                            cp->config.vocab_size, ltn_tokenizer_size(engine->tokenizer));
    }
    LTN_TRY(start(engine, options->device ? options->device : "auto", options, err));
    engine->info.notice = *engine->notice ? engine->notice : NULL;
    if (fp8)
        LTN_TRY(ltn_model_prefill_fp8(&engine->model, err));
    fill_info(engine, options->n_threads);
    return ltn_session_file_size(&engine->info.session_bytes, engine, err);
}

enum ltn_status ltn_engine_open(struct ltn_engine **out, const char *path,
                                const struct ltn_engine_options *options, struct ltn_error *err)
{
    *out = NULL;
    struct ltn_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for an engine", path);
    enum ltn_status status = open_all(engine, path, options ? options : &(struct ltn_engine_options){0}, err);
    if (status != LTN_OK) {
        ltn_engine_close(engine);
        return status;
    }
    *out = engine;
    return LTN_OK;
}

void ltn_engine_close(struct ltn_engine *engine)
{
    if (!engine)
        return;
    ltn_model_free(&engine->model);
    if (engine->be)
        engine->be->ops->close(engine->be);
    ltn_tokenizer_close(engine->tokenizer);
    ltn_checkpoint_close(&engine->checkpoint);
    free(engine);
}

const struct ltn_engine_info *ltn_engine_info(const struct ltn_engine *engine)
{
    return &engine->info;
}

const struct ltn_tokenizer *ltn_engine_tokenizer(const struct ltn_engine *engine)
{
    return engine->tokenizer;
}

/* ---- text ---------------------------------------------------------------------------------------------- */

static enum ltn_status need_tokenizer(const struct ltn_engine *engine, struct ltn_error *err)
{
    if (engine->tokenizer)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_UNSUPPORTED, "%s: the model has no tokenizer, only token ids work",
                    engine->checkpoint.file.path);
}

enum ltn_status ltn_engine_tokenize(const struct ltn_engine *engine, const char *text, size_t bytes,
                                    int32_t **ids, size_t *n, struct ltn_error *err)
{
    LTN_TRY(need_tokenizer(engine, err));
    return ltn_tokenize(engine->tokenizer, text, bytes, ids, n, err);
}

struct growing {
    char *text;
    size_t bytes, capacity;
};

static enum ltn_status append(struct growing *g, const char *text, size_t bytes, struct ltn_error *err)
{
    if (g->capacity - g->bytes <= bytes) { /* room for a closing 0 too */
        size_t capacity = 2 * g->capacity + bytes + 256;
        char *grown = realloc(g->text, capacity);
        if (!grown)
            return ltn_fail(err, LTN_ERR_MEMORY, "text: no memory for %zu bytes", capacity);
        g->text = grown;
        g->capacity = capacity;
    }
    if (bytes)
        memcpy(g->text + g->bytes, text, bytes);
    g->bytes += bytes;
    g->text[g->bytes] = 0;
    return LTN_OK;
}

static enum ltn_status detokenize(struct ltn_detokenizer *d, const int32_t *ids, size_t n, struct growing *g,
                                  struct ltn_error *err)
{
    const char *text = "";
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) {
        LTN_TRY(ltn_detokenizer_push(d, ids[i], &text, &bytes, err));
        LTN_TRY(append(g, text, bytes, err));
    }
    LTN_TRY(ltn_detokenizer_finish(d, &text, &bytes, err));
    return append(g, text, bytes, err);
}

enum ltn_status ltn_engine_detokenize(const struct ltn_engine *engine, const int32_t *ids, size_t n,
                                      char **text, size_t *bytes, struct ltn_error *err)
{
    struct ltn_detokenizer *d;
    struct growing g = {0};

    *text = NULL;
    *bytes = 0;
    LTN_TRY(need_tokenizer(engine, err));
    LTN_TRY(ltn_detokenizer_create(&d, engine->tokenizer, err));
    enum ltn_status status = detokenize(d, ids, n, &g, err);
    ltn_detokenizer_free(d);
    if (status != LTN_OK) {
        free(g.text);
        return status;
    }
    *text = g.text;
    *bytes = g.bytes;
    return LTN_OK;
}
