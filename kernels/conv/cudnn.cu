/* cuDNN, a peer to measure: opened where it is installed, linked nowhere. On creation every engine that its
 * heuristics and its fallback list name for the shape is built and timed, and the fastest kept. f32 leaves
 * out the engines whose numerical notes tell of tensor cores or of inputs rounded; tf32 and bf16 take all. No
 * bias, no ReLU. */
#include "kernels/conv/conv.cuh"

#include <stdio.h>
#include <string.h>

#if __has_include(<cudnn.h>)

#include <cudnn.h>
#include <dlfcn.h>
#include <new>

enum {
    CONFIGS = 64,   /* looked at for each way of asking */
    NOTES = 32,     /* of an engine */
    TRIES = 2,      /* timed runs of each, after one */
    ALIGNMENT = 16, /* of x and y, promised */
};
static const int64_t MOST_WORKSPACE = (int64_t)8 << 30;

#define CUDNN_FUNCTIONS(F)                                                                                   \
    F(cudnnCreate)                                                                                           \
    F(cudnnDestroy)                                                                                          \
    F(cudnnSetStream)                                                                                        \
    F(cudnnGetVersion)                                                                                       \
    F(cudnnBackendCreateDescriptor)                                                                          \
    F(cudnnBackendDestroyDescriptor)                                                                         \
    F(cudnnBackendSetAttribute)                                                                              \
    F(cudnnBackendGetAttribute)                                                                              \
    F(cudnnBackendFinalize)                                                                                  \
    F(cudnnBackendExecute)

struct cudnn_library {
    void *library; /* of dlopen */
#define DECLARE(name) decltype(&::name) name;
    CUDNN_FUNCTIONS(DECLARE)
#undef DECLARE
    cudnnHandle_t handle;
};

typedef cudnnBackendDescriptor_t descriptor;

/* A plan and what it was made of; destroyed in this order, plan first. */
enum { X, W, Y, CONVOLUTION, OPERATION, GRAPH, PLAN, PARTS };
struct chosen {
    descriptor parts[PARTS];
    int64_t workspace;
};

static enum ltn_status cudnn_open(struct conv_device *dev, struct ltn_error *err)
{
    if (dev->cudnn && dev->cudnn->handle)
        return LTN_OK;
    cudnn_close(dev);
    dev->cudnn = new (std::nothrow) cudnn_library();
    if (!dev->cudnn)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory");
    struct cudnn_library *c = dev->cudnn;
    c->library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!c->library)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "cuDNN: %s", dlerror());
#define RESOLVE(name)                                                                                        \
    c->name = reinterpret_cast<decltype(c->name)>(dlsym(c->library, #name));                                 \
    if (!c->name)                                                                                            \
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "libcudnn.so.9: no function " #name " in it");
    CUDNN_FUNCTIONS(RESOLVE)
#undef RESOLVE
    cudnnStatus_t code = c->cudnnCreate(&c->handle);
    if (code == CUDNN_STATUS_SUCCESS)
        code = c->cudnnSetStream(c->handle, dev->stream);
    return code == CUDNN_STATUS_SUCCESS
               ? LTN_OK
               : ltn_fail(err, LTN_ERR_DEVICE, "cuda:%d: cuDNN does not open: status %d", dev->device,
                          (int)code);
}

void cudnn_close(struct conv_device *dev)
{
    struct cudnn_library *c = dev->cudnn;
    if (!c)
        return;
    if (c->handle)
        c->cudnnDestroy(c->handle);
    if (c->library)
        dlclose(c->library);
    delete c;
    dev->cudnn = NULL;
}

void cudnn_name(struct conv_device *dev, char *text, size_t size)
{
    struct ltn_error ignored;
    const size_t used = strlen(text);
    if (cudnn_open(dev, &ignored) == LTN_OK)
        snprintf(text + used, size - used, ", cuDNN %zu", dev->cudnn->cudnnGetVersion());
}

/* ---- the graph of one operation ---------------------------------------------------------------------------
 */

#define CUDNN_TRY(dev, err, name, ...)                                                                       \
    do {                                                                                                     \
        cudnnStatus_t cudnn_code_ = (dev)->cudnn->name(__VA_ARGS__);                                         \
        if (cudnn_code_ != CUDNN_STATUS_SUCCESS)                                                             \
            return ltn_fail(err, LTN_ERR_DEVICE, "cuda:%d: " #name " at %s:%d failed with status %d",        \
                            (dev)->device, __FILE__, __LINE__, (int)cudnn_code_);                            \
    } while (0)

struct attribute {
    cudnnBackendAttributeName_t name;
    cudnnBackendAttributeType_t type;
    int64_t count;
    const void *values;
};

/* A finished descriptor. */
static enum ltn_status make(struct conv_device *dev, descriptor *out, cudnnBackendDescriptorType_t type,
                            const struct attribute *attributes, int n, struct ltn_error *err)
{
    CUDNN_TRY(dev, err, cudnnBackendCreateDescriptor, type, out);
    for (int i = 0; i < n; i++)
        CUDNN_TRY(dev, err, cudnnBackendSetAttribute, *out, attributes[i].name, attributes[i].type,
                  attributes[i].count, attributes[i].values);
    CUDNN_TRY(dev, err, cudnnBackendFinalize, *out);
    return LTN_OK;
}

static enum ltn_status make_tensor(struct conv_device *dev, struct chosen *c, int part,
                                   const struct ltn_conv_shape *s, int64_t n, int64_t channels, int64_t h,
                                   int64_t w, struct ltn_error *err)
{
    const cudnnDataType_t type = s->type == LTN_CONV_BF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_FLOAT;
    const int64_t sizes[4] = {n, channels, h, w}, id = part + 1, alignment = ALIGNMENT;
    const int64_t nchw[4] = {channels * h * w, h * w, w, 1},
                  nhwc[4] = {h * w * channels, 1, w * channels, channels};
    const struct attribute attributes[] = {
        {CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type},
        {CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, sizes},
        {CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, s->layout == LTN_NCHW ? nchw : nhwc},
        {CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id},
        {CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment},
    };
    return make(dev, &c->parts[part], CUDNN_BACKEND_TENSOR_DESCRIPTOR, attributes, 5, err);
}

static enum ltn_status make_graph(struct conv_device *dev, struct chosen *c, const struct ltn_conv_shape *s,
                                  struct ltn_error *err)
{
    const int64_t dims = 2, before[2] = {s->pt, s->pl}, after[2] = {s->pb, s->pr},
                  dilations[2] = {s->dh, s->dw};
    const int64_t strides[2] = {s->sh, s->sw};
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    const cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
    const float one = 1, zero = 0;

    LTN_TRY(make_tensor(dev, c, X, s, s->n, s->ci, s->hi, s->wi, err));
    LTN_TRY(make_tensor(dev, c, W, s, s->co, s->ci / s->groups, s->hf, s->wf, err));
    LTN_TRY(make_tensor(dev, c, Y, s, s->n, s->co, ltn_conv_ho(s), ltn_conv_wo(s), err));
    const struct attribute convolution[] = {
        {CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, CUDNN_TYPE_INT64, 1, &dims},
        {CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute},
        {CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode},
        {CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, before},
        {CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, after},
        {CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, dilations},
        {CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, strides},
    };
    LTN_TRY(make(dev, &c->parts[CONVOLUTION], CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, convolution, 7, err));
    const struct attribute operation[] = {
        {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c->parts[X]},
        {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c->parts[W]},
        {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c->parts[Y]},
        {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1,
         &c->parts[CONVOLUTION]},
        {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_TYPE_FLOAT, 1, &one},
        {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, CUDNN_TYPE_FLOAT, 1, &zero},
    };
    LTN_TRY(make(dev, &c->parts[OPERATION], CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR, operation,
                 6, err));
    const struct attribute graph[] = {
        {CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &dev->cudnn->handle},
        {CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c->parts[OPERATION]},
    };
    return make(dev, &c->parts[GRAPH], CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, graph, 2, err);
}

/* ---- its engines ------------------------------------------------------------------------------------------
 */

/* What the engine of a configuration does to numbers, and its name: "engine 47, tensor cores". false: not one
 * for this type. */
static bool describe(struct conv_device *dev, descriptor config, enum ltn_conv_type type, char *text,
                     size_t size)
{
    struct cudnn_library *c = dev->cudnn;
    static const char *const names[] = {"tensor cores", "inputs rounded", "sums rounded", "FFT",
                                        NULL,           "Winograd"};
    descriptor engine;
    cudnnBackendNumericalNote_t notes[NOTES];
    int64_t n = 0, index = -1;

    snprintf(text, size, "engine ?");
    if (c->cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine) != CUDNN_STATUS_SUCCESS)
        return false;
    bool known =
        c->cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &n,
                                    &engine) == CUDNN_STATUS_SUCCESS;
    known = known && c->cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1,
                                                 &n, &index) == CUDNN_STATUS_SUCCESS;
    known = known &&
            c->cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                                        NOTES, &n, notes) == CUDNN_STATUS_SUCCESS;
    c->cudnnBackendDestroyDescriptor(engine);
    if (!known)
        return false;
    snprintf(text, size, "engine %d", (int)index);
    for (int64_t i = 0; i < n && i < NOTES; i++) {
        const bool rounds = notes[i] == CUDNN_NUMERICAL_NOTE_TENSOR_CORE ||
                            notes[i] == CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS;
        if (type == LTN_CONV_F32 && rounds)
            return false;
        const size_t used = strlen(text);
        if ((size_t)notes[i] < sizeof names / sizeof *names && names[notes[i]])
            snprintf(text + used, size - used, ", %s", names[notes[i]]);
    }
    return true;
}

/* Room to try plans in. */
struct trial {
    void *x, *y, *workspace;
    int64_t workspace_bytes;
    cudaEvent_t begin, end;
};

static enum ltn_status execute(struct conv_device *dev, descriptor plan, void *y, const void *x,
                               const void *filter, void *workspace, struct ltn_error *err)
{
    const int64_t ids[3] = {X + 1, W + 1, Y + 1};
    const void *pointers[3] = {x, filter, y};
    const struct attribute attributes[] = {
        {CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, 3, pointers},
        {CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, 3, ids},
        {CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace},
    };
    descriptor pack = NULL;
    enum ltn_status status = make(dev, &pack, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, attributes, 3, err);
    if (status == LTN_OK) {
        cudnnStatus_t code = dev->cudnn->cudnnBackendExecute(dev->cudnn->handle, plan, pack);
        if (code != CUDNN_STATUS_SUCCESS)
            status = ltn_fail(err, LTN_ERR_DEVICE, "cuda:%d: cuDNN's plan failed with status %d", dev->device,
                              (int)code);
    }
    if (pack)
        dev->cudnn->cudnnBackendDestroyDescriptor(pack);
    return status;
}

/* The plan's time in ms into *best, and true, where it runs and is faster than *best. */
static bool faster(struct conv_device *dev, struct trial *t, descriptor plan, int64_t workspace,
                   const void *filter, float *best)
{
    struct ltn_error ignored;
    float least = 1e30f, ms;

    if (workspace > t->workspace_bytes) {
        cudaFree(t->workspace);
        t->workspace_bytes = 0;
        t->workspace = NULL;
        if (conv_alloc(dev, &t->workspace, (size_t)workspace, &ignored) != LTN_OK)
            return false;
        t->workspace_bytes = workspace;
    }
    for (int i = 0; i <= TRIES; i++) {
        cudaEventRecord(t->begin, dev->stream);
        if (execute(dev, plan, t->y, t->x, filter, t->workspace, &ignored) != LTN_OK)
            return false;
        cudaEventRecord(t->end, dev->stream);
        if (cudaEventSynchronize(t->end) != cudaSuccess ||
            cudaEventElapsedTime(&ms, t->begin, t->end) != cudaSuccess)
            return false;
        if (i > 0 && ms < least)
            least = ms;
        /* the first run loads code, for milliseconds; hopeless ones are not run again */
        if (ms > 3 * *best + (i == 0 ? 100 : 0))
            return false;
    }
    if (least >= *best)
        return false;
    *best = least;
    return true;
}

/* Tries all configurations that one way of asking gives; keeps the fastest plan in c and names it. */
static void search(struct conv_device *dev, struct chosen *c, struct conv_op *op, struct trial *t,
                   cudnnBackendHeurMode_t mode, float *best)
{
    struct cudnn_library *d = dev->cudnn;
    struct ltn_error ignored;
    const struct attribute asked[] = {
        {CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c->parts[GRAPH]},
        {CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode},
    };
    descriptor heuristics = NULL, configs[CONFIGS] = {};
    int64_t n = 0;

    if (make(dev, &heuristics, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, asked, 2, &ignored) == LTN_OK) {
        for (descriptor &config : configs)
            if (d->cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, &config) !=
                CUDNN_STATUS_SUCCESS)
                config = NULL;
        if (d->cudnnBackendGetAttribute(heuristics, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                        CUDNN_TYPE_BACKEND_DESCRIPTOR, CONFIGS, &n,
                                        configs) != CUDNN_STATUS_SUCCESS)
            n = 0;
    }
    for (int64_t i = 0; i < n && i < CONFIGS; i++) {
        char text[sizeof op->base.info.variant];
        const struct attribute planned[] = {
            {CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &d->handle},
            {CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &configs[i]},
        };
        descriptor plan = NULL;
        int64_t workspace = 0, count = 0;
        bool better =
            describe(dev, configs[i], op->base.shape.type, text, sizeof text) &&
            make(dev, &plan, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, planned, 2, &ignored) == LTN_OK &&
            d->cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1,
                                        &count, &workspace) == CUDNN_STATUS_SUCCESS &&
            workspace <= MOST_WORKSPACE && faster(dev, t, plan, workspace, op->filter, best);
        if (better) {
            descriptor before = c->parts[PLAN];
            c->parts[PLAN] = plan;
            plan = before;
            c->workspace = workspace;
            memcpy(op->base.info.variant, text, sizeof text);
        }
        if (plan)
            d->cudnnBackendDestroyDescriptor(plan);
    }
    for (descriptor config : configs)
        if (config)
            d->cudnnBackendDestroyDescriptor(config);
    if (heuristics)
        d->cudnnBackendDestroyDescriptor(heuristics);
}

/* ---- the operator -----------------------------------------------------------------------------------------
 */

static enum ltn_status try_all(struct conv_device *dev, struct chosen *c, struct conv_op *op, struct trial *t,
                               struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const size_t size = ltn_conv_type_size(s->type);
    float best = 1e30f;

    LTN_TRY(conv_alloc(dev, &t->x, (size_t)ltn_conv_x_elements(s) * size, err));
    LTN_TRY(conv_alloc(dev, &t->y, (size_t)ltn_conv_y_elements(s) * size, err));
    LTN_TRY(dev->base.ops->normal(&dev->base, t->x, s->type, ltn_conv_x_elements(s), 3, err));
    CONV_TRY(dev, err, cudaEventCreate(&t->begin));
    CONV_TRY(dev, err, cudaEventCreate(&t->end));
    for (cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK})
        search(dev, c, op, t, mode, &best);
    cudaGetLastError(); /* of plans that did not run */
    return c->parts[PLAN]
               ? LTN_OK
               : ltn_fail(err, LTN_ERR_UNSUPPORTED, "cuDNN: no engine of it takes this convolution");
}

/* [co][ci][hf][wf] -> [co][hf][wf][ci], elements of `size` bytes */
template <typename T> static void channels_last(T *to, const float *from, const struct ltn_conv_shape *s)
{
    for (int32_t o = 0; o < s->co; o++)
        for (int32_t c = 0; c < s->ci / s->groups; c++)
            for (int32_t u = 0; u < s->hf; u++)
                for (int32_t v = 0; v < s->wf; v++)
                    to[(((int64_t)o * s->hf + u) * s->wf + v) * (s->ci / s->groups) + c] =
                        from[conv_filter_at(s, o, c, u, v)];
}

static const char *cudnn_refuse(const struct conv_device *, const struct ltn_conv_shape *s)
{
    return s->relu ? "the peer is measured without ReLU" : NULL;
}

static enum ltn_status cudnn_create(struct conv_device *dev, struct conv_op *op, const float *filter,
                                    struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    struct trial t = {};

    if (op->bias)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "cuDNN: the peer is measured without bias");
    LTN_TRY(cudnn_open(dev, err));
    if (s->layout == LTN_NHWC) {
        float *turned = new (std::nothrow) float[ltn_conv_filter_elements(s)];
        if (!turned)
            return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory for a filter");
        channels_last(turned, filter, s);
        enum ltn_status status = conv_upload_filter(dev, op, turned, err);
        delete[] turned;
        LTN_TRY(status);
    } else {
        LTN_TRY(conv_upload_filter(dev, op, filter, err));
    }
    struct chosen *c = new (std::nothrow) chosen();
    op->own = c;
    if (!c)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory");
    LTN_TRY(make_graph(dev, c, s, err));
    enum ltn_status status = try_all(dev, c, op, &t, err);
    cudaFree(t.x);
    cudaFree(t.y);
    cudaFree(t.workspace);
    if (t.begin)
        cudaEventDestroy(t.begin);
    if (t.end)
        cudaEventDestroy(t.end);
    op->base.info.workspace_bytes = (size_t)c->workspace;
    return status;
}

static enum ltn_status cudnn_run(struct conv_device *dev, struct conv_op *op, void *y, const void *x,
                                 void *workspace, enum ltn_conv_part part, struct ltn_error *err)
{
    struct chosen *c = (struct chosen *)op->own;
    return part == LTN_CONV_TRANSFORM ? LTN_OK
                                      : execute(dev, c->parts[PLAN], y, x, op->filter, workspace, err);
}

static void cudnn_free(struct conv_device *dev, struct conv_op *op)
{
    struct chosen *c = (struct chosen *)op->own;
    for (int part = PARTS - 1; c && part >= 0; part--)
        if (c->parts[part])
            dev->cudnn->cudnnBackendDestroyDescriptor(c->parts[part]);
    delete c;
}

#else

void cudnn_close(struct conv_device *)
{
}

void cudnn_name(struct conv_device *, char *, size_t)
{
}

static const char *cudnn_refuse(const struct conv_device *, const struct ltn_conv_shape *)
{
    return "built without cudnn.h";
}

static enum ltn_status cudnn_create(struct conv_device *, struct conv_op *, const float *, struct ltn_error *)
{
    return LTN_ERR_UNSUPPORTED;
}

static enum ltn_status cudnn_run(struct conv_device *, struct conv_op *, void *, const void *, void *,
                                 enum ltn_conv_part, struct ltn_error *)
{
    return LTN_ERR_UNSUPPORTED;
}

static void cudnn_free(struct conv_device *, struct conv_op *)
{
}

#endif

const struct conv_algo conv_cudnn = {LTN_CONV_CUDNN, cudnn_refuse, cudnn_create, cudnn_run, cudnn_free};
