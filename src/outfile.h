/* A result file that appears under its name complete, or not at all. */
#ifndef LTN_OUTFILE_H
#define LTN_OUTFILE_H

#include <stdio.h>

#include "kernels/status.h"

struct ltn_outfile {
    char *path;
    char *temporary; /* beside path; NULL: path is no regular file (a pipe, a device) and written directly */
    FILE *file;      /* write here */
};

/* On failure *out is zero. */
enum ltn_status ltn_outfile_open(struct ltn_outfile *out, const char *path, struct ltn_error *err);
/* Syncs and renames. *out is zero afterwards, also on failure, and then the temporary file is gone. */
enum ltn_status ltn_outfile_commit(struct ltn_outfile *out, struct ltn_error *err);
void ltn_outfile_abandon(struct ltn_outfile *out); /* a zeroed one is allowed */

/* fwrite, with its failure as a status. */
enum ltn_status ltn_outfile_write(struct ltn_outfile *out, const void *data, size_t bytes,
                                  struct ltn_error *err);

#endif
