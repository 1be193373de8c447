/* What is the same on every device: opening one, and its operators. */
#include "kernels/conv/conv.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CONV_LIBRARY "libltn_conv.so"

/* ---- devices ------------------------------------------------------------------------------------------- */

static void *open_library(struct ltn_error *err)
{
    static const char *const places[] = {"", "../lib/", "../lib/ltn/"}; /* from the executable's folder */
    char exe[PATH_MAX], path[2 * PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    struct stat st;

    for (size_t i = 0; n > 0 && i < sizeof places / sizeof *places; i++) {
        exe[n] = 0;
        snprintf(path, sizeof path, "%.*s/%s%s", (int)(strrchr(exe, '/') - exe), exe, places[i],
                 CONV_LIBRARY);
        if (stat(path, &st) != 0)
            continue;
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library)
            ltn_fail(err, LTN_ERR_DEVICE, "CUDA: %s", dlerror());
        return library;
    }
    void *library = dlopen(CONV_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        ltn_fail(err, LTN_ERR_UNSUPPORTED, "CUDA: %s", dlerror());
    return library;
}

/* The library stays loaded for as long as the process lives: CUDA does not unload cleanly. */
enum ltn_status ltn_conv_open(struct ltn_conv **out, const char *device, int n_threads, struct ltn_error *err)
{
    long index = 0;
    *out = NULL;
    if (strcmp(device, "cpu") == 0)
        return ltn_conv_cpu_open(out, n_threads, err);
    if (strncmp(device, "cuda:", 5) == 0 && device[5] >= '0' && device[5] <= '9') {
        char *end;
        index = strtol(device + 5, &end, 10);
        if (*end || index > 1023)
            index = -1;
    } else if (strcmp(device, "cuda") != 0) {
        index = -1;
    }
    if (index < 0)
        return ltn_fail(err, LTN_ERR_INPUT, "device: expected cpu, cuda or cuda:N, found '%s'", device);
    struct ltn_error why = {0};
    void *library = open_library(&why);
    if (!library)
        return ltn_fail(err, why.status, "%s", why.text);
    ltn_conv_open_fn *open;
    *(void **)&open = dlsym(library, LTN_CONV_ENTRY); /* POSIX's way from a data to a function pointer */
    if (!open)
        return ltn_fail(err, LTN_ERR_DEVICE, "CUDA: %s", dlerror());
    return open(out, (int)index, err);
}

void ltn_conv_close(struct ltn_conv *conv)
{
    if (conv)
        conv->ops->close(conv);
}

/* ---- operators ----------------------------------------------------------------------------------------- */

enum ltn_status ltn_conv2d_create(struct ltn_conv2d **out, struct ltn_conv *conv,
                                  const struct ltn_conv_shape *s, enum ltn_conv_algo algo,
                                  const float *filter, const float *bias, struct ltn_error *err)
{
    *out = NULL;
    LTN_TRY(ltn_conv_check(s, err));
    if (algo < 0 || algo >= LTN_CONV_ALGOS)
        return ltn_fail(err, LTN_ERR_INPUT, "convolution: no such algorithm (%d)", (int)algo);
    return conv->ops->create(out, conv, s, algo, filter, bias, err);
}

void ltn_conv2d_free(struct ltn_conv2d *op)
{
    if (op)
        op->conv->ops->free_op(op);
}

const struct ltn_conv2d_info *ltn_conv2d_info(const struct ltn_conv2d *op)
{
    return &op->info;
}

enum ltn_status ltn_conv2d_run(struct ltn_conv2d *op, void *y, const void *x, void *workspace,
                               enum ltn_conv_part part, struct ltn_error *err)
{
    return op->conv->ops->run(op, y, x, workspace, part, err);
}
