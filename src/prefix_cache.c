#include "src/prefix_cache.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "src/session_file.h"

enum {
    FIRST = 256,      /* tokens before the first entry on the way */
    STRIDE = 1 << 20, /* the most between two of them; and the most tokens that wait */
    STALE = 60 * 60,  /* seconds after which a temporary file is one that a killed process left */
    HASH_DIGITS = 32,
    MAX_NAME = 80,
};

struct entry {
    int64_t count; /* tokens */
    char hash[HASH_DIGITS + 1];
};

struct ltn_prefix_cache {
    struct ltn_session *session;
    char *folder;
    uint64_t max_bytes;
    struct ltn_encoder *encoder; /* NULL until the first text */
    bool in_text;

    struct entry *entries;  /* [n_entries] by count; those the folder had at the beginning */
    size_t n_entries, next; /* entries before `next` have no more tokens than came */
    size_t *matches;        /* [n_matches] entries that are a beginning of the prompt and reach into `held` */
    size_t n_matches;

    XXH3_state_t *seen, *fed; /* of the tokens that came, and of those that the session has */
    int64_t n_seen, n_fed, resumed;
    int32_t *held; /* [n_seen - n_fed] came, but the session has not seen them */
    size_t capacity;
    struct ltn_error warning; /* status LTN_OK: none */
};

static void get_hash(char text[HASH_DIGITS + 1], const XXH3_state_t *state)
{
    XXH128_hash_t digest = XXH3_128bits_digest(state);
    ltn_st_checksum_text(text, digest.high64, digest.low64);
}

static bool get_path(char path[PATH_MAX], const struct ltn_prefix_cache *c, const char *hash, int64_t count)
{
    return snprintf(path, PATH_MAX, "%s/%s-%" PRId64 ".prefix", c->folder, hash, count) < PATH_MAX;
}

/* ---- the folder ---------------------------------------------------------------------------------------- */

/* What an entry's name says; *temporary: it is one being written. */
static bool parse_name(const char *name, struct entry *entry, bool *temporary)
{
    const size_t digits = strspn(name, "0123456789abcdef");
    char *end;

    if (digits != HASH_DIGITS || name[digits] != '-' || name[digits + 1] < '1' || name[digits + 1] > '9' ||
        strlen(name) >= MAX_NAME)
        return false;
    memcpy(entry->hash, name, digits);
    entry->hash[digits] = 0;
    errno = 0;
    entry->count = strtoll(name + digits + 1, &end, 10);
    if (errno != 0 || strncmp(end, ".prefix", 7) != 0)
        return false;
    *temporary = end[7] == '.' && strlen(end) > 11 && strcmp(end + strlen(end) - 4, ".tmp") == 0;
    return *temporary || end[7] == 0;
}

static int by_count(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    return x->count != y->count ? (x->count < y->count ? -1 : 1) : strcmp(x->hash, y->hash);
}

static enum ltn_status list_entries(struct ltn_prefix_cache *c, struct ltn_error *err)
{
    DIR *dir = opendir(c->folder);
    size_t capacity = 0;

    if (!dir)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", c->folder, strerror(errno));
    for (struct dirent *d; (d = readdir(dir)) != NULL;) {
        struct entry entry;
        bool temporary;
        if (!parse_name(d->d_name, &entry, &temporary) || temporary)
            continue;
        if (c->n_entries == capacity) {
            capacity = 2 * capacity + 64;
            struct entry *grown = realloc(c->entries, capacity * sizeof *grown);
            if (!grown) {
                closedir(dir);
                return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for a list of its entries", c->folder);
            }
            c->entries = grown;
        }
        c->entries[c->n_entries++] = entry;
    }
    closedir(dir);
    if (c->n_entries)
        qsort(c->entries, c->n_entries, sizeof *c->entries, by_count);
    return LTN_OK;
}

struct candidate {
    char name[MAX_NAME];
    struct timespec used;
    uint64_t bytes;
};

static int by_use(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->used.tv_sec != y->used.tv_sec)
        return x->used.tv_sec < y->used.tv_sec ? -1 : 1;
    if (x->used.tv_nsec != y->used.tv_nsec)
        return x->used.tv_nsec < y->used.tv_nsec ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* Removes what is over the limit. Another process may be doing the same: what is gone is gone. */
static void trim(const struct ltn_prefix_cache *c)
{
    struct candidate *list = NULL;
    size_t n = 0, capacity = 0;
    uint64_t total = 0;
    DIR *dir = opendir(c->folder);

    if (!dir)
        return;
    for (struct dirent *d; (d = readdir(dir)) != NULL;) {
        struct entry entry;
        struct stat st;
        bool temporary;
        if (!parse_name(d->d_name, &entry, &temporary) || fstatat(dirfd(dir), d->d_name, &st, 0) != 0)
            continue;
        if (temporary) {
            if (time(NULL) - st.st_mtim.tv_sec > STALE)
                unlinkat(dirfd(dir), d->d_name, 0);
            continue;
        }
        if (n == capacity) {
            capacity = 2 * capacity + 64;
            struct candidate *grown = realloc(list, capacity * sizeof *grown);
            if (!grown)
                break;
            list = grown;
        }
        memcpy(list[n].name, d->d_name, strlen(d->d_name) + 1); /* shorter than MAX_NAME */
        list[n].used = st.st_mtim;
        list[n].bytes = (uint64_t)st.st_size;
        total += list[n++].bytes;
    }
    if (n)
        qsort(list, n, sizeof *list, by_use);
    for (size_t i = 0; i < n && total > c->max_bytes; i++) {
        unlinkat(dirfd(dir), list[i].name, 0);
        total -= list[i].bytes;
    }
    free(list);
    closedir(dir);
}

/* An entry of where the session stands, unless there is one: then it counts as used now. */
static void store(struct ltn_prefix_cache *c)
{
    char path[PATH_MAX], hash[HASH_DIGITS + 1];

    get_hash(hash, c->fed);
    if (c->warning.status != LTN_OK || !get_path(path, c, hash, c->n_fed) ||
        utimensat(AT_FDCWD, path, NULL, 0) == 0)
        return;
    if (ltn_session_file_save(c->session, path, hash, &c->warning) == LTN_OK)
        trim(c);
}

/* ---- tokens -------------------------------------------------------------------------------------------- */

static int64_t next_boundary(int64_t position)
{
    if (position >= STRIDE)
        return (position / STRIDE + 1) * STRIDE;
    int64_t boundary = FIRST;
    while (boundary <= position)
        boundary *= 2;
    return boundary;
}

/* Gives the session ids that follow those it has. */
static enum ltn_status advance(struct ltn_prefix_cache *c, const int32_t *ids, size_t n,
                               struct ltn_error *err)
{
    while (n > 0) {
        int64_t boundary = next_boundary(c->n_fed);
        size_t k = (uint64_t)(boundary - c->n_fed) < n ? (size_t)(boundary - c->n_fed) : n;
        LTN_TRY(ltn_session_feed(c->session, ids, k, err));
        XXH3_128bits_update(c->fed, ids, k * sizeof *ids);
        c->n_fed += (int64_t)k;
        ids += k;
        n -= k;
        if (c->n_fed == boundary)
            store(c);
    }
    return LTN_OK;
}

/* Resumes the longest entry that matched and can be had, and reads what was held behind it. */
static enum ltn_status decide(struct ltn_prefix_cache *c, struct ltn_error *err)
{
    size_t n = (size_t)(c->n_seen - c->n_fed), skip = 0;
    char path[PATH_MAX];

    while (c->n_matches > 0 && skip == 0) {
        const struct entry *e = &c->entries[c->matches[--c->n_matches]];
        struct ltn_error why;
        if (!get_path(path, c, e->hash, e->count))
            continue;
        if (ltn_session_file_load(c->session, path, e->hash, e->count, &why) == LTN_OK) {
            utimensat(AT_FDCWD, path, NULL, 0);
            skip = (size_t)(e->count - c->n_fed);
            c->resumed += (int64_t)skip;
        } else if (why.status == LTN_ERR_INPUT) {
            unlink(path); /* damaged */
        } else if (why.status == LTN_ERR_DEVICE) {
            *err = why;
            return why.status;
        }
    }
    c->n_matches = 0;
    XXH3_128bits_update(c->fed, c->held, skip * sizeof *c->held);
    c->n_fed += (int64_t)skip;
    return advance(c, c->held + skip, n - skip, err);
}

static enum ltn_status hold(struct ltn_prefix_cache *c, const int32_t *ids, size_t n, struct ltn_error *err)
{
    size_t n_held = (size_t)(c->n_seen - c->n_fed);
    if (n_held + n > c->capacity) {
        size_t capacity = 2 * c->capacity + n + 1024;
        int32_t *grown = realloc(c->held, capacity * sizeof *grown);
        if (!grown)
            return ltn_fail(err, LTN_ERR_MEMORY, "prefix cache: no memory for %zu tokens", capacity);
        c->held = grown;
        c->capacity = capacity;
    }
    memcpy(c->held + n_held, ids, n * sizeof *ids);
    c->n_seen += (int64_t)n;
    return LTN_OK;
}

/* The entries of as many tokens as came by now. */
static void match(struct ltn_prefix_cache *c)
{
    char hash[HASH_DIGITS + 1];
    get_hash(hash, c->seen);
    for (; c->next < c->n_entries && c->entries[c->next].count == c->n_seen; c->next++)
        if (strcmp(c->entries[c->next].hash, hash) == 0)
            c->matches[c->n_matches++] = c->next;
}

enum ltn_status ltn_prefix_feed(struct ltn_prefix_cache *c, const int32_t *ids, size_t n,
                                struct ltn_error *err)
{
    const int32_t V = ltn_engine_info(c->session->engine)->vocab_size;

    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= V)
            return ltn_fail(err, LTN_ERR_INPUT, "token %" PRId64 ": expected an id from 0 to %d, found %d",
                            c->n_seen + (int64_t)i, V - 1, ids[i]);
    while (n > 0 && c->next < c->n_entries) {
        const int64_t room = STRIDE - (c->n_seen - c->n_fed), ahead = c->entries[c->next].count - c->n_seen;
        const int64_t most = room < ahead ? room : ahead;
        size_t k = (uint64_t)most < n ? (size_t)most : n;
        XXH3_128bits_update(c->seen, ids, k * sizeof *ids);
        LTN_TRY(hold(c, ids, k, err));
        ids += k;
        n -= k;
        if (c->n_seen == c->entries[c->next].count)
            match(c);
        if (c->n_seen - c->n_fed == STRIDE || c->next == c->n_entries)
            LTN_TRY(decide(c, err));
    }
    c->n_seen += (int64_t)n;
    return advance(c, ids, n, err);
}

static enum ltn_status take_encoded(void *cache, const int32_t *ids, size_t n, struct ltn_error *err)
{
    return ltn_prefix_feed(cache, ids, n, err);
}

enum ltn_status ltn_prefix_feed_text(struct ltn_prefix_cache *c, const char *text, size_t bytes,
                                     struct ltn_error *err)
{
    const struct ltn_engine *engine = c->session->engine;
    if (!engine->tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "the model has no tokenizer, only token ids work");
    if (!c->encoder)
        LTN_TRY(ltn_encoder_create(&c->encoder, engine->tokenizer, take_encoded, c, err));
    return ltn_encoder_feed(c->encoder, text, bytes, err);
}

enum ltn_status ltn_prefix_finish(struct ltn_prefix_cache *c, int64_t *resumed, struct ltn_error *err)
{
    if (c->encoder)
        LTN_TRY(ltn_encoder_finish(c->encoder, err));
    if (c->n_seen > c->n_fed)
        LTN_TRY(decide(c, err));
    if (c->n_fed >= LTN_PREFIX_LEAST)
        store(c);
    *resumed = c->resumed;
    return LTN_OK;
}

/* ---- life ---------------------------------------------------------------------------------------------- */

static enum ltn_status begin_hash(XXH3_state_t **state, const struct ltn_engine *engine,
                                  struct ltn_error *err)
{
    static const char kind[] = "ltn-prefix 1";
    *state = XXH3_createState();
    if (!*state || XXH3_128bits_reset(*state) != XXH_OK)
        return ltn_fail(err, LTN_ERR_MEMORY, "prefix cache: no memory for a hash");
    XXH3_128bits_update(*state, kind, strlen(kind));
    XXH3_128bits_update(*state, engine->info.checksum, strlen(engine->info.checksum));
    return LTN_OK;
}

static enum ltn_status open_all(struct ltn_prefix_cache *c, const char *folder, struct ltn_error *err)
{
    const struct ltn_engine *engine = c->session->engine;

    if (ltn_session_position(c->session) != 0)
        return ltn_fail(err, LTN_ERR_INPUT, "prefix cache: the session is at token %" PRId64 ", expected 0",
                        ltn_session_position(c->session));
    if (c->max_bytes < engine->info.session_bytes)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: expected a size limit of at least one entry, %" PRIu64 " bytes, found %" PRIu64,
                        folder, engine->info.session_bytes, c->max_bytes);
    c->folder = strdup(folder);
    if (!c->folder)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", folder);
    if (mkdir(folder, 0777) != 0 && errno != EEXIST)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot create: %s", folder, strerror(errno));
    LTN_TRY(begin_hash(&c->seen, engine, err));
    LTN_TRY(begin_hash(&c->fed, engine, err));
    LTN_TRY(list_entries(c, err));
    c->matches = calloc(c->n_entries + 1, sizeof *c->matches);
    return c->matches ? LTN_OK : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its entries", folder);
}

enum ltn_status ltn_prefix_open(struct ltn_prefix_cache **out, struct ltn_session *session,
                                const char *folder, uint64_t max_bytes, struct ltn_error *err)
{
    *out = NULL;
    struct ltn_prefix_cache *c = calloc(1, sizeof *c);
    if (!c)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for a prefix cache", folder);
    c->session = session;
    c->max_bytes = max_bytes;
    enum ltn_status status = open_all(c, folder, err);
    if (status == LTN_OK)
        *out = c;
    else
        ltn_prefix_close(c);
    return status;
}

const char *ltn_prefix_warning(const struct ltn_prefix_cache *c)
{
    return c->warning.status != LTN_OK ? c->warning.text : NULL;
}

void ltn_prefix_close(struct ltn_prefix_cache *c)
{
    if (!c)
        return;
    ltn_encoder_free(c->encoder);
    XXH3_freeState(c->seen);
    XXH3_freeState(c->fed);
    free(c->entries);
    free(c->matches);
    free(c->held);
    free(c->folder);
    free(c);
}
