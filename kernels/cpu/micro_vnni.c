/* Inner loops for x86 with AVX-512 and its products of bytes (VNNI). */
#include "kernels/cpu/micro_avx512.c"
