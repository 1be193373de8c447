#include "kernels/cpu/memory.h"

#include <stdlib.h>
#include <unistd.h>

enum ltn_status ltn_host_alloc(struct ltn_backend *be, void **out, size_t bytes, struct ltn_error *err)
{
    (void)be;
    size_t padded = bytes > SIZE_MAX - 64 ? 0 : (bytes + 63) / 64 * 64;
    *out = padded || !bytes ? aligned_alloc(64, padded ? padded : 64) : NULL;
    if (*out)
        return LTN_OK;
    long pages = sysconf(_SC_AVPHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return ltn_fail(err, LTN_ERR_MEMORY, "host memory: %zu MB needed, about %zu MB free", bytes / 1000000,
                    pages > 0 && page > 0 ? (size_t)pages * (size_t)page / 1000000 : (size_t)0);
}

void ltn_host_free(struct ltn_backend *be, void *p)
{
    (void)be;
    free(p);
}

enum ltn_status ltn_host_zero(struct ltn_backend *be, void *p, size_t bytes, struct ltn_error *err)
{
    (void)be, (void)err;
    memset(p, 0, bytes);
    return LTN_OK;
}

enum ltn_status ltn_host_copy(struct ltn_backend *be, void *dst, const void *src, size_t bytes,
                              struct ltn_error *err)
{
    (void)be, (void)err;
    memcpy(dst, src, bytes);
    return LTN_OK;
}

enum ltn_status ltn_host_upload(struct ltn_backend *be, void *dst, const void *host, size_t bytes,
                                struct ltn_error *err)
{
    return ltn_host_copy(be, dst, host, bytes, err);
}

enum ltn_status ltn_host_download(struct ltn_backend *be, void *host, const void *src, size_t bytes,
                                  struct ltn_error *err)
{
    return ltn_host_copy(be, host, src, bytes, err);
}

enum ltn_status ltn_host_sync(struct ltn_backend *be, struct ltn_error *err)
{
    (void)be, (void)err;
    return LTN_OK; /* every operation is complete when it returns */
}
