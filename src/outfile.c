#include "src/outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static enum ltn_status open_file(struct ltn_outfile *out, struct ltn_error *err)
{
    struct stat st;

    if (stat(out->path, &st) == 0 && !S_ISREG(st.st_mode)) {
        out->file = fopen(out->path, "wbe");
    } else {
        if (asprintf(&out->temporary, "%s.XXXXXX", out->path) < 0) {
            out->temporary = NULL;
            return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory", out->path);
        }
        int fd = mkostemp(out->temporary, O_CLOEXEC);
        if (fd < 0) {
            int why = errno;
            free(out->temporary);
            out->temporary = NULL; /* there is nothing to remove */
            return ltn_fail(err, LTN_ERR_IO, "%s: cannot create: %s", out->path, strerror(why));
        }
        mode_t mask = umask(0);
        umask(mask);
        fchmod(fd, 0666 & ~mask); /* what open would have given */
        out->file = fdopen(fd, "wb");
        if (!out->file)
            close(fd);
    }
    if (!out->file)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot open for writing: %s", out->path, strerror(errno));
    return LTN_OK;
}

enum ltn_status ltn_outfile_open(struct ltn_outfile *out, const char *path, struct ltn_error *err)
{
    *out = (struct ltn_outfile){.path = strdup(path)};
    enum ltn_status status =
        out->path ? open_file(out, err) : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory", path);
    if (status != LTN_OK)
        ltn_outfile_abandon(out);
    return status;
}

enum ltn_status ltn_outfile_write(struct ltn_outfile *out, const void *data, size_t bytes,
                                  struct ltn_error *err)
{
    if (fwrite(data, 1, bytes, out->file) == bytes)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_IO, "%s: cannot write: %s", out->path, strerror(errno));
}

/* A rename is lasting once the folder is synced. */
static void sync_folder(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *folder = slash ? strndup(path, (size_t)(slash - path) + 1) : strdup(".");
    int fd = folder ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(folder);
}

enum ltn_status ltn_outfile_commit(struct ltn_outfile *out, struct ltn_error *err)
{
    enum ltn_status status = LTN_OK;
    bool regular = out->temporary != NULL;

    if (fflush(out->file) != 0 || (regular && fsync(fileno(out->file)) != 0))
        status = ltn_fail(err, LTN_ERR_IO, "%s: cannot write: %s", out->path, strerror(errno));
    if (fclose(out->file) != 0 && status == LTN_OK)
        status = ltn_fail(err, LTN_ERR_IO, "%s: cannot write: %s", out->path, strerror(errno));
    out->file = NULL;
    if (status == LTN_OK && regular) {
        if (rename(out->temporary, out->path) != 0) {
            status = ltn_fail(err, LTN_ERR_IO, "%s: cannot rename %s to it: %s", out->path, out->temporary,
                              strerror(errno));
        } else {
            sync_folder(out->path);
            free(out->temporary);
            out->temporary = NULL;
        }
    }
    ltn_outfile_abandon(out);
    return status;
}

void ltn_outfile_abandon(struct ltn_outfile *out)
{
    if (out->file)
        fclose(out->file);
    if (out->temporary)
        unlink(out->temporary);
    free(out->temporary);
    free(out->path);
    *out = (struct ltn_outfile){0};
}
