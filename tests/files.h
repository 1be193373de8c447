/* What the tests of files share: checks of an error, a scratch folder's names, whole files. */
#ifndef LTN_TESTS_FILES_H
#define LTN_TESTS_FILES_H

#include "kernels/status.h"

#include <stddef.h>
#include <stdint.h>

/* The call failed with a text of one line that contains `part`. */
void check_error(enum ltn_status status, const struct ltn_error *err, const char *part);

/* NAME in test_folder(); the last 4 results stay valid. */
const char *in_folder(const char *name);

/* A name in it for a fresh directory; the last 64 stay valid. */
const char *new_dir(void);

void write_file(const char *path, const void *data, size_t bytes);
uint8_t *read_file(const char *path, size_t *bytes); /* malloc'd, one byte longer than *bytes */

#endif
