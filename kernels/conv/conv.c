/* What is the same on every device: opening one, and its operators. */
#include "kernels/conv/conv.h"

#include "kernels/library.h"

#include <dlfcn.h>
#include <string.h>

#define CONV_LIBRARY "libltn_conv.so"

/* ---- devices ------------------------------------------------------------------------------------------- */

enum ltn_status ltn_conv_open(struct ltn_conv **out, const char *device, int n_threads, struct ltn_error *err)
{
    struct ltn_error why = {0};
    bool present;
    int index;

    *out = NULL;
    if (strcmp(device, "cpu") == 0)
        return ltn_conv_cpu_open(out, n_threads, err);
    if (!ltn_cuda_device(device, &index))
        return ltn_fail(err, LTN_ERR_INPUT, "device: expected cpu, cuda or cuda:N, found '%s'", device);
    void *library = ltn_library_open(CONV_LIBRARY, &present, &why);
    if (!library)
        return ltn_fail(err, why.status, "CUDA: %s", why.text);
    ltn_conv_open_fn *open;
    *(void **)&open = dlsym(library, LTN_CONV_ENTRY); /* POSIX's way from a data to a function pointer */
    if (!open)
        return ltn_fail(err, LTN_ERR_DEVICE, "CUDA: %s", dlerror());
    return open(out, index, err);
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
