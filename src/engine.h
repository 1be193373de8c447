/* What an engine is made of, for the library's own files. */
#ifndef LTN_ENGINE_H
#define LTN_ENGINE_H

#include "model/decoder.h"
#include "src/ltn.h"
#include "tokenizer/tokenizer.h"

struct ltn_engine {
    struct ltn_checkpoint checkpoint;
    struct ltn_backend *be;
    struct ltn_model model;
    struct ltn_tokenizer *tokenizer; /* NULL: none in the file */
    struct ltn_engine_info info;
    char notice[512]; /* what info.notice points to, when there is one */
};

/* Opens the backend for matrices of a dtype. device: as ltn_engine_options.device has it; n_threads: of the
 * CPU, 0 one per core. *notice (may be NULL): set to one line where auto passes over a CUDA that is there but
 * does not work, else empty. */
enum ltn_status ltn_backend_open(struct ltn_backend **out, const char *device, enum ltn_dtype dtype,
                                 int n_threads, char (*notice)[512], struct ltn_error *err);

#endif
