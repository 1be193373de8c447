#include "tests/cuda/device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

struct ltn_backend *open_cuda(enum ltn_dtype weights_dtype)
{
    const char *bin = getenv("LTN_BIN");
    char path[512];
    struct ltn_backend *be = NULL;
    struct ltn_error err = {0};
    ltn_cuda_open_fn *open = NULL;

    snprintf(path, sizeof path, "%s/libltn_cuda.so", bin ? bin : ".");
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library)
        *(void **)&open = dlsym(library, LTN_CUDA_ENTRY);
    if (!open)
        fprintf(stderr, "%s\n", dlerror());
    else if (open(&be, 0, weights_dtype, &err) != LTN_OK)
        fprintf(stderr, "%s\n", err.text);
    if (!be)
        exit(1);
    return be;
}

void reserve_room(struct ltn_backend *be, const struct ltn_linear *l1, const struct ltn_linear *l2,
                  const struct ltn_attention *a, int32_t rows)
{
    enum { MANY = 5 }; /* rows at which nothing goes row by row */
    struct ltn_layer layer = {0};
    struct ltn_network net = {.n_layers = 1, .layers = &layer};
    struct ltn_error err = {0};
    if (l1) {
        layer.l1 = *l1;
        net.embed.dtype = l1->w.dtype;
        net.embed_dim = l1->w.rows > l1->w.cols ? l1->w.rows : l1->w.cols;
    }
    if (l2)
        layer.l2 = *l2;
    if (a)
        layer.attention = *a;
    if (be->ops->reserve(be, &net, rows < MANY ? MANY : rows, 0, &err) != LTN_OK) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
}
