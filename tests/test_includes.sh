# Includes point one way: kernels <- model <- src; tokenizer <- src; tools see model, tokenizer and src's command
# line; tests see everything. The public header sees nothing but itself and kernels/status.h.
. tests/tap.sh

# allowed FOLDER PATTERN: every include "..." in the folder's files matches the pattern
allowed() {
    bad=$(grep -rnE '^ *# *include +"' "$1" --include='*.[ch]' --include='*.cc' --include='*.cu' --include='*.cuh' |
        grep -vE "#[ ]*include +\"($2)\"" || true)
    [ -z "$bad" ] || echo "$bad" | sed 's/^/# /' >&2
    [ -z "$bad" ]
}
pass "kernels include kernels" allowed kernels 'kernels/.*'
pass "model includes kernels and model" allowed model '(kernels|model)/.*'
pass "tokenizer includes itself and status.h" allowed tokenizer 'tokenizer/.*|kernels/status\.h'
pass "src includes kernels, model, tokenizer and src" allowed src '(kernels|model|tokenizer|src)/.*'
pass "tools include model, tokenizer, tools, status and the command line" allowed tools \
    '(model|tokenizer|tools)/.*|kernels/(status|dtype|quant|ops|cpu/pool)\.h|src/(cli|ltn)\.h'
pass "ltn.h includes status.h alone" allowed src/ltn.h 'kernels/status\.h'
pass "ops.h knows no model, file or flag" sh -c '! grep -nE "ltn_(model|config|checkpoint|session|engine|tokenizer)\b" kernels/*.h kernels/*/*.[ch] kernels/*/*.cu 2>/dev/null'

# what a pass needs is reserved before it, and counted: one function allocates, one more pins the staging buffers
pass "the CUDA backend allocates in backend.cu alone" sh -c '! grep -nE "cuda(Malloc|HostAlloc)" kernels/cuda/*.cu kernels/cuda/*.cuh | grep -vE "^kernels/cuda/backend.cu:"'
pass "and there in two places" sh -c '[ "$(grep -cE "cuda(Malloc|HostAlloc)[A-Za-z]*\(" kernels/cuda/backend.cu)" -eq 2 ]'

# the public header stands on its own, in C and in C++, as it is installed
mkdir -p "$tmp/ltn/kernels"
cp src/ltn.h "$tmp/ltn"
cp kernels/status.h "$tmp/ltn/kernels"
echo '#include <ltn.h>' >"$tmp/x.c"
cp "$tmp/x.c" "$tmp/x.cc"
pass "ltn.h compiles alone as C11" ${CC:-cc} -std=c11 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I"$tmp/ltn" "$tmp/x.c"
pass "ltn.h compiles alone as C++17" ${CXX:-c++} -std=c++17 -Wall -Wextra -Werror -fsyntax-only -I"$tmp/ltn" "$tmp/x.cc"
finish
