# make install and uninstall; the example against libltn.a and against what was installed; what libltn.so gives out.
. tests/tap.sh
unset LTN_MODEL LTN_LIB MAKEFLAGS MFLAGS MAKELEVEL
export CUDA_VISIBLE_DEVICES= # the CPU, whatever else this machine has
model=$tmp/text.ltn
prefix=$tmp/usr
"$LTN_TESTS/make_model" text "$model" 1 -1 || exit 1

variant=release flags=
case $LTN_BIN in *asan*) variant=asan flags=-fsanitize=address,undefined ;; esac
make_it() { # make_it TARGET VARIABLE=VALUE...: with what is built, and no more
    [ -f "$LTN_BIN/libltn_cuda.so" ] || set -- "$@" NVCC=
    try make -s --no-print-directory VARIANT=$variant "$@"
}
cc="${CC:-cc} -std=c11 -Wall -Wextra -Werror $flags"

# ---- the library's names ----
# (declarations of functions and variables; comments do not count)
cat src/ltn.h kernels/status.h | ${CC:-cc} -fpreprocessed -dD -E -P -xc - | grep -v '^ *typedef' |
    grep -oE '\bltn_[a-z_]+\(|^extern .*;' | sed 's/.* //; s/[(;]//' | sort -u >"$tmp/declared"
nm -D --defined-only "$LTN_BIN/libltn.so" | sed 's/.* //' | sort -u >"$tmp/exported"
pass "ltn.h declares functions" grep -qx ltn_generate "$tmp/declared"
pass "libltn.so gives out what ltn.h declares and nothing else" sh -c 'diff "$1/declared" "$1/exported" >"$1/out"' sh "$tmp"

# ---- install ----
mkdir -p "$prefix/lib"
echo other >"$prefix/lib/other"
make_it install "PREFIX=$prefix"
pass "make install" exited 0
for file in bin/ltn-run bin/ltn-score bin/ltn-bench bin/ltn-info bin/ltn-convert lib/libltn.a lib/libltn.so lib/libltn.so.0 \
    lib/ltn/ltn.py lib/pkgconfig/ltn.pc include/ltn/ltn.h include/ltn/kernels/status.h share/ltn/demo.ltn \
    share/man/man1/ltn-run.1 share/man/man1/ltn-convert.1 share/bash-completion/completions/ltn-run \
    share/bash-completion/completions/ltn-convert; do
    pass "installs $file" test -s "$prefix/$file"
done
pass "with a page and a completion for each program" sh -c 'for p in $(ls "$1/bin"); do
    [ -s "$1/share/man/man1/$p.1" ] && [ -s "$1/share/bash-completion/completions/$p" ] || exit 1; done' sh "$prefix"
try sh -c 'cd / && "$1/bin/ltn-run" -q -p "Once upon a time" -n 3 --seed 1' sh "$prefix"
pass "the installed program finds the installed model" sh -c '[ "$1" = 0 ] && [ -s "$2" ]' sh "$status" "$tmp/out"

# ---- the example ----
"$LTN_BIN/ltn-run" -q --device cpu -m "$model" -p "Once upon a time" -n 200 --seed 0 >"$tmp/expected"
private=$(sed -n 's/^Libs.private: //p' "$prefix/lib/pkgconfig/ltn.pc")
# shellcheck disable=SC2086
try $cc -Isrc -I. examples/story.c -o "$tmp/story" "${LTN_TESTS%/tests}/libltn.a" $private
pass "the example compiles against libltn.a" exited 0
try "$tmp/story" "$model" "Once upon a time"
pass "and tells what ltn-run tells" sh -c '[ "$1" = 0 ] && cmp -s "$2/out" "$2/expected"' sh "$status" "$tmp"
try "$tmp/story"
pass "without a model it says what is missing" refused 1 "story: expected a model"
try "$tmp/story" "$tmp/none.ltn" a
pass "so it does with one that is not there" refused 1 "story: $tmp/none.ltn"
"$tmp/story" "$model" a 2>"$tmp/err" >/dev/full
status=$?
: >"$tmp/out"
pass "and on a full disk" refused 1 "story: standard output: cannot write"
if command -v pkg-config >/dev/null 2>&1; then
    # shellcheck disable=SC2046,SC2086
    try $cc examples/story.c -o "$tmp/installed" \
        $(PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config --cflags --libs ltn)
    pass "it compiles against what was installed" exited 0
    try env "LD_LIBRARY_PATH=$prefix/lib" "$tmp/installed" "$model" "Once upon a time"
    pass "and tells the same" sh -c '[ "$1" = 0 ] && cmp -s "$2/out" "$2/expected"' sh "$status" "$tmp"
    mkdir "$tmp/lib"
    cp "$prefix/lib/libltn.so.0" "$tmp/lib"
    echo "not a library" >"$tmp/lib/libltn_cuda.so"
    cat >"$tmp/notice.c" <<'END'
#include <ltn.h>
#include <stdio.h>
int main(int argc, char **argv)
{
    struct ltn_engine *engine;
    if (argc != 2 || ltn_engine_open(&engine, argv[1], NULL, NULL) != LTN_OK)
        return 1;
    puts(ltn_engine_info(engine)->notice);
    ltn_engine_close(engine);
    return 0;
}
END
    # shellcheck disable=SC2046,SC2086
    $cc "$tmp/notice.c" -o "$tmp/notice" $(PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config --cflags --libs ltn)
    try env "LD_LIBRARY_PATH=$tmp/lib" "$tmp/notice" "$model"
    pass "the library looks for the CUDA backend beside itself" grep -q "^using the CPU: CUDA: $tmp/lib/libltn_cuda.so" "$tmp/out"
else
    skip "the example by pkg-config" "no pkg-config here"
fi

# ---- a staged install, uninstall ----
make_it install "DESTDIR=$tmp/stage" PREFIX=/opt/ltn
pass "make install with DESTDIR" exited 0
(cd "$prefix" && find . ! -type d ! -name other | sort) >"$tmp/files"
(cd "$tmp/stage/opt/ltn" && find . ! -type d | sort) >"$tmp/staged"
pass "puts the same files there" same "$tmp/files" "$tmp/staged"
pass "and nothing elsewhere" is "$(find "$tmp/stage" ! -type d | grep -cv "^$tmp/stage/opt/ltn/")" 0
pass "ltn.pc speaks of PREFIX" grep -qx prefix=/opt/ltn "$tmp/stage/opt/ltn/lib/pkgconfig/ltn.pc"
pass "and never of DESTDIR" sh -c '! grep -q "$1" "$1/stage/opt/ltn/lib/pkgconfig/ltn.pc"' sh "$tmp"
make_it uninstall "DESTDIR=$tmp/stage" PREFIX=/opt/ltn
pass "make uninstall with DESTDIR" exited 0
pass "leaves nothing of the staged install" is "$(find "$tmp/stage/opt/ltn" ! -type d -o -name '*ltn*' ! -path "$tmp/stage/opt/ltn")" ""
make_it uninstall "PREFIX=$prefix"
pass "make uninstall leaves nothing but what was not its own" is "$(find "$prefix" ! -type d -o -name '*ltn*')" "$prefix/lib/other"
make_it install PREFIX=/dev/null/here
pass "an install that cannot be made fails" sh -c '[ "$1" != 0 ]' sh "$status"
finish
