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

#endif
