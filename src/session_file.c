#include "src/session_file.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define ZEROS "00000000000000000000000000000000" /* 32 */

static const char *const keys[] = {"format", "version", "model", "position", "seed",
                                   "draw",   "prefix",  "seal",  "checksum"};
enum { N_KEYS = sizeof keys / sizeof *keys, MODEL = 2, POSITION, SEED, DRAW, PREFIX, SEAL, CHECKSUM };

/* values: [N_KEYS]; those that are sealed have 123 characters in all */
static void make_seal(char seal[33], const char *const *values)
{
    char text[160];
    int bytes = snprintf(text, sizeof text, "%s %s %s %s %s", values[MODEL], values[POSITION], values[SEED],
                         values[DRAW], values[PREFIX]);
    XXH128_hash_t digest = XXH3_128bits(text, (size_t)bytes);
    ltn_st_checksum_text(seal, digest.high64, digest.low64);
}

/* ---- the header that a session has --------------------------------------------------------------------- */

struct header {
    struct ltn_st_tensor tensors[LTN_MAX_LAYERS + 2];
    size_t n_tensors;
    char names[LTN_MAX_LAYERS][20];
    char position[24], seed[24], draw[24], seal[33];
    const char *metadata[2 * N_KEYS];
};

static void add(struct header *h, const char *name, enum ltn_st_dtype dtype, int32_t rank, int64_t a,
                int64_t b, int64_t c)
{
    h->tensors[h->n_tensors++] =
        (struct ltn_st_tensor){.name = name,
                               .dtype = dtype,
                               .rank = rank,
                               .shape = {a, b, c},
                               .bytes = ltn_st_dtype_size(dtype) * (uint64_t)(a * b * c)};
}

static void add_tensors(struct header *h, const struct ltn_config *c)
{
    h->n_tensors = 0;
    for (int32_t l = 0; l < c->n_layers; l++) {
        const int64_t rows = (int64_t)ltn_state_floats(c, l) / ((int64_t)c->n_heads * c->head_dim);
        snprintf(h->names[l], sizeof h->names[l], "state.%d", l);
        add(h, h->names[l], LTN_ST_F32, 3, c->n_heads, rows, c->head_dim);
    }
    add(h, "logits", LTN_ST_F32, 1, c->vocab_size, 1, 1);
    add(h, "recent", LTN_ST_I32, 1, LTN_RECENT_IDS, 1, 1);
}

static void make_header(struct header *h, const struct ltn_engine *engine, int64_t position, uint64_t seed,
                        uint64_t draw, const char *prefix)
{
    snprintf(h->position, sizeof h->position, "%019" PRId64, position);
    snprintf(h->seed, sizeof h->seed, "%020" PRIu64, seed);
    snprintf(h->draw, sizeof h->draw, "%020" PRIu64, draw);
    const char *values[N_KEYS] = {"ltn-session", "1",     engine->info.checksum,   h->position,
                                  h->seed,       h->draw, prefix ? prefix : ZEROS, h->seal,
                                  ZEROS};
    make_seal(h->seal, values);
    for (int i = 0; i < N_KEYS; i++) {
        h->metadata[2 * i] = keys[i];
        h->metadata[2 * i + 1] = values[i];
    }
    add_tensors(h, &engine->model.config);
}

/* ---- writing ------------------------------------------------------------------------------------------- */

enum ltn_status ltn_session_file_size(uint64_t *bytes, const struct ltn_engine *engine, struct ltn_error *err)
{
    struct header h;
    make_header(&h, engine, 0, 0, 0, NULL);
    return ltn_st_size(bytes, "session", h.tensors, h.n_tensors, h.metadata, N_KEYS, err);
}

/* A piece of the state on its way from a device, by a thread of its own. */
struct fetch {
    struct ltn_backend *be;
    void *to;
    const uint8_t *from;
    size_t bytes;
    pthread_t thread;
    bool started;
    enum ltn_status status;
    struct ltn_error err;
};

static void *fetch(void *piece)
{
    struct fetch *f = piece;
    f->status = f->be->ops->download(f->be, f->to, f->from, f->bytes, &f->err);
    return NULL;
}

static void begin_fetch(struct fetch *f, const uint8_t *from, size_t bytes)
{
    f->from = from;
    f->bytes = bytes;
    f->started = bytes > 0 && pthread_create(&f->thread, NULL, fetch, f) == 0;
}

static enum ltn_status end_fetch(struct fetch *f, struct ltn_error *err)
{
    if (f->started)
        pthread_join(f->thread, NULL);
    else if (f->bytes > 0)
        fetch(f);
    f->started = false;
    return f->bytes == 0 || f->status == LTN_OK ? LTN_OK : ltn_fail(err, f->err.status, "%s", f->err.text);
}

/* One piece comes from the device while the one before it is summed and written. */
static enum ltn_status write_pieces(struct ltn_backend *be, const uint8_t *state, uint64_t bytes,
                                    uint8_t *room, size_t most, struct ltn_st_writer *writer,
                                    struct ltn_error *err)
{
    struct fetch piece[2] = {{.be = be, .to = room}, {.be = be, .to = room + most}};
    enum ltn_status status = LTN_OK;

    begin_fetch(&piece[0], state, bytes < most ? bytes : most);
    for (int k = 0; bytes > 0 && status == LTN_OK; k ^= 1) {
        const size_t n = piece[k].bytes;
        status = end_fetch(&piece[k], err);
        state += n;
        bytes -= n;
        if (status != LTN_OK)
            break;
        begin_fetch(&piece[k ^ 1], state, bytes < most ? bytes : most);
        status = ltn_st_write(writer, piece[k].to, n, err);
    }
    if (status != LTN_OK)
        for (int k = 0; k < 2; k++)
            if (piece[k].started)
                pthread_join(piece[k].thread, NULL);
    return status;
}

static enum ltn_status write_state(struct ltn_session *s, struct ltn_st_writer *writer, struct ltn_error *err)
{
    enum { PIECE = 4 << 20 };
    struct ltn_backend *be = s->engine->be;
    const uint64_t bytes = s->engine->info.state_bytes;

    if (be->host_memory)
        return ltn_st_write(writer, s->state, bytes, err);
    uint8_t *room = malloc(2 * PIECE);
    if (!room)
        return ltn_fail(err, LTN_ERR_MEMORY, "session: no memory for %d bytes of state", 2 * PIECE);
    enum ltn_status status = write_pieces(be, (const uint8_t *)s->state, bytes, room, PIECE, writer, err);
    free(room);
    return status;
}

static enum ltn_status write_data(struct ltn_session *s, struct ltn_st_writer *writer, struct ltn_error *err)
{
    int32_t recent[LTN_RECENT_IDS] = {0};
    const size_t n_recent = s->pos < LTN_RECENT_IDS ? (size_t)s->pos : LTN_RECENT_IDS;

    LTN_TRY(write_state(s, writer, err));
    if (s->pos == 0)
        memset(s->logits, 0, (size_t)s->engine->info.vocab_size * sizeof *s->logits);
    LTN_TRY(ltn_st_write(writer, s->logits, (size_t)s->engine->info.vocab_size * sizeof *s->logits, err));
    memcpy(recent, s->recent, n_recent * sizeof *recent);
    return ltn_st_write(writer, recent, sizeof recent, err);
}

/* To a file, or into buffer [bytes]. */
static enum ltn_status save(struct ltn_session *s, const char *path, void *buffer, size_t bytes,
                            const char *prefix, struct ltn_error *err)
{
    struct ltn_st_writer *writer;
    struct header h;

    LTN_TRY(ltn_session_settle(s, err));
    make_header(&h, s->engine, s->pos, s->seed, s->draw, prefix);
    if (buffer)
        LTN_TRY(ltn_st_create_memory(&writer, path, buffer, bytes, h.tensors, h.n_tensors, h.metadata, N_KEYS,
                                     err));
    else
        LTN_TRY(ltn_st_create(&writer, path, h.tensors, h.n_tensors, h.metadata, N_KEYS, err));
    enum ltn_status status = write_data(s, writer, err);
    if (status != LTN_OK) {
        ltn_st_abandon(writer);
        return status;
    }
    return ltn_st_finish(writer, err);
}

enum ltn_status ltn_session_file_save(struct ltn_session *session, const char *path, const char *prefix,
                                      struct ltn_error *err)
{
    return save(session, path, NULL, 0, prefix, err);
}

enum ltn_status ltn_session_save(struct ltn_session *session, const char *path, struct ltn_error *err)
{
    return save(session, path, NULL, 0, NULL, err);
}

enum ltn_status ltn_session_file_check(const char *path, struct ltn_error *err)
{
    struct ltn_st_writer *writer;
    LTN_TRY(ltn_st_create(&writer, path, NULL, 0, NULL, 0, err));
    ltn_st_abandon(writer);
    return LTN_OK;
}

/* ---- reading ------------------------------------------------------------------------------------------- */

static bool is_hash(const char *text)
{
    return strlen(text) == 32 && strspn(text, "0123456789abcdef") == 32;
}

/* Exactly `length` digits, in the range of the type. */
static bool parse_number(const char *text, size_t length, uint64_t most, uint64_t *value)
{
    *value = 0;
    if (strlen(text) != length || strspn(text, "0123456789") != length)
        return false;
    for (; *text; text++)
        if (__builtin_mul_overflow(*value, 10, value) ||
            __builtin_add_overflow(*value, (uint64_t)(*text - '0'), value))
            return false;
    return *value <= most;
}

static enum ltn_status read_metadata(struct ltn_session_file *f, struct ltn_error *err)
{
    const struct ltn_st_file *st = &f->file;
    const char *values[N_KEYS];
    uint64_t position;
    char seal[33];

    for (int i = 0; i < N_KEYS; i++) {
        values[i] = ltn_st_metadata(st, keys[i]);
        if (i == 0 && (!values[i] || strcmp(values[i], "ltn-session") != 0))
            return ltn_fail(err, LTN_ERR_INPUT,
                            "%s: not a session file: its metadata says format \"%.40s\", expected "
                            "\"ltn-session\"",
                            st->path, values[i] ? values[i] : "");
        if (!values[i])
            return ltn_fail(err, LTN_ERR_INPUT, "%s: metadata \"%s\" is missing", st->path, keys[i]);
        if (i == 1 && strcmp(values[i], "1") != 0)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "%s: version \"%.40s\" of the session format, this program reads \"1\"", st->path,
                            values[i]);
    }
    if (st->n_metadata != N_KEYS)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: %zu metadata entries, a session file has %d", st->path,
                        st->n_metadata, N_KEYS);
    f->model = values[MODEL];
    f->prefix = values[PREFIX];
    f->checksum = values[CHECKSUM];
    bool good = parse_number(values[POSITION], 19, (uint64_t)1 << 62, &position) &&
                parse_number(values[SEED], 20, UINT64_MAX, &f->seed) &&
                parse_number(values[DRAW], 20, UINT64_MAX, &f->draw) && is_hash(f->model) &&
                is_hash(f->prefix) && is_hash(f->checksum);
    if (!good)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: damaged: its metadata are not the numbers that they should be", st->path);
    make_seal(seal, values);
    if (strcmp(seal, values[SEAL]) != 0)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: damaged: the seal of its metadata is %s, the header says %.40s", st->path, seal,
                        values[SEAL]);
    f->position = (int64_t)position;
    return LTN_OK;
}

/* Is tensor number i of the file this one? */
static enum ltn_status check_tensor(const struct ltn_st_file *st, size_t i, const char *name,
                                    enum ltn_st_dtype dtype, int32_t rank, struct ltn_error *err)
{
    const struct ltn_st_tensor *t = &st->tensors[i];
    if (strcmp(t->name, name) == 0 && t->dtype == dtype && t->rank == rank)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT,
                    "%s: tensor number %zu is \"%.100s\", %s of %d dimensions, expected \"%s\", %s of %d",
                    st->path, i, t->name, ltn_st_dtype_name(t->dtype), t->rank, name,
                    ltn_st_dtype_name(dtype), rank);
}

static enum ltn_status read_tensors(struct ltn_session_file *f, struct ltn_error *err)
{
    const struct ltn_st_file *st = &f->file;
    char name[20];

    if (st->n_tensors < 3 || st->n_tensors > LTN_MAX_LAYERS + 2)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: %zu tensors, a session file has 3 to %d", st->path,
                        st->n_tensors, LTN_MAX_LAYERS + 2);
    f->n_layers = (int32_t)st->n_tensors - 2;
    for (int32_t l = 0; l < f->n_layers; l++) {
        snprintf(name, sizeof name, "state.%d", l);
        LTN_TRY(check_tensor(st, (size_t)l, name, LTN_ST_F32, 3, err));
    }
    LTN_TRY(check_tensor(st, (size_t)f->n_layers, "logits", LTN_ST_F32, 1, err));
    LTN_TRY(check_tensor(st, (size_t)f->n_layers + 1, "recent", LTN_ST_I32, 1, err));
    f->state = st->tensors;
    f->logits = &st->tensors[f->n_layers];
    f->recent = &st->tensors[f->n_layers + 1];
    if (f->recent->shape[0] != LTN_RECENT_IDS)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"recent\" has %" PRId64 " ids, expected %d",
                        st->path, f->recent->shape[0], LTN_RECENT_IDS);
    return LTN_OK;
}

/* The rest of opening, whatever the bytes came from. */
static enum ltn_status read_header(struct ltn_session_file *f, enum ltn_status status, struct ltn_error *err)
{
    if (status == LTN_OK)
        status = read_metadata(f, err);
    if (status == LTN_OK)
        status = read_tensors(f, err);
    if (status != LTN_OK)
        ltn_session_file_close(f);
    return status;
}

enum ltn_status ltn_session_file_open(struct ltn_session_file *f, const char *path, struct ltn_error *err)
{
    *f = (struct ltn_session_file){0};
    return read_header(f, ltn_st_open(&f->file, path, err), err);
}

void ltn_session_file_close(struct ltn_session_file *f)
{
    ltn_st_close(&f->file);
    *f = (struct ltn_session_file){0};
}

enum ltn_status ltn_session_file_verify(const struct ltn_session_file *f, struct ltn_error *err)
{
    const struct ltn_st_file *st = &f->file;
    char text[33];
    XXH128_hash_t digest = XXH3_128bits(st->map + st->data_start, st->size - st->data_start);
    ltn_st_checksum_text(text, digest.high64, digest.low64);
    if (strcmp(text, f->checksum) == 0)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "%s: damaged: the checksum of the data is %s, the header says %s",
                    st->path, text, f->checksum);
}

/* Is it a session of this engine, complete and unaltered? */
static enum ltn_status check_match(const struct ltn_session_file *f, const struct ltn_engine *engine,
                                   const char *prefix, int64_t position, int32_t recent[LTN_RECENT_IDS],
                                   struct ltn_error *err)
{
    const struct ltn_st_file *st = &f->file;
    const int32_t V = engine->info.vocab_size;
    struct header h;

    if (strcmp(f->model, engine->info.checksum) != 0)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: a session of another model: expected one of %s, found %s",
                        st->path, engine->info.checksum, f->model);
    if (prefix && (strcmp(f->prefix, prefix) != 0 || f->position != position))
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: a session of other tokens: expected %" PRId64 " of %s, found %" PRId64 " of %s",
                        st->path, position, prefix, f->position, f->prefix);
    add_tensors(&h, &engine->model.config);
    for (size_t i = 0; i < h.n_tensors; i++)
        if (st->n_tensors != h.n_tensors || st->tensors[i].bytes != h.tensors[i].bytes ||
            memcmp(st->tensors[i].shape, h.tensors[i].shape, (size_t)h.tensors[i].rank * sizeof(int64_t)) !=
                0)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\" has not the shape that the model asks for",
                            st->path, h.tensors[i].name);
    LTN_TRY(ltn_session_file_verify(f, err));
    memcpy(recent, st->map + f->recent->offset, f->recent->bytes);
    for (int i = 0; i < LTN_RECENT_IDS; i++)
        if (recent[i] < 0 || recent[i] >= V)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: recent id %d: expected one from 0 to %d, found %d",
                            st->path, i, V - 1, recent[i]);
    return LTN_OK;
}

static enum ltn_status load(struct ltn_session *s, const struct ltn_session_file *f, const char *prefix,
                            int64_t position, struct ltn_error *err)
{
    struct ltn_backend *be = s->engine->be;
    int32_t recent[LTN_RECENT_IDS];

    LTN_TRY(check_match(f, s->engine, prefix, position, recent, err));
    ltn_session_forget(s);
    LTN_TRY(be->ops->upload(be, s->state, f->file.map + f->state->offset, s->engine->info.state_bytes, err));
    memcpy(s->logits, f->file.map + f->logits->offset, f->logits->bytes);
    memcpy(s->recent, recent, sizeof recent);
    s->logits_where = f->position > 0 ? LTN_ON_HOST : LTN_NOWHERE;
    s->pos = f->position;
    s->seed = f->seed;
    s->draw = f->draw;
    s->failed = false;
    return LTN_OK;
}

enum ltn_status ltn_session_file_load(struct ltn_session *session, const char *path, const char *prefix,
                                      int64_t position, struct ltn_error *err)
{
    struct ltn_session_file f;
    LTN_TRY(ltn_session_file_open(&f, path, err));
    enum ltn_status status = load(session, &f, prefix, position, err);
    ltn_session_file_close(&f);
    return status;
}

enum ltn_status ltn_session_load(struct ltn_session *session, const char *path, struct ltn_error *err)
{
    return ltn_session_file_load(session, path, NULL, 0, err);
}

/* ---- in memory ----------------------------------------------------------------------------------------- */

static enum ltn_status check_size(const struct ltn_session *s, size_t bytes, struct ltn_error *err)
{
    if (bytes == s->engine->info.session_bytes)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "session: expected a buffer of %" PRIu64 " bytes, found %zu",
                    s->engine->info.session_bytes, bytes);
}

enum ltn_status ltn_session_export(struct ltn_session *session, void *buffer, size_t bytes,
                                   struct ltn_error *err)
{
    LTN_TRY(check_size(session, bytes, err));
    return save(session, "session", buffer, bytes, NULL, err);
}

enum ltn_status ltn_session_import(struct ltn_session *session, const void *buffer, size_t bytes,
                                   struct ltn_error *err)
{
    struct ltn_session_file f = {0};
    LTN_TRY(check_size(session, bytes, err));
    LTN_TRY(read_header(&f, ltn_st_open_memory(&f.file, "session", buffer, bytes, err), err));
    enum ltn_status status = load(session, &f, NULL, 0, err);
    ltn_session_file_close(&f);
    return status;
}
