/* What the CUDA backend should compute where it decodes: the operations of another backend, with bf16 in the
 * places where that one has it. With the same roundings two results differ by the order of f32 sums, and by
 * what follows where that carries one number over to the next bf16; without them every number between two
 * products differs by up to 2^-9, and a fault has to be larger than all of that to be seen. */
#ifndef LTN_TESTS_ROUNDING_H
#define LTN_TESTS_ROUNDING_H

#include "kernels/ops.h"

/* Which of them. o = q S, its gate, and the GLU's product are bf16 in all, and what is multiplied by q4 an
 * integer of 16 bits under the scale of its group. */
struct rounding {
    bool stream;  /* x is bf16 where it enters a product; what is added to it is not */
    bool gated;   /* gate * o, before it is divided by the rms of o */
    bool qkv;     /* q, k and v */
    bool normed;  /* Norm(x) and gate * Norm(o) */
    bool outputs; /* of a product, before a feature map or the other product of a GLU */
    bool integer; /* what is multiplied by q8, as for q4 */
    bool weights; /* quantised matrices are bf16, but where they are the embedding, and not what they meet */
};

/* For SimpleRMSNorm and a gate that is part of qkv; until rounding_set nothing but the above is rounded.
 * `plain` has host memory and f32 activations, and is closed with *out. */
enum ltn_status rounding_open(struct ltn_backend **out, struct ltn_backend *plain, struct ltn_error *err);

/* From now on. be: from rounding_open. */
void rounding_set(struct ltn_backend *be, const struct rounding *how);

#endif
