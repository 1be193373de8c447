/* Threads that share the tasks of one job after another. */
#ifndef LTN_CPU_POOL_H
#define LTN_CPU_POOL_H

#include "kernels/status.h"

#include <stddef.h>
#include <stdint.h>

struct pool;

/* One task of a job; `worker` in [0, n_threads) names the thread, for scratch memory. */
typedef void pool_task(void *ctx, int64_t task, int worker);

/* n_threads >= 1, the calling thread of pool_run being one of them. */
enum ltn_status pool_open(struct pool **out, int n_threads, struct ltn_error *err);
void pool_close(struct pool *pool); /* NULL is allowed */

/* Runs fn(ctx, 0 .. n_tasks - 1), in any order and on any thread, and returns when all are done. Jobs of
 * several calling threads run one after another. */
void pool_run(struct pool *pool, int64_t n_tasks, pool_task *fn, void *ctx);

/* A hint: in one of the next jobs, task i of n_tasks reads `bytes` of memory from `from` + i * bytes on. From
 * now on threads that have nothing to do fetch the beginning of their share of it. n_tasks 0: nothing. */
void pool_expect(struct pool *pool, const void *from, size_t bytes, int64_t n_tasks);

#endif
