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
