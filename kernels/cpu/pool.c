#include "kernels/cpu/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    TASK_BITS = 16,
    MAX_TASKS = (1 << TASK_BITS) - 1, /* of one job; longer ones are cut */
    SPIN_NS = 200000,                 /* how long an idle thread looks for work before it sleeps */
    STEP_BYTES = 512,                 /* of memory, that an idle thread fetches before it looks for work, */
    AHEAD_STEPS = 64,                 /* and how often: about as long as others work at the end of a job */
};

struct worker {
    /* Of this thread's share of the tasks: the number of a job above TASK_BITS, how many of them have been
     * taken below. Whoever takes from a share whose number is of an earlier job begins it. */
    _Alignas(64) atomic_uint_fast64_t taken;
    /* The number of the last job that this thread took tasks of, and how many, once they have ended. */
    _Alignas(64) atomic_uint_fast64_t ended;
    struct pool *pool;
    pthread_t thread;
    int index;
};

/* A job is published by one store to `ticket`: its number above TASK_BITS, its tasks below. Every thread
 * first takes its own share of them, which lie side by side and whose counter others seldom touch, then
 * fetches what it will read next, as far as that is known, then takes what it finds in the shares of others.
 * Taking fails once the number has changed or all are taken, so a thread that wakes late cannot take part in
 * the wrong job, and fn, ctx and base hold still as long as a taken task runs. */
struct pool {
    _Alignas(64) atomic_uint_fast64_t ticket;
    _Alignas(64) pool_task *fn;
    void *ctx;
    int64_t base; /* number of this job's first task */
    /* what was expected last; a thread that sees half of a change fetches what nobody needs */
    atomic_uintptr_t next;
    atomic_int_fast64_t next_bytes, next_tasks;
    atomic_int sleepers;
    atomic_bool quit;
    pthread_mutex_t turn;  /* held by the caller whose job runs */
    pthread_mutex_t mutex; /* for falling asleep and waking up */
    pthread_cond_t wake;
    int n_threads, n_started;
    struct worker workers[];
};

/* Whether task *k of a share of `size` was still to be had. */
static bool take(atomic_uint_fast64_t *taken, uint_fast64_t job, int64_t size, int64_t *k)
{
    uint_fast64_t seen = atomic_load(taken);
    do {
        if (seen >> TASK_BITS > job)
            return false;
        *k = seen >> TASK_BITS == job ? (int64_t)(seen & MAX_TASKS) : 0;
        if (*k >= size)
            return false;
    } while (!atomic_compare_exchange_weak(taken, &seen, job << TASK_BITS | (uint_fast64_t)(*k + 1)));
    return true;
}

static int64_t share_begin(const struct pool *pool, int64_t n_tasks, int owner)
{
    return n_tasks * owner / pool->n_threads;
}

/* Takes what is left of one share. What ran is told at once, before other shares are looked at: to look at
 * all of them takes as long as to start a job. */
static void take_share(struct pool *pool, uint_fast64_t ticket, int worker, int owner)
{
    const uint_fast64_t job = ticket >> TASK_BITS;
    const int64_t n_tasks = (int64_t)(ticket & MAX_TASKS), first = share_begin(pool, n_tasks, owner);
    const int64_t size = share_begin(pool, n_tasks, owner + 1) - first;
    atomic_uint_fast64_t *told = &pool->workers[worker].ended;
    uint_fast64_t ended = atomic_load(told);
    int64_t k;

    if (ended >> TASK_BITS != job)
        ended = job << TASK_BITS;
    const uint_fast64_t before = ended;
    while (take(&pool->workers[owner].taken, job, size, &k)) {
        pool->fn(pool->ctx, pool->base + first + k, worker);
        ended++;
    }
    if (ended > before)
        atomic_store(told, ended);
}

/* Part number `step` of what this thread expects; false: that was all. */
static bool fetch_ahead(struct pool *pool, int worker, int64_t step)
{
    const int64_t n_tasks = atomic_load_explicit(&pool->next_tasks, memory_order_relaxed);
    const int64_t bytes = atomic_load_explicit(&pool->next_bytes, memory_order_relaxed);
    const int64_t first = share_begin(pool, n_tasks, worker) * bytes + step * STEP_BYTES;
    if (step == AHEAD_STEPS || first >= share_begin(pool, n_tasks, worker + 1) * bytes)
        return false;
    const uintptr_t from = atomic_load_explicit(&pool->next, memory_order_relaxed) + (uintptr_t)first;
    for (uintptr_t i = 0; i < STEP_BYTES; i += 64)
        __builtin_prefetch((const void *)(from + i), 0, 2); /* as far as the second cache */
    return true;
}

static bool all_ended(struct pool *pool, uint_fast64_t job, int64_t n_tasks)
{
    for (int i = 0; i < pool->n_threads; i++) {
        const uint_fast64_t ended = atomic_load(&pool->workers[i].ended);
        n_tasks -= ended >> TASK_BITS == job ? (int64_t)(ended & MAX_TASKS) : 0;
    }
    return n_tasks == 0;
}

static inline void pause_briefly(void)
{
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void wait_for_work(struct pool *pool, uint_fast64_t finished)
{
    int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load(&pool->ticket) != finished || atomic_load(&pool->quit))
                return;
            pause_briefly();
        }
    } while (now_ns() < end);
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1); /* before the last look: who publishes later sees it and signals */
    while (atomic_load(&pool->ticket) == finished && !atomic_load(&pool->quit))
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *arg)
{
    const struct worker *worker = arg;
    struct pool *pool = worker->pool;
    while (!atomic_load(&pool->quit)) {
        const uint_fast64_t ticket = atomic_load(&pool->ticket);
        take_share(pool, ticket, worker->index, worker->index);
        for (int64_t step = 0; atomic_load(&pool->ticket) == ticket && fetch_ahead(pool, worker->index, step);
             step++)
            ;
        for (int i = 1; i < pool->n_threads && atomic_load(&pool->ticket) == ticket; i++)
            take_share(pool, ticket, worker->index, (worker->index + i) % pool->n_threads);
        wait_for_work(pool, ticket);
    }
    return NULL;
}

static void wake_all(struct pool *pool)
{
    if (atomic_load(&pool->sleepers) == 0)
        return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static void run_job(struct pool *pool, int64_t base, int64_t n_tasks, pool_task *fn, void *ctx)
{
    pool->fn = fn;
    pool->ctx = ctx;
    pool->base = base;
    uint_fast64_t job = (atomic_load(&pool->ticket) >> TASK_BITS) + 1;
    const uint_fast64_t ticket = job << TASK_BITS | (uint_fast64_t)n_tasks;
    atomic_store(&pool->ticket, ticket);
    wake_all(pool);
    take_share(pool, ticket, 0, 0);
    for (int64_t step = 0; !all_ended(pool, job, n_tasks) && fetch_ahead(pool, 0, step); step++)
        ;
    for (int i = 1; i < pool->n_threads && !all_ended(pool, job, n_tasks); i++)
        take_share(pool, ticket, 0, i);
    for (int spins = 0; !all_ended(pool, job, n_tasks); spins++) {
        if (spins < 4096)
            pause_briefly();
        else
            sched_yield(); /* the machine has more to run than cores */
    }
}

void pool_run(struct pool *pool, int64_t n_tasks, pool_task *fn, void *ctx)
{
    pthread_mutex_lock(&pool->turn);
    if (pool->n_threads == 1 || n_tasks == 1) {
        for (int64_t task = 0; task < n_tasks; task++)
            fn(ctx, task, 0);
    } else {
        for (int64_t base = 0; base < n_tasks; base += MAX_TASKS)
            run_job(pool, base, n_tasks - base < MAX_TASKS ? n_tasks - base : MAX_TASKS, fn, ctx);
    }
    pthread_mutex_unlock(&pool->turn);
}

void pool_expect(struct pool *pool, const void *from, size_t bytes, int64_t n_tasks)
{
    atomic_store_explicit(&pool->next, (uintptr_t)from, memory_order_relaxed);
    atomic_store_explicit(&pool->next_bytes, (int64_t)bytes, memory_order_relaxed);
    atomic_store_explicit(&pool->next_tasks, n_tasks, memory_order_relaxed);
}

void pool_close(struct pool *pool)
{
    if (!pool)
        return;
    atomic_store(&pool->quit, true);
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 1; i < pool->n_started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    pthread_mutex_destroy(&pool->turn);
    free(pool);
}

enum ltn_status pool_open(struct pool **out, int n_threads, struct ltn_error *err)
{
    size_t bytes = sizeof(struct pool) + (size_t)n_threads * sizeof(struct worker);
    struct pool *pool = *out = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!pool)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for a pool of %d threads", n_threads);
    memset(pool, 0, bytes);
    pthread_mutex_init(&pool->turn, NULL);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->n_threads = n_threads;
    sigset_t all, before; /* a program's signals are for its own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pool->n_started = 1; pool->n_started < n_threads; pool->n_started++) {
        struct worker *worker = &pool->workers[pool->n_started];
        worker->pool = pool;
        worker->index = pool->n_started;
        int code = pthread_create(&worker->thread, NULL, worker_main, worker);
        if (code) {
            int started = pool->n_started;
            pthread_sigmask(SIG_SETMASK, &before, NULL);
            pool_close(pool);
            *out = NULL;
            return ltn_fail(err, LTN_ERR_DEVICE, "CPU backend: thread %d of %d does not start: %s",
                            started + 1, n_threads, strerror(code));
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return LTN_OK;
}
