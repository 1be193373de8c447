/* What is the same on every device: names, checks, and finding the device. */
#include "kernels/conv/conv.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CONV_LIBRARY "libltn_conv.so"

const char *ltn_conv_algo_name(enum ltn_conv_algo algo)
{
    static const char *const names[LTN_CONV_ALGOS] = {
        [LTN_CONV_AUTO] = "auto",
        [LTN_CONV_IM2WIN] = "im2win",
        [LTN_CONV_FUSED] = "im2win-fused",
        [LTN_CONV_IM2COL] = "im2col-cublas",
        [LTN_CONV_IM2COL_IMAGE] = "im2col-cublas-image",
        [LTN_CONV_DIRECT] = "direct",
        [LTN_CONV_DIRECT_NAIVE] = "direct-naive",
        [LTN_CONV_CUDNN] = "cudnn",
    };
    return names[algo];
}

const char *ltn_conv_type_name(enum ltn_conv_type type)
{
    return type == LTN_CONV_F32 ? "f32" : type == LTN_CONV_TF32 ? "tf32" : "bf16";
}

/* ---- sizes --------------------------------------------------------------------------------------------- */

static int64_t out_size(int32_t in, int32_t before, int32_t after, int32_t filter, int32_t stride,
                        int32_t dilation)
{
    int64_t room = (int64_t)in + before + after - (int64_t)dilation * (filter - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

int32_t ltn_conv_ho(const struct ltn_conv_shape *s)
{
    return (int32_t)out_size(s->hi, s->pt, s->pb, s->hf, s->sh, s->dh);
}

int32_t ltn_conv_wo(const struct ltn_conv_shape *s)
{
    return (int32_t)out_size(s->wi, s->pl, s->pr, s->wf, s->sw, s->dw);
}

int64_t ltn_conv_x_elements(const struct ltn_conv_shape *s)
{
    return (int64_t)s->n * s->ci * s->hi * s->wi;
}

int64_t ltn_conv_y_elements(const struct ltn_conv_shape *s)
{
    return (int64_t)s->n * s->co * ltn_conv_ho(s) * ltn_conv_wo(s);
}

int64_t ltn_conv_filter_elements(const struct ltn_conv_shape *s)
{
    return (int64_t)s->co * (s->ci / s->groups) * s->hf * s->wf;
}

double ltn_conv_flop(const struct ltn_conv_shape *s)
{
    return 2.0 * (double)ltn_conv_y_elements(s) * (s->ci / s->groups) * s->hf * s->wf;
}

/* ---- checks -------------------------------------------------------------------------------------------- */

/* Whether 8 times the product of the factors stays below 2^62. */
static bool fits(const int64_t *factors, int n)
{
    int64_t product = 8;
    for (int i = 0; i < n; i++)
        if (__builtin_mul_overflow(product, factors[i], &product) || product >= (int64_t)1 << 62)
            return false;
    return true;
}

enum ltn_status ltn_conv_check(const struct ltn_conv_shape *s, struct ltn_error *err)
{
    const struct {
        const char *name;
        int32_t value, least;
    } fields[] = {
        {"n", s->n, 1},   {"ci", s->ci, 1}, {"hi", s->hi, 1}, {"wi", s->wi, 1},
        {"co", s->co, 1}, {"hf", s->hf, 1}, {"wf", s->wf, 1}, {"sh", s->sh, 1},
        {"sw", s->sw, 1}, {"dh", s->dh, 1}, {"dw", s->dw, 1}, {"pt", s->pt, 0},
        {"pb", s->pb, 0}, {"pl", s->pl, 0}, {"pr", s->pr, 0}, {"groups", s->groups, 1},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].value < fields[i].least)
            return ltn_fail(err, LTN_ERR_INPUT, "convolution: %s: expected %d or more, found %d",
                            fields[i].name, fields[i].least, fields[i].value);
    if (s->ci % s->groups != 0 || s->co % s->groups != 0)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "convolution: groups: expected a divisor of ci = %d and co = %d, found %d", s->ci,
                        s->co, s->groups);
    if ((s->layout != LTN_NCHW && s->layout != LTN_NHWC) ||
        (s->type != LTN_CONV_F32 && s->type != LTN_CONV_TF32 && s->type != LTN_CONV_BF16))
        return ltn_fail(err, LTN_ERR_INPUT, "convolution: no such layout (%d) or type (%d)", (int)s->layout,
                        (int)s->type);
    int64_t hp = (int64_t)s->hi + s->pt + s->pb, wp = (int64_t)s->wi + s->pl + s->pr;
    int64_t ho = out_size(s->hi, s->pt, s->pb, s->hf, s->sh, s->dh);
    int64_t wo = out_size(s->wi, s->pl, s->pr, s->wf, s->sw, s->dw);
    if (ho < 1 || wo < 1)
        return ltn_fail(
            err, LTN_ERR_INPUT,
            "convolution: the %dx%d filter (dilation %d, %d) does not fit into the padded input of "
            "%lldx%lld",
            s->hf, s->wf, s->dh, s->dw, (long long)hp, (long long)wp);
    const int64_t places[] = {s->hf, s->dh}, across[] = {s->wf, s->dw};
    const int64_t image[] = {hp, wp}, window[] = {s->n, s->ci, ho, wp, s->hf};
    const int64_t columns[] = {s->n, s->ci, s->hf, s->wf, ho, wo}, out[] = {s->n, s->co, ho, wo};
    const int64_t filter[] = {s->co, s->ci, s->hf, s->wf};
    if (hp > INT32_MAX || wp > INT32_MAX || s->hf > INT32_MAX / s->dh || s->wf > INT32_MAX / s->dw ||
        !fits(places, 2) || !fits(across, 2) || !fits(image, 2) || !fits(window, 5) || !fits(columns, 6) ||
        !fits(out, 4) || !fits(filter, 4))
        return ltn_fail(err, LTN_ERR_INPUT,
                        "convolution: sizes: expected tensors below 2^62 bytes and sides below "
                        "2^31, found more");
    return LTN_OK;
}

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
    void *library = open_library(err);
    if (!library)
        return err->status;
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
