/* Quantised matrices where gemv_quant.cu does not take them: into bf16, for the kernels of bf16 weights; and
 * the embedding. */
#include "kernels/cuda/quant.cuh"

#include <cuda_fp8.h>

enum { THREADS = 256, EACH = 8 }; /* columns that a thread turns into bf16 */

/* Weight [row, c], as ltn_weight() has it. */
template <int DTYPE>
static __device__ __forceinline__ float weight(const uint8_t *codes, const void *scales, int32_t cols,
                                               int64_t row, int32_t c)
{
    const int64_t groups = (cols + LTN_GROUP - 1) / LTN_GROUP;
    if (DTYPE == LTN_FP8) {
        const __half_raw h = __nv_cvt_fp8_to_halfraw(codes[row * cols + c], __NV_E4M3);
        return __half2float(*reinterpret_cast<const __half *>(&h)) * ((const float *)scales)[row];
    }
    const float scale = __half2float(((const __half *)scales)[row * groups + c / LTN_GROUP]);
    if (DTYPE == LTN_Q8)
        return (float)(int8_t)codes[row * cols + c] * scale;
    const int in_group = c % LTN_GROUP;
    const int byte =
        codes[(row * groups + c / LTN_GROUP) * LTN_Q4_GROUP_BYTES + in_group % LTN_Q4_GROUP_BYTES];
    return (float)((((in_group < LTN_Q4_GROUP_BYTES ? byte : byte >> 4) & 15) ^ 8) - 8) * scale;
}

template <int DTYPE>
static __global__ void __launch_bounds__(THREADS)
    widen_kernel(__nv_bfloat16 *out, const uint8_t *codes, const void *scales, int64_t rows, int32_t cols)
{
    const int32_t per_row = (cols + EACH - 1) / EACH;
    let_next_start();
    wait_for_previous();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < rows * per_row;
         i += (int64_t)gridDim.x * THREADS) {
        const int64_t row = i / per_row;
        const int32_t c = (int32_t)(i % per_row) * EACH;
        if (cols % EACH == 0) {
            __nv_bfloat162 two[EACH / 2];
#pragma unroll
            for (int k = 0; k < EACH; k += 2)
                two[k / 2] = __floats2bfloat162_rn(weight<DTYPE>(codes, scales, cols, row, c + k),
                                                   weight<DTYPE>(codes, scales, cols, row, c + k + 1));
            *reinterpret_cast<uint4 *>(out + row * cols + c) = *reinterpret_cast<uint4 *>(two);
        } else {
            for (int k = 0; k < EACH && c + k < cols; k++)
                out[row * cols + c + k] = __float2bfloat16(weight<DTYPE>(codes, scales, cols, row, c + k));
        }
    }
}

static enum ltn_status widen(struct cuda_backend *be, __nv_bfloat16 *out, const struct ltn_matrix *w,
                             struct ltn_error *err)
{
    const int64_t n = (int64_t)w->rows * ((w->cols + EACH - 1) / EACH);
    const dim3 grid(blocks_for(n < (1 << 20) ? n : 1 << 20, THREADS));
#define WIDEN(DTYPE)                                                                                         \
    LAUNCH(be, err, widen_kernel<DTYPE>, grid, dim3(THREADS), 0, out, (const uint8_t *)w->data, w->scales,   \
           (int64_t)w->rows, w->cols)
    if (w->dtype == LTN_Q8)
        WIDEN(LTN_Q8);
    else if (w->dtype == LTN_FP8)
        WIDEN(LTN_FP8);
    else
        WIDEN(LTN_Q4);
#undef WIDEN
    be->apart = true;
    return LTN_OK;
}

/* Elements of a matrix in bf16; what follows it is aligned. */
static size_t elements(const struct ltn_matrix *w)
{
    return ((size_t)w->rows * w->cols + 31) & ~(size_t)31;
}

/* Bytes of both in bf16; w2: NULL, or of a second matrix. */
static size_t widened_bytes(const struct ltn_matrix *w, const struct ltn_matrix *w2)
{
    return (elements(w) + (w2 ? elements(w2) : 0)) * sizeof(__nv_bfloat16);
}

/* As quant_product() has it, for one product of up to so many rows. */
static void product_room(const struct cuda_backend *be, const struct ltn_matrix *w,
                         const struct ltn_matrix *w2, const struct ltn_norm *norm, int32_t rows,
                         size_t *needed)
{
    struct product one = {};
    one.w = w->data;
    one.w2 = w2 ? w2->data : NULL;
    one.outs = w->rows;
    one.cols = w->cols;
    one.rows = 1;
    one.in = norm ? IN_NORM : IN_ACT;
    if (norm)
        one.norm = *norm;
    if (w->data && ltn_is_quantised(w->dtype) && (rows > GEMV_ROWS || !gemv_quant_suits(be, &one)))
        raise(&needed[ROOM_WIDENED], widened_bytes(w, w2));
}

void quant_room(const struct cuda_backend *be, const struct ltn_network *net, int32_t rows, int32_t logits,
                size_t *needed)
{
    for (int32_t i = 0; i < net->n_layers; i++) {
        const struct ltn_layer *l = &net->layers[i];
        product_room(be, &l->qkv.w, NULL, &l->token_norm, rows, needed);
        product_room(be, &l->gate0.w, NULL, &l->token_norm, rows, needed);
        product_room(be, &l->gate1.w, NULL, NULL, rows, needed);
        product_room(be, &l->out.w, NULL, &l->attn_norm, rows, needed);
        product_room(be, &l->l1.w, &l->l2.w, &l->channel_norm, rows, needed);
        product_room(be, &l->l3.w, NULL, NULL, rows, needed);
    }
    product_room(be, &net->head, NULL, &net->final_norm, logits, needed);
}

/* Each row by itself: the same bits however many there are. */
static enum ltn_status row_by_row(struct cuda_backend *be, const struct product *p,
                                  const struct quant_scales *scales, enum ltn_dtype dtype,
                                  struct ltn_error *err)
{
    const size_t act = sizeof(__nv_bfloat16);
    for (int64_t r = 0; r < p->rows; r++) {
        struct product one = *p;
        one.rows = 1;
        one.x = (const uint8_t *)p->x + r * p->cols * (p->in == IN_NORM ? sizeof(float) : act);
        one.gate = p->gate ? (const uint8_t *)p->gate + r * p->ld_gate * act : NULL;
        one.y = (uint8_t *)p->y + r * p->outs * (p->out == OUT_ACT ? act : sizeof(float));
        LTN_TRY(gemv_quant(be, &one, scales, dtype, err));
    }
    return LTN_OK;
}

enum ltn_status quant_product(struct cuda_backend *be, const struct product *p, const struct ltn_linear *l,
                              const struct ltn_linear *l2, struct ltn_linear *plain,
                              struct ltn_linear *plain2, bool *done, struct ltn_error *err)
{
    const struct quant_scales scales = {l->w.scales, l2 ? l2->w.scales : NULL};
    struct product one = *p;
    void *room;
    one.rows = 1;
    *done = (p->rows <= GEMV_ROWS || be->steps) && gemv_quant_suits(be, &one) &&
            (p->rows == 1 || !p->gate || p->ld_gate % 8 == 0);
    if (*done)
        return row_by_row(be, p, &scales, l->w.dtype, err);
    LTN_TRY(room_part(be, &room, ROOM_WIDENED, widened_bytes(&l->w, l2 ? &l2->w : NULL), err));
    __nv_bfloat16 *widened = (__nv_bfloat16 *)room, *second = widened + elements(&l->w);
    *plain = *l;
    plain->w = {widened, LTN_BF16, l->w.rows, l->w.cols, NULL};
    LTN_TRY(widen(be, widened, &l->w, err));
    if (!l2)
        return LTN_OK;
    *plain2 = *l2;
    plain2->w = {second, LTN_BF16, l2->w.rows, l2->w.cols, NULL};
    return widen(be, second, &l2->w, err);
}

/* ---- embedding -------------------------------------------------------------------------------------------
 */

template <int DTYPE>
static __global__ void embed_kernel(float *x, const uint8_t *codes, const void *scales, const int32_t *ids,
                                    int32_t cols, float scale)
{
    let_next_start();
    wait_for_previous();
    const int64_t row = blockIdx.y, id = __ldcg(ids + row);
    for (int32_t c = blockIdx.x * blockDim.x + threadIdx.x; c < cols; c += gridDim.x * blockDim.x)
        x[row * cols + c] = scale * weight<DTYPE>(codes, scales, cols, id, c);
}

enum ltn_status quant_embed(struct cuda_backend *be, float *x, const struct ltn_matrix *table,
                            const int32_t *ids, int32_t rows, float scale, struct ltn_error *err)
{
    const uint8_t *codes = (const uint8_t *)table->data;
    for (int32_t first = 0; first < rows; first += 65535) {
        const dim3 grid(blocks_for(table->cols, THREADS), rows - first < 65535 ? rows - first : 65535);
        float *to = x + (int64_t)first * table->cols;
#define EMBED(DTYPE)                                                                                         \
    LAUNCH(be, err, embed_kernel<DTYPE>, grid, dim3(THREADS), 0, to, codes, table->scales, ids + first,      \
           table->cols, scale)
        if (table->dtype == LTN_Q8)
            EMBED(LTN_Q8);
        else if (table->dtype == LTN_FP8)
            EMBED(LTN_FP8);
        else
            EMBED(LTN_Q4);
#undef EMBED
    }
    return LTN_OK;
}
