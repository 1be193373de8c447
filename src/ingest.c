#include "src/ingest.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "src/cli.h"
#include "tokenizer/tokenizer.h"

struct stream {
    const struct ltn_ingest *in;
    struct ltn_session *fork;    /* NULL: nothing is asked */
    struct ltn_encoder *encoder; /* NULL with ids */
    struct ltn_id_parser parser;
    int64_t next;         /* position of the next question */
    int64_t answered_at;  /* of the last one; -1: none yet */
    double deadline;      /* of the next question */
    struct ltn_error end; /* status LTN_OK: go on; else an answer ended the reading */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static enum ltn_status ask_fork(struct stream *s, struct ltn_error *err)
{
    const struct ltn_ingest *in = s->in;
    const int32_t bos = ltn_engine_info(in->engine)->bos_id;

    LTN_TRY(ltn_session_copy(s->fork, in->session, err));
    if (ltn_session_position(s->fork) == 0 && bos >= 0)
        LTN_TRY(ltn_session_feed(s->fork, &bos, 1, err));
    LTN_TRY(ltn_session_feed(s->fork, in->question, in->n_question, err));
    return in->answer(in->ctx, s->fork, err);
}

/* What goes wrong with an answer does not lose what was read: the rest is taken in, then the reading ends. */
static void ask(struct stream *s)
{
    if (!s->fork || s->end.status != LTN_OK)
        return;
    s->answered_at = ltn_session_position(s->in->session);
    struct ltn_error why = {0};
    if (ask_fork(s, &why) != LTN_OK)
        s->end = why;
}

static enum ltn_status take_ids(void *stream, const int32_t *ids, size_t n, struct ltn_error *err)
{
    struct stream *s = stream;
    const int64_t every = s->in->every_tokens;

    while (n > 0) {
        size_t k = n;
        if (every && (uint64_t)(s->next - ltn_session_position(s->in->session)) < k)
            k = (size_t)(s->next - ltn_session_position(s->in->session));
        LTN_TRY(ltn_session_feed(s->in->session, ids, k, err));
        ids += k;
        n -= k;
        if (every && ltn_session_position(s->in->session) == s->next) {
            ask(s);
            s->next += every;
        }
    }
    return LTN_OK;
}

static enum ltn_status take_id(void *stream, int32_t id, struct ltn_error *err)
{
    return take_ids(stream, &id, 1, err);
}

static enum ltn_status take_input(struct stream *s, const char *text, size_t bytes, struct ltn_error *err)
{
    if (s->in->echo)
        LTN_TRY(ltn_cli_write(text, bytes, err));
    if (s->in->ids)
        return ltn_id_parser_feed(&s->parser, text, bytes, err);
    return ltn_encoder_feed(s->encoder, text, bytes, err);
}

/* Is it time for a question? */
static enum ltn_status look_at_clock(struct stream *s, struct ltn_error *err)
{
    if (now() < s->deadline)
        return LTN_OK;
    if (s->encoder)
        LTN_TRY(ltn_encoder_settle(s->encoder, err));
    int64_t position = ltn_session_position(s->in->session);
    if (position > 0 && position != s->answered_at)
        ask(s);
    s->deadline = now() + s->in->every_seconds;
    return LTN_OK;
}

/* Is there input? Waits for it a second at most: should a signal come just before the wait, it is seen then.
 */
static bool has_input(const struct stream *s)
{
    double seconds = fmin(fmax(s->deadline - now(), 0), 1);
    return poll(&(struct pollfd){.fd = STDIN_FILENO, .events = POLLIN}, 1, (int)ceil(1000 * seconds)) > 0;
}

static enum ltn_status read_input(struct stream *s, struct ltn_error *err)
{
    char text[16384];
    while (s->end.status == LTN_OK) {
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
        if (has_input(s)) {
            ssize_t n = read(STDIN_FILENO, text, sizeof text);
            if (n == 0)
                return LTN_OK;
            if (n > 0)
                LTN_TRY(take_input(s, text, (size_t)n, err));
            else if (errno != EINTR && errno != EAGAIN)
                return ltn_fail(err, LTN_ERR_IO, "standard input: cannot read: %s", strerror(errno));
        }
        LTN_TRY(look_at_clock(s, err));
    }
    *err = s->end;
    return err->status;
}

static enum ltn_status finish_input(struct stream *s, struct ltn_error *err)
{
    return s->encoder ? ltn_encoder_finish(s->encoder, err) : ltn_id_parser_finish(&s->parser, err);
}

static enum ltn_status run(struct stream *s, struct ltn_error *err)
{
    const struct ltn_ingest *in = s->in;

    if (in->answer)
        LTN_TRY(ltn_session_create(&s->fork, in->engine, NULL, err));
    if (in->ids)
        s->parser = (struct ltn_id_parser){.fn = take_id, .ctx = s};
    else if (ltn_engine_tokenizer(in->engine))
        LTN_TRY(ltn_encoder_create(&s->encoder, ltn_engine_tokenizer(in->engine), take_ids, s, err));
    else
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "the model has no tokenizer: expected token ids, found text");
    s->next = ltn_session_position(in->session) + in->every_tokens;
    s->deadline = in->every_seconds > 0 ? now() + in->every_seconds : INFINITY;

    enum ltn_status status = read_input(s, err);
    if (status == LTN_ERR_STOPPED || status == LTN_ERR_IO ||
        s->end.status != LTN_OK) { /* not of the encoder */
        s->end = *err;             /* nothing is asked from now on */
        finish_input(s, NULL);
        return status;
    }
    LTN_TRY(status);
    LTN_TRY(finish_input(s, err));
    if (ltn_session_position(in->session) != s->answered_at)
        ask(s);
    if (s->end.status != LTN_OK)
        *err = s->end;
    return s->end.status;
}

enum ltn_status ltn_ingest(const struct ltn_ingest *ingest, struct ltn_error *err)
{
    struct stream s = {.in = ingest, .answered_at = -1};
    enum ltn_status status = run(&s, err);
    ltn_session_free(s.fork);
    ltn_encoder_free(s.encoder);
    return status;
}
