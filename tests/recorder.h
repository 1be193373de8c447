/* A CPU backend that records, for tests of what is built upon recording where there is no GPU. */
#ifndef LTN_TESTS_RECORDER_H
#define LTN_TESTS_RECORDER_H

#include "kernels/ops.h"

/* Makes be, a CPU backend, record and sample, or not record; its fused operations are left out either way, so
 * that both ways give the same bits. All that records share one recording in the making. */
void recorder_install(struct ltn_backend *be, bool records);
/* How many recordings were replayed so far. */
int recorder_replays(void);

#endif
