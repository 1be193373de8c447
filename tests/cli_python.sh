# The Python binding: that it declares what ltn.h declares, and what it does.
. tests/tap.sh
unset LTN_MODEL
if ! command -v python3 >/dev/null 2>&1; then
    skip "the Python binding" "no python3 here"
    finish
    exit
fi
export PYTHONDONTWRITEBYTECODE=1 LTN_LIB="$LTN_BIN/libltn.so"
python() { python3 "$@"; }
case $LTN_BIN in
*asan*) # the interpreter is not built with the sanitizers, and leaves memory behind
    python() {
        ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(${CC:-cc} -print-file-name=libasan.so) $(${CC:-cc} -print-file-name=libubsan.so)" \
            PYTHONMALLOC=malloc python3 "$@"
    }
    ;;
esac

# ---- struct layouts, enumerators, arguments ----
# layout FOLDER: does the binding declare what the header there does?
layout() {
    python tests/binding_layout.py "$1/ltn.h" "$1/kernels/status.h" >"$tmp/layout.c" 2>"$tmp/err" || return 1
    ${CC:-cc} -std=c11 -I"$1" -Wall -Wextra -Wconversion -Wsign-conversion -Werror -fsyntax-only "$tmp/layout.c" 2>>"$tmp/err"
}
mkdir -p "$tmp/h/kernels"
cp src/ltn.h "$tmp/h"
cp kernels/status.h "$tmp/h/kernels"
pass "the binding declares what ltn.h declares" layout "$tmp/h"
# drifts NAME SED-SCRIPT: a header changed like this is noticed
drifts() {
    sed -e "$2" src/ltn.h >"$tmp/h/ltn.h"
    pass "noticed: $1" sh -c '! cmp -s src/ltn.h "$1/h/ltn.h"' sh "$tmp"
    tap_was=0
    layout "$tmp/h" && tap_was=1
    pass "refused: $1" is $tap_was 0
}
drifts "a new field" 's/^ *double temperature;.*/&\n double warmth;/'
drifts "a new field where there was padding" 's/^ *bool ignore_eos;.*/&\n bool ignore_more;/'
drifts "a field gone" '/^ *int32_t chunk_rows; .*prefill step/d'
drifts "another type" 's/double min_p;/int64_t min_p;/'
drifts "another order" 's/int32_t bos_id, eos_id;/int32_t eos_id, bos_id;/'
drifts "another argument" 's/ltn_session_seed(struct ltn_session \*session, uint64_t seed)/ltn_session_seed(struct ltn_session *session, uint64_t seed, int more)/'
drifts "a narrower argument" 's/ltn_session_seed(struct ltn_session \*session, uint64_t seed)/ltn_session_seed(struct ltn_session *session, int32_t seed)/'
drifts "another callback" 's/(void \*ctx, int32_t id, const char \*text, size_t bytes,/(void *ctx, int32_t id, const char *text,/'
drifts "another result" 's/^int64_t ltn_session_position/const char *ltn_session_position/'
drifts "a new enumerator" 's/^ *LTN_END_EOS,.*/ LTN_END_NEW,\n&/'
drifts "another number" 's/LTN_MAX_REPEAT_LAST = 1024/LTN_MAX_REPEAT_LAST = 1025/'
drifts "another number of a macro" 's/uint64_t)1 << 48/uint64_t)1 << 47/'
drifts "a new function" 's/^int64_t ltn_session_position.*/&\nint64_t ltn_session_age(const struct ltn_session *session);/'

# ---- what it does ----
"$LTN_TESTS/make_model" text "$tmp/text.ltn" 1 -1 && "$LTN_TESTS/make_model" tokens "$tmp/ids.ltn" 1 2 || exit 1
try python tests/binding.py "$tmp/text.ltn" "$tmp/ids.ltn" "$LTN_BIN/ltn-run" "$tmp"
pass "the tests of the binding ran" exited 0
cp "$tmp/out" "$tmp/verdicts"
: >"$tmp/out"
while read -r verdict name; do
    pass "$name" is "$verdict" pass
done <"$tmp/verdicts"

# ---- how the library is found ----
version='import ltn; print(ltn.version())'
mkdir -p "$tmp/beside" "$tmp/lib/ltn"
cp bindings/ltn.py "$LTN_BIN/libltn.so" "$tmp/beside"
cp bindings/ltn.py "$tmp/lib/ltn"
cp "$LTN_BIN/libltn.so" "$tmp/lib"
PYTHONPATH=$tmp/beside LTN_LIB= try python -c "$version"
pass "the library beside the binding" exited 0
PYTHONPATH=$tmp/lib/ltn LTN_LIB= try python -c "$version"
pass "one folder up, as it is installed" exited 0
mkdir "$tmp/system"
cp "$LTN_BIN/libltn.so" "$tmp/system/libltn.so.0"
rm "$tmp/lib/libltn.so"
PYTHONPATH=$tmp/lib/ltn LTN_LIB= LD_LIBRARY_PATH=$tmp/system try python -c "$version"
pass "where the system looks" exited 0
PYTHONPATH=$tmp/beside LTN_LIB=$tmp/none.so try python -c "$version"
pass "\$LTN_LIB goes before, and is named when it is not there" sh -c '[ "$1" != 0 ] && grep -q "none.so" "$2"' sh "$status" "$tmp/err"
finish
