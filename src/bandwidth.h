/* How fast this very device moves memory: what the speed of decoding is held against. */
#ifndef LTN_BANDWIDTH_H
#define LTN_BANDWIDTH_H

#include "kernels/ops.h"

struct ltn_bandwidth {
    double read_gbps; /* 1e9 bytes read a second */
    double copy_gbps; /* 1e9 bytes a second, read and written bytes both counted */
};

/* Takes a few tenths of a second and memory past the caches: some hundred MB, of a device up to 8 GB. Host
 * memory is read and copied by n_threads threads, a device's memory by its backend. */
enum ltn_status ltn_measure_bandwidth(struct ltn_bandwidth *out, struct ltn_backend *be, int n_threads,
                                      struct ltn_error *err);

#endif
