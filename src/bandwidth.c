#include "src/bandwidth.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kernels/rng.h"

enum { PASSES = 3, LINE = 64 };
static const size_t least_bytes = (size_t)256 << 20, most_bytes = (size_t)512 << 20;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the host ------------------------------------------------------------------------------------------ */

struct gang {
    uint64_t *memory;     /* [threads * words] */
    size_t words;         /* of each thread */
    pthread_mutex_t gate; /* held until all have started, or one could not */
    bool called_off;
    pthread_barrier_t barrier;
    double read_seconds, copy_seconds; /* of the best pass */
};

struct member {
    struct gang *gang;
    int index;
    pthread_t thread;
    uint64_t sum; /* keeps the reads from being optimised away */
};

static uint64_t read_words(const uint64_t *w, size_t n)
{
    uint64_t sum[16] = {0};
    for (size_t i = 0; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++)
            sum[j] += w[i + (size_t)j];
    for (int j = 1; j < 16; j++)
        sum[0] ^= sum[j];
    return sum[0];
}

/* Every pass lies between two barriers; member 0 holds the clock. */
static double timed(struct member *m, bool copy, uint64_t *words, double best)
{
    struct gang *gang = m->gang;
    pthread_barrier_wait(&gang->barrier);
    double begin = now();
    if (copy)
        memcpy(words, words + gang->words / 2, gang->words / 2 * sizeof *words);
    else
        m->sum += read_words(words, gang->words);
    pthread_barrier_wait(&gang->barrier);
    double seconds = now() - begin;
    return best == 0 || seconds < best ? seconds : best;
}

static void *work(void *member)
{
    struct member *m = member;
    struct gang *gang = m->gang;
    uint64_t *words = gang->memory + (size_t)m->index * gang->words;
    double read_seconds = 0, copy_seconds = 0;

    pthread_mutex_lock(&gang->gate);
    bool called_off = gang->called_off;
    pthread_mutex_unlock(&gang->gate);
    if (called_off)
        return NULL;
    memset(words, m->index + 1,
           gang->words * sizeof *words); /* pages lie near the thread that touches them */
    for (int i = 0; i < PASSES; i++)
        read_seconds = timed(m, false, words, read_seconds);
    for (int i = 0; i < PASSES; i++)
        copy_seconds = timed(m, true, words, copy_seconds);
    if (m->index == 0) {
        gang->read_seconds = read_seconds;
        gang->copy_seconds = copy_seconds;
    }
    return NULL;
}

/* Somewhat more than the cache is enough: what a pass leaves there, the next one has pushed out before it
 * gets to it. */
static size_t buffer_bytes(void)
{
    long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    size_t bytes = cache > 0 ? (size_t)cache / 4 * 5 : 0;
    return bytes < least_bytes ? least_bytes : bytes > most_bytes ? most_bytes : bytes;
}

static enum ltn_status measure_host(int n_threads, struct ltn_bandwidth *out, struct ltn_error *err)
{
    struct gang gang = {.words = buffer_bytes() / sizeof(uint64_t) / (size_t)n_threads / LINE * LINE};
    size_t bytes = (size_t)n_threads * gang.words * sizeof(uint64_t);
    struct member *members = calloc((size_t)n_threads, sizeof *members);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (!members || memory == MAP_FAILED) {
        free(members);
        if (memory != MAP_FAILED)
            munmap(memory, bytes);
        return ltn_fail(err, LTN_ERR_MEMORY, "bandwidth: no memory for a buffer of %zu bytes", bytes);
    }
    madvise(memory, bytes, MADV_HUGEPAGE);
    gang.memory = memory;
    pthread_barrier_init(&gang.barrier, NULL, (unsigned)n_threads);
    pthread_mutex_init(&gang.gate, NULL);
    pthread_mutex_lock(&gang.gate);
    int started = 1; /* this thread is member 0 */
    for (int i = 0; i < n_threads; i++)
        members[i] = (struct member){.gang = &gang, .index = i};
    while (started < n_threads &&
           pthread_create(&members[started].thread, NULL, work, &members[started]) == 0)
        started++;
    gang.called_off = started < n_threads;
    pthread_mutex_unlock(&gang.gate);
    work(&members[0]);
    for (int i = 1; i < started; i++)
        pthread_join(members[i].thread, NULL);
    pthread_mutex_destroy(&gang.gate);
    pthread_barrier_destroy(&gang.barrier);
    munmap(memory, bytes);
    free(members);
    if (gang.called_off)
        return ltn_fail(err, LTN_ERR_MEMORY, "bandwidth: expected %d threads, could start %d", n_threads,
                        started);
    out->read_gbps = 1e-9 * (double)bytes / gang.read_seconds;
    out->copy_gbps = 1e-9 * (double)bytes / gang.copy_seconds;
    return LTN_OK;
}

/* ---- a device ------------------------------------------------------------------------------------------ */

/* The best of some batches of passes; the first one warms up. */
static enum ltn_status time_passes(struct ltn_backend *be, uint8_t *dst, const uint8_t *src, size_t bytes,
                                   bool copy, double *best, struct ltn_error *err)
{
    enum { BATCH = 10 };
    for (int i = 0; i <= PASSES; i++) {
        LTN_TRY(be->ops->sync(be, err));
        double begin = now();
        for (int k = 0; k < BATCH; k++)
            LTN_TRY(copy ? be->ops->copy(be, dst, src, bytes, err)
                         : be->ops->sum(be, (uint64_t *)dst, src, bytes, err));
        LTN_TRY(be->ops->sync(be, err));
        double seconds = (now() - begin) / BATCH;
        if (i == 1 || (i > 1 && seconds < *best))
            *best = seconds;
    }
    return LTN_OK;
}

/* Random words, doubled until they fill the buffer: equal bytes take a device less power, and then less time.
 */
static enum ltn_status fill(struct ltn_backend *be, uint8_t *memory, size_t bytes, struct ltn_error *err)
{
    uint32_t block[1 << 14];
    size_t done = sizeof block;
    for (uint32_t i = 0; i < sizeof block / sizeof *block; i += 4) {
        uint32_t counter[4] = {i};
        ltn_philox(counter, 1, 2);
        memcpy(block + i, counter, sizeof counter);
    }
    LTN_TRY(be->ops->upload(be, memory, block, done, err));
    for (; done < bytes; done *= 2)
        LTN_TRY(be->ops->copy(be, memory + done, memory, done, err));
    return LTN_OK;
}

/* As much as is free up to 8 GB, so that the start of a pass is lost in it, and at least some hundred MB. */
static enum ltn_status take_memory(struct ltn_backend *be, void **memory, size_t *bytes,
                                   struct ltn_error *err)
{
    enum ltn_status status = LTN_ERR_MEMORY;
    for (*bytes = 16 * least_bytes; status == LTN_ERR_MEMORY && *bytes >= least_bytes; *bytes /= 2)
        status = be->ops->alloc(be, memory, 2 * *bytes, err);
    *bytes *= 2;
    return status;
}

static enum ltn_status measure_device(struct ltn_backend *be, struct ltn_bandwidth *out,
                                      struct ltn_error *err)
{
    size_t bytes; /* a power of two */
    double read = 0, copy = 0;
    void *memory = NULL;

    LTN_TRY(take_memory(be, &memory, &bytes, err));
    uint8_t *src = memory, *dst = src + bytes;
    enum ltn_status status = fill(be, src, bytes, err);
    if (status == LTN_OK)
        status = time_passes(be, dst, src, bytes, true, &copy, err);
    if (status == LTN_OK)
        status = time_passes(be, dst, src, bytes, false, &read, err);
    be->ops->free(be, memory);
    if (status == LTN_OK) {
        out->copy_gbps = 2e-9 * (double)bytes / copy;
        out->read_gbps = 1e-9 * (double)bytes / read;
    }
    return status;
}

enum ltn_status ltn_measure_bandwidth(struct ltn_bandwidth *out, struct ltn_backend *be, int n_threads,
                                      struct ltn_error *err)
{
    *out = (struct ltn_bandwidth){0};
    return be->host_memory ? measure_host(n_threads, out, err) : measure_device(be, out, err);
}
