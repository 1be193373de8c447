#!/bin/sh
# Short tests of the CUDA backend under compute-sanitizer: sanitize.sh FOLDER-OF-TESTS. LTN_BIN is where
# libltn_cuda.so lies. Every tool and test that fails is named; the exit code is their number. racecheck does not end in
# sampling, and does not know the barriers that the bulk copies of a whole step are awaited at (kernels/cuda/NOTES.md).
failed=0
for tool in memcheck initcheck synccheck racecheck; do
    for test in "test_ops 'sample, BF16'" "test_ops 'sum, BF16'" "test_ops 'transfers, BF16'" \
        "test_ops 'embed, BF16'" "test_ops 'norms, BF16'" "test_decode 'split invariance, BF16'" \
        "test_conv 2 77" "attention small"; do
        case "$tool $test" in
        "racecheck test_decode"* | "racecheck test_ops 'sample"*) continue ;;
        esac
        if eval "timeout 120 compute-sanitizer --tool $tool --error-exitcode 99 $1/$test" >/tmp/sanitize.$$ 2>&1; then
            echo "ok $tool $test"
        else
            failed=$((failed + 1))
            echo "not ok $tool $test"
            grep -m 5 "=========" /tmp/sanitize.$$
        fi
    done
done
rm -f /tmp/sanitize.$$
exit $failed
