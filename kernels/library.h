/* Finding what CUDA needs: the device's number in a name, and the shared objects that hold its code. */
#ifndef LTN_LIBRARY_H
#define LTN_LIBRARY_H

#include "kernels/status.h"

#include <stdbool.h>

/* "cuda" is device 0, "cuda:N" device N below 1024; false: another name. */
bool ltn_cuda_device(const char *text, int *device);

/* Opens a shared object of ours by its file name: from the folder of the running executable, from ../lib or
 * ../lib/ltn seen from there, else from where the loader looks. It stays loaded for as long as the process
 * lives, as CUDA does not unload cleanly. NULL: err says why; *present, whether there is such a library,
 * which then did not open. */
void *ltn_library_open(const char *name, bool *present, struct ltn_error *err);

#endif
