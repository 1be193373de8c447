/* Inside of the fast CPU backend. */
#ifndef LTN_CPU_CPU_H
#define LTN_CPU_CPU_H

#include "kernels/cpu/micro.h"
#include "kernels/cpu/pool.h"
#include "kernels/ops.h"

enum ltn_cpu_isa { LTN_CPU_PORTABLE, LTN_CPU_AVX2, LTN_CPU_AVX512, LTN_CPU_VNNI };

/* The best that this machine has. */
enum ltn_cpu_isa ltn_cpu_best_isa(void);

/* ltn_cpu_open with a chosen instruction set; LTN_ERR_UNSUPPORTED where the machine lacks it. */
enum ltn_status ltn_cpu_open_isa(struct ltn_backend **out, int n_threads, enum ltn_cpu_isa isa,
                                 struct ltn_error *err);

enum { CPU_SCRATCH_FLOATS = 64 * 6 * 1024 }; /* of one thread: a block of lightning attention */

struct cpu_backend {
    struct ltn_backend base;
    const struct micro *micro;
    int n_threads;
    struct pool *pool;
    float *scratch; /* [n_threads, CPU_SCRATCH_FLOATS] */
};

/* kernels/cpu/lightning.c */
enum ltn_status cpu_lightning(struct ltn_backend *be, void *o, const void *q, const void *k, const void *v,
                              int32_t ld, const struct ltn_attention *a, const struct ltn_seq *seqs,
                              int32_t n_seqs, struct ltn_error *err);

#endif
