#include "src/stop.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum ltn_status ltn_stopper_create(struct ltn_stopper *s, const char *const *stop, size_t n,
                                   struct ltn_error *err)
{
    *s = (struct ltn_stopper){.stop = stop, .n = n};
    for (size_t i = 0; i < n; i++)
        if (!stop[i][0])
            return ltn_fail(err, LTN_ERR_INPUT, "stop string %zu: expected some text, found none", i + 1);
    return LTN_OK;
}

void ltn_stopper_free(struct ltn_stopper *s)
{
    free(s->held);
    *s = (struct ltn_stopper){0};
}

/* Is `stop` complete at the end of text[bytes]? */
static bool ends_with(const char *text, size_t bytes, const char *stop, size_t length)
{
    return length <= bytes && memcmp(text + bytes - length, stop, length) == 0;
}

enum ltn_status ltn_stopper_push(struct ltn_stopper *s, const char *text, size_t bytes, const char **out,
                                 size_t *out_bytes, bool *found, struct ltn_error *err)
{
    /* what was let go by the last call has been used by now */
    s->held_bytes -= s->release;
    if (s->held_bytes)
        memmove(s->held, s->held + s->release, s->held_bytes);
    s->release = 0;

    size_t known = s->held_bytes; /* no stop string ends in these bytes */
    if (s->held_bytes + bytes > s->capacity) {
        size_t capacity = 2 * (s->held_bytes + bytes) + 64;
        char *held = realloc(s->held, capacity);
        if (!held)
            return ltn_fail(err, LTN_ERR_MEMORY, "stop strings: no memory for %zu bytes of text", capacity);
        s->held = held;
        s->capacity = capacity;
    }
    if (bytes)
        memcpy(s->held + s->held_bytes, text, bytes);
    s->held_bytes += bytes;

    *out = s->held ? s->held : "";
    *found = false;
    for (size_t end = known + 1; end <= s->held_bytes; end++) {
        size_t longest = 0;
        for (size_t i = 0; i < s->n; i++) {
            size_t length = strlen(s->stop[i]);
            if (length > longest && ends_with(s->held, end, s->stop[i], length))
                longest = length;
        }
        if (longest) {
            *found = true;
            *out_bytes = end - longest;
            s->held_bytes = 0;
            return LTN_OK;
        }
    }

    size_t keep = 0;
    for (size_t i = 0; i < s->n; i++) {
        size_t most = strlen(s->stop[i]) - 1;
        if (most > s->held_bytes)
            most = s->held_bytes;
        for (size_t k = most; k > keep; k--) /* its first k bytes at the end of the text? */
            if (ends_with(s->held, s->held_bytes, s->stop[i], k))
                keep = k;
    }
    s->release = *out_bytes = s->held_bytes - keep;
    return LTN_OK;
}

void ltn_stopper_finish(struct ltn_stopper *s, const char **out, size_t *out_bytes)
{
    *out = s->held ? s->held + s->release : "";
    *out_bytes = s->held_bytes - s->release;
    s->held_bytes = s->release = 0;
}
