# ltn-bench through a real shell.
. tests/tap.sh
on_cpu ltn-bench
bench=$tmp/ltn-bench
"$LTN_TESTS/make_model" tokens "$tmp/ids.ltn" 1 2 || exit 1
m=$tmp/ids.ltn
unset LTN_MODEL

try "$bench" -m "$m" -l 16,64 -r 3 -n 8
pass "a table" exited 0
pass "a line for each test and length" is "$(grep -cE '^(prefill|decode) +(16|64) +[0-9]' "$tmp/out")" 4
pass "nothing on stderr" test ! -s "$tmp/err"
try "$bench" -m "$m" -l 16,64 -r 2 -n 8 --format csv
pass "CSV: header" is "$(head -n 1 "$tmp/out")" test,length,tokens,tok_s,median,stddev,min,max,gbps,share
pass "CSV: ten columns, five lines" is "$(awk -F, 'NF == 10' "$tmp/out" | wc -l)" 5
pass "CSV: least, median and most in order" awk -F, 'NR > 1 && !($7 > 0 && $7 <= $5 && $5 <= $8) { exit 1 }' "$tmp/out"
LTN_COMMIT=abc123 "$bench" -m "$m" -l 16 -r 3 -n 8 -t 1 --format json >"$tmp/out" 2>"$tmp/err"
for key in device driver date command read_gbps copy_gbps gemm_tflops rows samples tok_s; do
    pass "JSON: $key" grep -q "\"$key\":" "$tmp/out"
done
pass "JSON: the commit" grep -qE '"commit":[[:space:]]*"abc123"' "$tmp/out"
pass "JSON: the threads" grep -qE '"threads":[[:space:]]*1,' "$tmp/out"
pass "JSON: all samples" is "$(grep '"samples"' "$tmp/out" | tail -n 1 | tr -cd , | wc -c)" 2

pass "JSON: the command" grep -qF '"ltn-bench model --device cpu -m' "$tmp/out"

try "$bench" --random --shape 385m --dtype q4 --device cpu -r 1 --batch 1,2 --position 0,1000000 --seconds 0.01
pass "decode: a row for each batch and position" is "$(grep -cE '^385m +q4 +[12] +(0|1000000) +[0-9]' "$tmp/out")" 4
pass "decode: nothing on stderr" test ! -s "$tmp/err"
try "$LTN_BIN/ltn-bench" decode --device cpu --shape 385m --dtype q4 -r 2 --seconds 0.01 --format json
for key in device date read_gbps rows model dtype batch position tok_s gbps share state_bytes samples; do
    pass "decode, JSON: $key" grep -q "\"$key\":" "$tmp/out"
done
try "$LTN_BIN/ltn-bench" decode --device cpu --shape 3b
pass "decode: no such shape" exited 2
try "$LTN_BIN/ltn-bench" model --device cpu -m "$m" -l 16 -r 1 -n 2 --format csv
pass "the command by its name" exited 0
pass "the command by its name: the same rows" is "$(wc -l <"$tmp/out")" 3
try "$LTN_BIN/ltn-bench" frob
pass "no such command" refused 2 "frob: no such command, expected one of model|decode|attention|prefill|conv"

attention="$LTN_BIN/ltn-bench attention --device cpu --head-dim 24 -l 30,70 -r 2 --check 100"
try $attention --heads 1,3
pass "attention: a table" exited 0
pass "attention: a line for each length" is "$(grep -cE '^ +[13] +(30|70) +last +[0-9]' "$tmp/out")" 4
pass "attention: errors of both layers, below 1e-5" awk '/^ +[13] +100 +(first|last)/ && $8 + 0 > 0 && $8 + 0 < 1e-5 && $9 + 0 > 0 && $9 + 0 < 1e-5 { n++ } END { exit n != 4 }' "$tmp/out"
try $attention --lrpe --layer first --format json
pass "attention: JSON" exited 0
for key in device date command copy_gbps rows impl h d n dtype layer ms share rel_l2 samples_ms; do
    pass "attention: JSON: $key" grep -q "\"$key\":" "$tmp/out"
done
pass "attention: LRPE's errors too" awk '/"rel_l2":/ && $2 + 0 > 0 && $2 + 0 < 1e-5 { n++ } END { exit n != 2 }' "$tmp/out"
try "$LTN_BIN/ltn-bench" attention --heads 0
pass "attention: usage" refused 2 "--heads: expected up to 64 whole numbers from 1 to 1024 with commas between, found '0'"

try "$LTN_BIN/ltn-bench" prefill --device cpu -l 2,3 --chunk 2 --loop 2 --seconds 0 --format json
pass "prefill: JSON" exited 0
for key in device date command gemm_tflops rows impl model dtype n tok_s share extra_bytes samples; do
    pass "prefill: JSON: $key" grep -q "\"$key\":" "$tmp/out"
done
pass "prefill: a share of the products' speed" awk '/"share":/ && $2 + 0 > 0.05 && $2 + 0 < 5 { n++ } END { exit n != 2 }' "$tmp/out"
pass "prefill: the longer text beside short ones" test "$(grep -c '"loop_tok_s":' "$tmp/out")" = 1
try "$LTN_BIN/ltn-bench" prefill --shape 13b
pass "prefill: no such shape" refused 2 "--shape: expected one of 385m|1b|7b, found '13b'"

conv="$LTN_BIN/ltn-bench conv --device cpu -l 6,12 -n 1 -r 2"
try $conv
pass "conv: a table" exited 0
pass "conv: a line for each layer and layout, with errors below 1e-6" awk '/ im2win / && $11 + 0 > 0 && $11 + 0 < 1e-6 && $8 > 0 { n++ } END { exit n != 4 }' "$tmp/out"
try $conv --format json
for key in device date command images rows layer impl variant dtype layout transform_us kernel_us total_us tflops workspace_bytes rel_l2 samples; do
    pass "conv: JSON: $key" grep -q "\"$key\":" "$tmp/out"
done
try $conv --format csv --impl im2win
pass "conv: CSV" is "$(wc -l <"$tmp/out")" 5
try "$LTN_BIN/ltn-bench" conv --impl im2win --impl gemm
pass "conv: no such implementation" refused 2 "--impl: expected im2win, im2win-fused, im2col-cublas, direct or cudnn, found 'gemm'"
try "$LTN_BIN/ltn-bench" conv -l 13
pass "conv: no such layer" refused 2 "found '13'"

refuses_usage() {
    text=$1
    shift
    try "$bench" -m "$m" "$@"
    pass "usage: $*" refused 2 "$text"
}
refuses_usage "-l: expected up to 64 whole numbers from 1 to 1000000000 with commas between, found '0'" -l 0
refuses_usage "-l: expected up to 64 whole numbers from 1 to 1000000000 with commas between, found '5,'" -l 5,
refuses_usage "-l: expected up to 64 whole numbers from 1 to 1000000000 with commas between, found 'x'" -l x
refuses_usage "-r: expected a whole number from 1 to 1000000, found '0'" -r 0
refuses_usage "--format: expected one of table|csv|json, found 'xml'" --format xml
refuses_usage "--format: expected one of table|csv|json, found ''" --format ""
try "$bench" -m "$tmp/none.ltn"
pass "a missing model" refused 1 "none.ltn"
"$bench" -m "$m" -l 16 -r 1 -n 2 >/dev/full 2>"$tmp/err"
status=$?
: >"$tmp/out"
pass "stdout without room" refused 1 "standard output: cannot write"
"$bench" -m "$m" -l 100000 -r 1000 >"$tmp/out" 2>"$tmp/err" &
pid=$!
ready $pid
kill -INT $pid
wait $pid
status=$?
pass "Ctrl-C: 130" exited 130
finish
