/* The memory operations of a backend whose memory is the host's: the same for every CPU backend. */
#ifndef LTN_CPU_MEMORY_H
#define LTN_CPU_MEMORY_H

#include "kernels/ops.h"

enum ltn_status ltn_host_alloc(struct ltn_backend *be, void **out, size_t bytes, struct ltn_error *err);
void ltn_host_free(struct ltn_backend *be, void *p);
enum ltn_status ltn_host_zero(struct ltn_backend *be, void *p, size_t bytes, struct ltn_error *err);
enum ltn_status ltn_host_upload(struct ltn_backend *be, void *dst, const void *host, size_t bytes,
                                struct ltn_error *err);
enum ltn_status ltn_host_download(struct ltn_backend *be, void *host, const void *src, size_t bytes,
                                  struct ltn_error *err);
enum ltn_status ltn_host_copy(struct ltn_backend *be, void *dst, const void *src, size_t bytes,
                              struct ltn_error *err);
enum ltn_status ltn_host_sync(struct ltn_backend *be, struct ltn_error *err);

/* The part of an operation table that these fill. */
#define LTN_HOST_MEMORY_OPS                                                                                  \
    .alloc = ltn_host_alloc, .free = ltn_host_free, .zero = ltn_host_zero, .upload = ltn_host_upload,        \
    .download = ltn_host_download, .copy = ltn_host_copy, .sync = ltn_host_sync

#endif
