/* The fast CPU backend: cuts every operation into tasks for the thread pool. The arithmetic is in
 * micro_body.h, that of attention in lightning.c. Tasks share out elements of the result, never parts of a
 * sum, so the number of threads does not change a bit. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/memory.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

/* Rows of `cols` elements that make a task worth handing to another thread. */
static int rows_per_task(int32_t cols)
{
    return cols < 8192 ? 8192 / cols : 1;
}

/* ---- embed, norms, activation, multiply -------------------------------------------------------------- */

/* Row-wise operations; each uses the fields that it needs. */
struct rows_job {
    const struct cpu_backend *cpu;
    float *y;
    const float *x, *gate;
    size_t ld_y, ld_gate;
    const struct ltn_matrix *table;
    const int32_t *ids;
    float factor;
    const struct ltn_norm *norm;
    enum ltn_act act;
    int32_t rows, cols, group;
    void (*row)(const struct rows_job *job, size_t r);
};

static void rows_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const struct rows_job *job = ctx;
    int64_t count = rows_per_task(job->cols), first = task * count;
    for (int64_t r = first; r < first + count && r < job->rows; r++)
        job->row(job, (size_t)r);
}

static enum ltn_status run_rows(struct ltn_backend *be, struct rows_job *job)
{
    job->cpu = (const struct cpu_backend *)be;
    int64_t count = rows_per_task(job->cols);
    pool_run(job->cpu->pool, (job->rows + count - 1) / count, rows_task, job);
    return LTN_OK;
}

static void embed_row(const struct rows_job *job, size_t r)
{
    size_t cols = (size_t)job->cols;
    for (size_t c = 0; c < cols; c++)
        job->y[r * cols + c] = job->factor * ltn_weight(job->table->data, job->table->scales,
                                                        job->table->dtype, cols, (size_t)job->ids[r], c);
}

static enum ltn_status cpu_embed(struct ltn_backend *be, float *x, const struct ltn_matrix *table,
                                 const int32_t *ids, int32_t rows, float scale, struct ltn_error *err)
{
    (void)err;
    return run_rows(be, &(struct rows_job){.y = x,
                                           .table = table,
                                           .ids = ids,
                                           .factor = scale,
                                           .rows = rows,
                                           .cols = table->cols,
                                           .row = embed_row});
}

static void norm_row(const struct rows_job *job, size_t r)
{
    const struct micro *micro = job->cpu->micro;
    size_t n = (size_t)job->cols;
    const float *x = job->x + r * n;
    float mean = job->norm->weight ? micro->sum(x, n) / (float)n : 0;
    double variance = (double)micro->sum_squares(x, mean, n) / (double)n;
    double eps = job->norm->weight ? 1e-5 : 1e-6;
    micro->normalize(job->y + r * n, x, job->gate ? job->gate + r * job->ld_gate : NULL, job->norm, mean,
                     (float)(1 / sqrt(variance + eps)), n);
}

static enum ltn_status cpu_norm(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *norm,
                                int32_t rows, int32_t cols, struct ltn_error *err)
{
    (void)err;
    return run_rows(
        be, &(struct rows_job){.y = y, .x = x, .norm = norm, .rows = rows, .cols = cols, .row = norm_row});
}

static enum ltn_status cpu_gated_norm(struct ltn_backend *be, void *y, const void *o, const void *gate,
                                      int32_t ld_gate, const struct ltn_norm *norm, int32_t rows,
                                      int32_t cols, struct ltn_error *err)
{
    (void)err;
    return run_rows(be, &(struct rows_job){.y = y,
                                           .x = o,
                                           .gate = gate,
                                           .ld_gate = (size_t)ld_gate,
                                           .norm = norm,
                                           .rows = rows,
                                           .cols = cols,
                                           .row = norm_row});
}

static void activation_row(const struct rows_job *job, size_t r)
{
    float *x = job->y + r * job->ld_y;
    if (job->act != LTN_ACT_EXP) {
        job->cpu->micro->activate(x, job->act, 0, (size_t)job->cols);
        return;
    }
    for (int32_t first = 0; first < job->cols; first += job->group) {
        float max = x[first];
        for (int32_t c = first + 1; c < first + job->group; c++)
            max = x[c] > max ? x[c] : max;
        job->cpu->micro->activate(x + first, job->act, max, (size_t)job->group);
    }
}

static enum ltn_status cpu_activation(struct ltn_backend *be, void *x, int32_t ld, int32_t rows, int32_t cols,
                                      int32_t group, enum ltn_act act, struct ltn_error *err)
{
    (void)err;
    return run_rows(be, &(struct rows_job){.y = x,
                                           .ld_y = (size_t)ld,
                                           .act = act,
                                           .rows = rows,
                                           .cols = cols,
                                           .group = group,
                                           .row = activation_row});
}

enum { MULTIPLY_STEP = 16384 };

struct multiply_job {
    const struct micro *micro;
    float *a;
    const float *b;
    int64_t n;
};

static void multiply_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const struct multiply_job *job = ctx;
    int64_t first = task * MULTIPLY_STEP, left = job->n - first;
    job->micro->multiply(job->a + first, job->b + first,
                         (size_t)(left < MULTIPLY_STEP ? left : MULTIPLY_STEP));
}

static enum ltn_status cpu_multiply(struct ltn_backend *be, void *a, const void *b, int64_t n,
                                    struct ltn_error *err)
{
    (void)err;
    const struct cpu_backend *cpu = (const struct cpu_backend *)be;
    pool_run(cpu->pool, (n + MULTIPLY_STEP - 1) / MULTIPLY_STEP, multiply_task,
             &(struct multiply_job){.micro = cpu->micro, .a = a, .b = b, .n = n});
    return LTN_OK;
}

/* ---- matrix products --------------------------------------------------------------------------------- */

enum {
    TASK_ROWS = 96, /* rows of x by rows of W that one task multiplies: both stay in the L2 cache */
    TASK_OUTS = 64,
    ROW_OUTS = 128, /* rows of W for one row of x at most: the cache keeps nothing */
};

/* Rows of W of a task. For one row of x: two tasks a thread, and whole tiles. */
static int outs_of_task(int rows, int outs, int n_threads)
{
    if (rows > 1)
        return TASK_OUTS;
    const int step = (outs + 2 * n_threads - 1) / (2 * n_threads);
    return step > ROW_OUTS ? ROW_OUTS : (step + 3) / 4 * 4;
}

struct matmul_job {
    const struct cpu_backend *cpu;
    float *y;
    const float *x;
    const struct ltn_matrix *w;
    const float *bias;
    int rows, row_step, row_tasks, out_step;
    bool add;
    enum ltn_act act; /* of the first act_cols outputs */
    int act_cols;
    const struct ltn_linear *factor; /* or NULL: y is multiplied by what this gives, in y2 */
    float *y2;
};

/* A block of y = [y +] x W^T [+ bias]. */
static void block(const struct matmul_job *job, float *y, const struct ltn_matrix *w, const float *bias,
                  size_t row, size_t out, int rows, int n_outs, bool add)
{
    const size_t outs = (size_t)w->rows, cols = (size_t)w->cols;
    const char *scales = w->scales;
    job->cpu->micro->dots[w->dtype](y + row * outs + out, outs, job->x + row * cols, cols,
                                    (const char *)w->data + out * ltn_row_bytes(w->dtype, cols),
                                    scales ? scales + out * ltn_row_scale_bytes(w->dtype, cols) : NULL, rows,
                                    n_outs, w->cols, add, bias ? bias + out : NULL);
}

static void matmul_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const struct matmul_job *job = ctx;
    const struct micro *micro = job->cpu->micro;
    const size_t outs = (size_t)job->w->rows;
    const size_t row = (size_t)(task % job->row_tasks) * (size_t)job->row_step;
    const size_t out = (size_t)(task / job->row_tasks) * (size_t)job->out_step;
    const int rows = min_int(job->rows - (int)row, job->row_step);
    const int n_outs = min_int(job->w->rows - (int)out, job->out_step);
    const int n_act = min_int(job->act_cols - (int)out, n_outs);

    block(job, job->y, job->w, job->bias, row, out, rows, n_outs, job->add);
    if (job->factor)
        block(job, job->y2, &job->factor->w, job->factor->bias, row, out, rows, n_outs, false);
    for (int r = 0; r < rows; r++) {
        const size_t at = (row + (size_t)r) * outs + out;
        if (n_act > 0)
            micro->activate(job->y + at, job->act, 0, (size_t)n_act);
        if (job->factor)
            micro->multiply(job->y + at, job->y2 + at, (size_t)n_outs);
    }
}

/* Threads of which none has much to do wait at the end of every product, and memory with them: in that time
 * they fetch the beginning of their share of the next one's weights. */
static void cpu_expect(struct ltn_backend *be, const struct ltn_matrix *w, int32_t rows)
{
    const struct cpu_backend *cpu = (const struct cpu_backend *)be;
    const int step = outs_of_task(rows, w->rows, cpu->n_threads);
    pool_expect(cpu->pool, w->data, (size_t)step * ltn_row_bytes(w->dtype, (size_t)w->cols),
                rows > TASK_ROWS ? 0 : (w->rows + step - 1) / step);
}

static enum ltn_status matmul(struct ltn_backend *be, struct matmul_job job)
{
    const int outs = job.w->rows;
    job.cpu = (const struct cpu_backend *)be;
    job.row_step = TASK_ROWS;
    job.row_tasks = (job.rows + TASK_ROWS - 1) / TASK_ROWS;
    job.out_step = outs_of_task(job.rows, outs, job.cpu->n_threads);
    pool_run(job.cpu->pool, (int64_t)job.row_tasks * ((outs + job.out_step - 1) / job.out_step), matmul_task,
             &job);
    return LTN_OK;
}

static enum ltn_status cpu_linear(struct ltn_backend *be, void *y, const void *x, const struct ltn_linear *l,
                                  int32_t rows, struct ltn_error *err)
{
    (void)err;
    return matmul(be, (struct matmul_job){.y = y, .x = x, .w = &l->w, .bias = l->bias, .rows = rows});
}

static enum ltn_status cpu_linear_add(struct ltn_backend *be, float *x, const void *y,
                                      const struct ltn_linear *l, int32_t rows, struct ltn_error *err)
{
    (void)err;
    return matmul(
        be, (struct matmul_job){.y = x, .x = y, .w = &l->w, .bias = l->bias, .rows = rows, .add = true});
}

static enum ltn_status cpu_logits(struct ltn_backend *be, float *out, const void *y,
                                  const struct ltn_matrix *w, int32_t rows, struct ltn_error *err)
{
    (void)err;
    return matmul(be, (struct matmul_job){.y = out, .x = y, .w = w, .rows = rows});
}

static enum ltn_status cpu_norm_linear(struct ltn_backend *be, void *y, const float *x,
                                       const struct ltn_norm *norm, const struct ltn_linear *l,
                                       enum ltn_act act, int32_t act_cols, int32_t group, int32_t rows,
                                       void *scratch, struct ltn_error *err)
{
    const bool apart = act == LTN_ACT_EXP && act_cols > 0; /* it needs a group's maximum first */
    LTN_TRY(cpu_norm(be, scratch, x, norm, rows, l->w.cols, err));
    LTN_TRY(matmul(be, (struct matmul_job){.y = y,
                                           .x = scratch,
                                           .w = &l->w,
                                           .bias = l->bias,
                                           .rows = rows,
                                           .act = act,
                                           .act_cols = apart ? 0 : act_cols}));
    return apart ? cpu_activation(be, y, l->w.rows, rows, act_cols, group, act, err) : LTN_OK;
}

static enum ltn_status cpu_norm_glu(struct ltn_backend *be, void *y, const float *x,
                                    const struct ltn_norm *norm, const struct ltn_linear *l1,
                                    const struct ltn_linear *l2, int32_t rows, void *scratch, void *scratch2,
                                    struct ltn_error *err)
{
    LTN_TRY(cpu_norm(be, scratch, x, norm, rows, l1->w.cols, err));
    return matmul(
        be,
        (struct matmul_job){
            .y = y, .x = scratch, .w = &l1->w, .bias = l1->bias, .rows = rows, .factor = l2, .y2 = scratch2});
}

/* ---- opening and closing ----------------------------------------------------------------------------- */

static void cpu_close(struct ltn_backend *be)
{
    struct cpu_backend *cpu = (struct cpu_backend *)be;
    pool_close(cpu->pool);
    free(cpu->scratch);
    free(cpu);
}

static const struct ltn_ops cpu_ops = {
    LTN_HOST_MEMORY_OPS,          .close = cpu_close,
    .embed = cpu_embed,           .norm = cpu_norm,
    .gated_norm = cpu_gated_norm, .linear = cpu_linear,
    .linear_add = cpu_linear_add, .logits = cpu_logits,
    .activation = cpu_activation, .multiply = cpu_multiply,
    .lightning = cpu_lightning,   .norm_linear = cpu_norm_linear,
    .norm_glu = cpu_norm_glu,     .expect = cpu_expect,
};

enum ltn_cpu_isa ltn_cpu_best_isa(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512vnni") ? LTN_CPU_VNNI : LTN_CPU_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return LTN_CPU_AVX2;
    return LTN_CPU_PORTABLE;
}

/* Cores that this process may run on; at least 1. */
static int available_cores(void)
{
    int cores = 0;
    for (int cpus = 1024; cpus <= 1 << 20 && cores == 0; cpus *= 4) { /* the kernel's mask may be longer */
        cpu_set_t *set = CPU_ALLOC((size_t)cpus);
        if (set && sched_getaffinity(0, CPU_ALLOC_SIZE((size_t)cpus), set) == 0)
            cores = CPU_COUNT_S(CPU_ALLOC_SIZE((size_t)cpus), set);
        CPU_FREE(set);
    }
    return cores > 0 ? cores : 1;
}

enum ltn_status ltn_cpu_open_isa(struct ltn_backend **out, int n_threads, enum ltn_cpu_isa isa,
                                 struct ltn_error *err)
{
    static const struct micro *const micros[] = {&ltn_micro_portable, &ltn_micro_avx2, &ltn_micro_avx512,
                                                 &ltn_micro_vnni};
    *out = NULL;
    if (isa > ltn_cpu_best_isa())
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "CPU backend: this machine has no %s", micros[isa]->name);
    if (n_threads < 0 || n_threads > 4096)
        return ltn_fail(err, LTN_ERR_INPUT, "CPU backend: 0 to 4096 threads expected, found %d", n_threads);
    if (n_threads == 0)
        n_threads = min_int(available_cores(), 4096);

    struct cpu_backend *cpu = calloc(1, sizeof *cpu);
    if (!cpu)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for the CPU backend");
    cpu->base.ops = &cpu_ops;
    cpu->base.act_dtype = LTN_F32;
    cpu->base.dtypes = (1u << LTN_N_DTYPES) - 1;
    cpu->base.host_memory = true;
    cpu->base.chunk_rows = 256;
    snprintf(cpu->base.name, sizeof cpu->base.name, "CPU, %d thread%s, %s", n_threads,
             n_threads == 1 ? "" : "s", micros[isa]->name);
    cpu->micro = micros[isa];
    cpu->n_threads = n_threads;
    size_t bytes = (size_t)n_threads * CPU_SCRATCH_FLOATS * sizeof *cpu->scratch;
    cpu->scratch = aligned_alloc(64, bytes);
    enum ltn_status status =
        cpu->scratch ? pool_open(&cpu->pool, n_threads, err)
                     : ltn_fail(err, LTN_ERR_MEMORY, "host memory: no %zu MB for %d threads to work in",
                                bytes / 1000000, n_threads);
    if (status != LTN_OK) {
        cpu_close(&cpu->base);
        return status;
    }
    *out = &cpu->base;
    return LTN_OK;
}

enum ltn_status ltn_cpu_open(struct ltn_backend **out, int n_threads, struct ltn_error *err)
{
    return ltn_cpu_open_isa(out, n_threads, ltn_cpu_best_isa(), err);
}
