/* Tells a story: story MODEL.ltn "Once upon a time"; cc story.c $(pkg-config --cflags --libs ltn) */
#include <ltn.h>
#include <stdio.h>
#include <string.h>

static enum ltn_status print(void *ctx, int32_t id, const char *text, size_t bytes, struct ltn_error *err)
{
    (void)ctx, (void)id;
    if (fwrite(text, 1, bytes, stdout) < bytes || fflush(stdout) != 0)
        return ltn_fail(err, LTN_ERR_IO, "standard output: cannot write");
    return LTN_OK;
}

int main(int argc, char **argv)
{
    const struct ltn_generate_options options = {.max_tokens = 200, .piece = print};
    struct ltn_engine *engine = NULL;
    struct ltn_session *session = NULL;
    struct ltn_error err = {.text = "expected a model and the beginning of a story"};
    int failed = argc != 3 || ltn_engine_open(&engine, argv[1], NULL, &err) != LTN_OK ||
                 ltn_session_create(&session, engine, NULL, &err) != LTN_OK ||
                 ltn_session_feed_text(session, argv[2], strlen(argv[2]), &err) != LTN_OK ||
                 ltn_session_end_text(session, &err) != LTN_OK ||
                 ltn_generate(session, &options, NULL, &err) != LTN_OK;
    if (failed)
        fprintf(stderr, "story: %s\n", err.text);
    ltn_session_free(session);
    ltn_engine_close(engine);
    return failed;
}
