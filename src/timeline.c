#include "src/timeline.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "src/session.h"

enum { LOG = LTN_CHECKPOINTS * LTN_CHECKPOINT_EVERY, MAX_EXCHANGES = 64 };

/* An exported session; checkpoints of several timelines may be one. */
struct image {
    int refs;
    unsigned char bytes[];
};

struct checkpoint {
    int64_t position;
    struct image *image;
};

struct exchange {
    int64_t begin, answer; /* positions of the first tokens of the input and of the answer */
    uint64_t draw;         /* number of the next draw at the beginning */
    uint64_t again;        /* how often another answer was asked for */
};

struct token {
    int32_t id;
    int32_t bytes; /* of text that it completed, in an answer */
};

struct timeline {
    char name[LTN_FORK_NAME + 1];
    struct image *present;                          /* while another is the current one */
    int64_t position;                               /* the same */
    struct checkpoint checkpoints[LTN_CHECKPOINTS]; /* [n_checkpoints] oldest first */
    size_t n_checkpoints;
    struct exchange exchanges[MAX_EXCHANGES]; /* [n_exchanges] oldest first */
    size_t n_exchanges;
    struct token *log; /* [LOG] token number i of the session at i % LOG */
    int64_t log_begin; /* what came before is not in it */
};

struct ltn_timelines {
    struct ltn_session *session;
    size_t image_bytes;
    uint64_t bytes, max_bytes; /* of all images */
    struct timeline all[LTN_FORKS];
    size_t n, current;
};

static struct timeline *current(struct ltn_timelines *t)
{
    return &t->all[t->current];
}

static int64_t position(const struct ltn_timelines *t)
{
    return ltn_session_position(t->session);
}

/* ---- images -------------------------------------------------------------------------------------------- */

static void release(struct ltn_timelines *t, struct image *image)
{
    if (!image || --image->refs > 0)
        return;
    t->bytes -= t->image_bytes;
    free(image);
}

static void drop_checkpoint(struct ltn_timelines *t, struct timeline *line, size_t i)
{
    release(t, line->checkpoints[i].image);
    line->n_checkpoints--;
    memmove(&line->checkpoints[i], &line->checkpoints[i + 1],
            (line->n_checkpoints - i) * sizeof line->checkpoints[0]);
}

/* The oldest checkpoint goes, but not that of the last exchange's beginning. */
static bool drop_oldest(struct ltn_timelines *t, struct timeline *line)
{
    size_t i = 0;
    if (line->n_checkpoints && line->n_exchanges &&
        line->checkpoints[0].position == line->exchanges[line->n_exchanges - 1].begin)
        i = 1;
    if (i >= line->n_checkpoints)
        return false;
    drop_checkpoint(t, line, i);
    return true;
}

static bool drop_any(struct ltn_timelines *t)
{
    for (size_t i = 0; i < t->n; i++)
        if (i != t->current && drop_oldest(t, &t->all[i]))
            return true;
    return drop_oldest(t, current(t));
}

static enum ltn_status take_image(struct ltn_timelines *t, struct image **out, struct ltn_error *err)
{
    while (t->bytes + t->image_bytes > t->max_bytes && drop_any(t))
        ;
    struct image *image = malloc(sizeof *image + t->image_bytes);
    if (!image)
        return ltn_fail(err, LTN_ERR_MEMORY, "checkpoint: no memory for %zu bytes", t->image_bytes);
    enum ltn_status status = ltn_session_export(t->session, image->bytes, t->image_bytes, err);
    if (status != LTN_OK) {
        free(image);
        return status;
    }
    image->refs = 1;
    t->bytes += t->image_bytes;
    *out = image;
    return LTN_OK;
}

/* A checkpoint of the present, unless there is one. */
static enum ltn_status checkpoint(struct ltn_timelines *t, struct ltn_error *err)
{
    struct timeline *line = current(t);
    struct image *image;

    if (line->n_checkpoints && line->checkpoints[line->n_checkpoints - 1].position == position(t))
        return LTN_OK;
    if (line->n_checkpoints == LTN_CHECKPOINTS)
        drop_oldest(t, line);
    LTN_TRY(take_image(t, &image, err));
    line->checkpoints[line->n_checkpoints++] = (struct checkpoint){position(t), image};
    return LTN_OK;
}

/* ---- going on ------------------------------------------------------------------------------------------ */

/* Token number `at` is this one. */
static void record(struct timeline *line, int64_t at, int32_t id, size_t bytes)
{
    line->log[at % LOG] = (struct token){id, bytes < INT32_MAX ? (int32_t)bytes : INT32_MAX};
    if (at + 1 - line->log_begin > LOG)
        line->log_begin = at + 1 - LOG;
}

static bool is_checkpoint_due(const struct ltn_timelines *t)
{
    const struct timeline *line = &t->all[t->current];
    return line->n_checkpoints == 0 ||
           position(t) - line->checkpoints[line->n_checkpoints - 1].position >= LTN_CHECKPOINT_EVERY;
}

enum ltn_status ltn_timelines_begin(struct ltn_timelines *t, struct ltn_error *err)
{
    struct timeline *line = current(t);

    LTN_TRY(checkpoint(t, err));
    if (line->n_exchanges == MAX_EXCHANGES)
        memmove(line->exchanges, line->exchanges + 1, --line->n_exchanges * sizeof line->exchanges[0]);
    line->exchanges[line->n_exchanges++] =
        (struct exchange){.begin = position(t), .answer = position(t), .draw = t->session->draw};
    return LTN_OK;
}

enum ltn_status ltn_timelines_feed(struct ltn_timelines *t, const int32_t *ids, size_t n,
                                   struct ltn_error *err)
{
    struct timeline *line = current(t);

    for (size_t i = 0; i < n; i++) {
        int64_t at = position(t);
        LTN_TRY(ltn_session_feed(t->session, &ids[i], 1, err));
        record(line, at, ids[i], 0);
        if (is_checkpoint_due(t))
            LTN_TRY(checkpoint(t, err));
    }
    line->exchanges[line->n_exchanges - 1].answer = position(t); /* so far */
    return LTN_OK;
}

enum ltn_status ltn_timelines_drawn(struct ltn_timelines *t, int32_t id, size_t bytes, struct ltn_error *err)
{
    record(current(t), position(t) - 1, id, bytes);
    return is_checkpoint_due(t) ? checkpoint(t, err) : LTN_OK;
}

/* ---- going back ---------------------------------------------------------------------------------------- */

static int64_t oldest(const struct timeline *line, int64_t now)
{
    for (size_t i = 0; i < line->n_checkpoints; i++)
        if (line->checkpoints[i].position >= line->log_begin)
            return line->checkpoints[i].position;
    return now;
}

/* The last checkpoint at or before the position from which it can be reached; NULL: none. */
static const struct checkpoint *find(const struct timeline *line, int64_t target)
{
    for (size_t i = line->n_checkpoints; i-- > 0;) {
        const struct checkpoint *c = &line->checkpoints[i];
        if (c->position <= target)
            return c->position == target || c->position >= line->log_begin ? c : NULL;
    }
    return NULL;
}

/* Where the draws of its answer begin. */
static uint64_t answer_draw(const struct exchange *e)
{
    return e->draw + (e->again << 32);
}

/* The session goes back; exchanges and draws are the caller's. */
static enum ltn_status go_back(struct ltn_timelines *t, int64_t target, struct ltn_error *err)
{
    struct timeline *line = current(t);
    const struct checkpoint *c = find(line, target);

    if (!c)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "token %" PRId64 " is out of reach: expected token %" PRId64 " or later", target,
                        oldest(line, position(t)));
    LTN_TRY(ltn_session_import(t->session, c->image->bytes, t->image_bytes, err));
    while (&line->checkpoints[line->n_checkpoints - 1] > c)
        drop_checkpoint(t, line, line->n_checkpoints - 1);
    for (int64_t i = position(t); i < target; i++)
        LTN_TRY(ltn_session_feed(t->session, &line->log[i % LOG].id, 1, err));
    return LTN_OK;
}

static struct exchange *last_exchange(struct timeline *line)
{
    return line->n_exchanges ? &line->exchanges[line->n_exchanges - 1] : NULL;
}

enum ltn_status ltn_timelines_rewind(struct ltn_timelines *t, int64_t n, struct ltn_error *err)
{
    struct timeline *line = current(t);
    const int64_t now = position(t), reach = now - oldest(line, now);

    if (reach == 0)
        return ltn_fail(err, LTN_ERR_INPUT, "there is nothing to take back before token %" PRId64, now);
    if (n < 1 || n > reach)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "expected 1 to %" PRId64 " tokens, which leads back to token %" PRId64
                        ", found %" PRId64,
                        reach, now - reach, n);
    const int64_t target = now - n;
    LTN_TRY(go_back(t, target, err));
    struct exchange *e;
    while ((e = last_exchange(line)) && e->begin > target)
        line->n_exchanges--;
    if (!e)
        return LTN_OK;
    t->session->draw = e->draw;
    if (e->begin == target)
        line->n_exchanges--;
    else if (e->answer >= target)
        e->answer = target;
    else /* each token of an answer took one */
        t->session->draw = answer_draw(e) + (uint64_t)(target - e->answer);
    return LTN_OK;
}

enum ltn_status ltn_timelines_undo(struct ltn_timelines *t, struct ltn_error *err)
{
    const struct exchange *e = last_exchange(current(t));
    if (!e)
        return ltn_fail(err, LTN_ERR_INPUT, "there is no exchange to take back");
    LTN_TRY(go_back(t, e->begin, err));
    t->session->draw = e->draw;
    current(t)->n_exchanges--;
    return LTN_OK;
}

enum ltn_status ltn_timelines_again(struct ltn_timelines *t, struct ltn_error *err)
{
    struct exchange *e = last_exchange(current(t));
    if (!e)
        return ltn_fail(err, LTN_ERR_INPUT, "there is no input to answer again");
    LTN_TRY(go_back(t, e->answer, err));
    e->again++;
    t->session->draw = answer_draw(e);
    return LTN_OK;
}

enum ltn_status ltn_timelines_cut(struct ltn_timelines *t, size_t total, size_t keep, struct ltn_error *err)
{
    struct timeline *line = current(t);
    const int64_t answer = last_exchange(line)->answer;
    const uint64_t draw = t->session->draw;
    int64_t at = position(t);

    while (total > keep && at > answer && at > line->log_begin)
        total -= (size_t)line->log[--at % LOG].bytes;
    if (at == position(t))
        return LTN_OK;
    LTN_TRY(go_back(t, at, err));
    t->session->draw = draw; /* as with an end token: drawn, then not kept */
    return LTN_OK;
}

/* ---- forks --------------------------------------------------------------------------------------------- */

static void drop_past(struct ltn_timelines *t, struct timeline *line)
{
    while (line->n_checkpoints)
        drop_checkpoint(t, line, line->n_checkpoints - 1);
    line->n_exchanges = 0;
}

void ltn_timelines_forget(struct ltn_timelines *t)
{
    drop_past(t, current(t));
    current(t)->log_begin = position(t);
}

/* Adds a timeline without a past. */
static enum ltn_status add(struct ltn_timelines *t, const char *name, struct ltn_error *err)
{
    struct timeline *line = &t->all[t->n];

    *line = (struct timeline){.log = calloc(LOG, sizeof *line->log), .log_begin = position(t)};
    if (!line->log)
        return ltn_fail(err, LTN_ERR_MEMORY, "timeline: no memory for %d tokens", LOG);
    strcpy(line->name, name);
    t->n++;
    return LTN_OK;
}

/* Can there be one more, of this name? */
static enum ltn_status check_new(const struct ltn_timelines *t, const char *name, struct ltn_error *err)
{
    const size_t length = strlen(name);
    if (length == 0 || length > LTN_FORK_NAME)
        return ltn_fail(err, LTN_ERR_INPUT, "expected a name of 1 to %d bytes, found %zu", LTN_FORK_NAME,
                        length);
    if (t->n == LTN_FORKS || (t->n + 1) * (uint64_t)t->image_bytes > t->max_bytes)
        return ltn_fail(err, LTN_ERR_INPUT, "no room for more than the %zu forks that there are", t->n);
    return LTN_OK;
}

static enum ltn_status add_copy(struct ltn_timelines *t, const char *name, struct ltn_error *err)
{
    const struct timeline *from = current(t);

    LTN_TRY(add(t, name, err));
    struct timeline *line = &t->all[t->n - 1];
    memcpy(line->log, from->log, LOG * sizeof *line->log);
    line->log_begin = from->log_begin;
    memcpy(line->checkpoints, from->checkpoints, sizeof line->checkpoints);
    line->n_checkpoints = from->n_checkpoints;
    for (size_t i = 0; i < line->n_checkpoints; i++)
        line->checkpoints[i].image->refs++;
    memcpy(line->exchanges, from->exchanges, sizeof line->exchanges);
    line->n_exchanges = from->n_exchanges;
    return LTN_OK;
}

enum ltn_status ltn_timelines_fork(struct ltn_timelines *t, const char *name, struct ltn_error *err)
{
    struct timeline *from = current(t);
    size_t to = 0;

    while (to < t->n && strcmp(t->all[to].name, name) != 0)
        to++;
    if (to == t->current)
        return ltn_fail(err, LTN_ERR_INPUT, "this is '%s' already", name);
    if (to == t->n)
        LTN_TRY(check_new(t, name, err));
    LTN_TRY(take_image(t, &from->present, err));
    from->position = position(t);
    enum ltn_status status;
    if (to == t->n) /* the session stays as it is */
        status = add_copy(t, name, err);
    else
        status = ltn_session_import(t->session, t->all[to].present->bytes, t->image_bytes, err);
    if (status != LTN_OK) {
        release(t, from->present);
        from->present = NULL;
        return status;
    }
    t->current = to;
    release(t, current(t)->present);
    current(t)->present = NULL;
    return LTN_OK;
}

/* ---- all of them --------------------------------------------------------------------------------------- */

enum ltn_status ltn_timelines_create(struct ltn_timelines **out, const struct ltn_engine *engine,
                                     struct ltn_session *session, uint64_t max_bytes, struct ltn_error *err)
{
    struct ltn_timelines *t = calloc(1, sizeof *t);

    *out = NULL;
    if (!t)
        return ltn_fail(err, LTN_ERR_MEMORY, "timelines: no memory");
    t->session = session;
    t->max_bytes = max_bytes;
    t->image_bytes = ltn_engine_info(engine)->session_bytes;
    enum ltn_status status = add(t, "main", err);
    if (status != LTN_OK) {
        ltn_timelines_free(t);
        return status;
    }
    *out = t;
    return LTN_OK;
}

void ltn_timelines_free(struct ltn_timelines *t)
{
    if (!t)
        return;
    for (size_t i = 0; i < t->n; i++) {
        drop_past(t, &t->all[i]);
        release(t, t->all[i].present);
        free(t->all[i].log);
    }
    free(t);
}

bool ltn_timelines_info(const struct ltn_timelines *t, size_t i, struct ltn_timeline_info *info)
{
    if (i >= t->n)
        return false;
    const struct timeline *line = &t->all[i];
    *info = (struct ltn_timeline_info){.name = line->name,
                                       .position = i == t->current ? position(t) : line->position,
                                       .n_checkpoints = line->n_checkpoints,
                                       .current = i == t->current};
    info->oldest = oldest(line, info->position);
    return true;
}

struct ltn_timeline_info ltn_timelines_current(const struct ltn_timelines *t)
{
    struct ltn_timeline_info info;
    ltn_timelines_info(t, t->current, &info);
    return info;
}

size_t ltn_timelines_count(const struct ltn_timelines *t)
{
    return t->n;
}

uint64_t ltn_timelines_bytes(const struct ltn_timelines *t)
{
    return t->bytes;
}
