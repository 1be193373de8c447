#!/bin/sh
# Short tests of the CUDA backend under compute-sanitizer: sanitize.sh FOLDER-OF-TESTS [AT-ONCE]. LTN_BIN is where
# libltn_cuda.so lies. Every tool and test is named with its outcome; the exit code is 1 where one failed.
#
# Left out, as the tools cannot judge it (kernels/cuda/NOTES.md):
#   initcheck does not see what bulk stores write, and so calls cuBLASLt's outputs, those of the kernels of many rows, and
#   those of the attention on Hopper unwritten. test_decode runs without that library (an empty file in its place), on the
#   plain kernel, and not in Q4, where an ordinary kernel reads what that attention stored; test_prefill not at all. That
#   all outputs are written is what test_ops shows, where they are NaN before.
#   racecheck does not know that a bulk copy is awaited at an mbarrier, which the steps and the kernels of many rows do
#   throughout: it does not get test_decode and test_prefill.
folder=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/without"
for version in 12 13 14; do
    : >"$tmp/without/libcublasLt.so.$version"
done
export tmp folder

cat >"$tmp/one" <<'END'
tool=$1 log=$(mktemp "$tmp/log.XXXXXX")
shift
test="$*"
program=$folder/$1
shift
[ "$tool ${program##*/}" = "initcheck test_decode" ] && export LD_LIBRARY_PATH="$tmp/without:$LD_LIBRARY_PATH"
if timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 99 "$program" "$@" >"$log" 2>&1; then
    echo "ok $tool $test"
else
    echo "not ok $tool $test (exit code $?)"
    grep -m 5 "=========" "$log"
    exit 1
fi
END

for tool in memcheck initcheck synccheck racecheck; do
    for test in "test_ops 'few samples, BF16'" "test_ops 'sum, BF16'" "test_ops 'transfers, BF16'" "test_ops 'embed, BF16'" \
        "test_ops 'norms, BF16'" "test_decode 'short text, BF16'" "test_decode 'short text, Q4'" "test_prefill" \
        "test_conv 2 77" "attention small"; do
        case "$tool $test" in
        "racecheck test_decode"* | "racecheck test_prefill" | "initcheck test_prefill") continue ;;
        "initcheck test_decode 'short text, Q4'") continue ;;
        esac
        echo "$tool $test"
    done
done | xargs -P "${2:-1}" -L 1 sh "$tmp/one" || exit 1
