#include "tests/files.h"

#include "tests/support.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

void check_error(enum ltn_status status, const struct ltn_error *err, const char *part)
{
    if (status == LTN_OK)
        fail_msg("succeeded, expected an error with \"%s\"", part);
    if (!strstr(err->text, part) || strchr(err->text, '\n') || err->status != status)
        fail_msg("error \"%s\", expected \"%s\" in it", err->text, part);
}

const char *in_folder(const char *name)
{
    static char paths[4][512];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", test_folder(), name);
    return path;
}

const char *new_dir(void)
{
    static char dirs[64][512];
    static int n;
    snprintf(dirs[n % 64], sizeof dirs[0], "%s/hf%d", test_folder(), n);
    return dirs[n++ % 64];
}

void write_file(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f) != 0)
        fail_msg("cannot write %s", path);
}

uint8_t *read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    *bytes = (size_t)ftell(f);
    rewind(f);
    uint8_t *data = malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, f), *bytes);
    fclose(f);
    return data;
}
