# ltn-run -j: many prompts at once through a real shell.
. tests/tap.sh
on_cpu ltn-run
run=$tmp/ltn-run
"$LTN_TESTS/make_model" text "$tmp/text.ltn" 1 -1 || exit 1
"$LTN_TESTS/make_model" tokens "$tmp/ids.ltn" 1 2 || exit 1
"$LTN_TESTS/make_model" text "$tmp/nobos.ltn" -1 -1 || exit 1
m=$tmp/text.ltn
unset LTN_MODEL

# prompts of all kinds; the long one is longer than what is read at once
{
    printf 'the house\n\n\tand "then" \\ \303\251t\303\251 \360\237\230\200\r\n'
    printf 'not UTF-8: \377\300\200 \342\202 and \001\177\n'
    yes "the other thing and" | head -n 2000 | tr '\n' ' '
    printf '\nthe house\n'
    i=0
    while [ $i -lt 30 ]; do
        i=$((i + 1))
        echo "number $i and the ing"
    done
    printf 'the last'
} >"$tmp/prompts"
n=$(($(wc -l <"$tmp/prompts") + 1))

# ---- the texts do not depend on how many at once ----
try "$run" -m "$m" -j 1 --null -n 30 --seed 1 <"$tmp/prompts"
pass "--null takes all for one prompt here" is "$(tr -cd '\0' <"$tmp/out" | wc -c)" 1
try "$run" -m "$m" -j 1 --json -n 30 --seed 1 --stop th -f "$tmp/prompts"
cp "$tmp/out" "$tmp/json"
pass "-j 1" exited 0
pass "nothing on stderr with a seed given" test ! -s "$tmp/err"
pass "a line for each prompt" is "$(wc -l <"$tmp/json")" "$n"
pass "numbered in order" sh -c 'seq 0 $(($2 - 1)) | sed "s/.*/{\"index\": &,/" >"$1.a"; cut -d " " -f 1,2 "$1" | cmp -s - "$1.a"' sh "$tmp/json" "$n"
pass "some end at the stop string, some at their length" sh -c 'grep -q "\"end\": \"string\"}$" "$1" && grep -q "\"tokens\": 30, \"logprob\": -[0-9.]*, \"end\": \"length\"}$" "$1"' sh "$tmp/json"
try "$run" -m "$m" -j 1 -n 30 --seed 1 --stop th -f "$tmp/prompts"
cp "$tmp/out" "$tmp/plain"
for j in 4 16 64; do
    for t in 1 3; do
        try "$run" -m "$m" -j $j -t $t --json -n 30 --seed 1 --stop th -f "$tmp/prompts"
        pass "-j $j -t $t --json: the same bytes" same "$tmp/out" "$tmp/json"
        "$run" -m "$m" -j $j -t $t -n 30 --seed 1 --stop th <"$tmp/prompts" >"$tmp/out" 2>"$tmp/err"
        pass "-j $j -t $t: the same bytes" same "$tmp/out" "$tmp/plain"
    done
done
(head -c 50 "$tmp/prompts"; sleep 0.3; tail -c +51 "$tmp/prompts") | "$run" -m "$m" -j 4 -n 30 --seed 1 --stop th >"$tmp/out"
pass "the same from a slow pipe" same "$tmp/out" "$tmp/plain"
sed 5d "$tmp/prompts" | sed 's/number/letter/' | sed '5iother' | "$run" -m "$m" -j 4 --json -n 30 --seed 1 --stop th >"$tmp/out"
pass "other neighbours, the same text" is "$(sed -n '6p;$p' "$tmp/out")" "$(sed -n '6p;$p' "$tmp/json")"
pass "the same prompt twice, two texts" sh -c '[ "$(sed -n "1s/.*text//p" "$1")" != "$(sed -n "6s/.*text//p" "$1")" ]' sh "$tmp/json"
try "$run" -m "$m" -j 4 --json -n 30 --seed 2 --stop th -f "$tmp/prompts"
pass "another seed, other texts" sh -c '! cmp -s "$1" "$2"' sh "$tmp/out" "$tmp/json"

# ---- JSON in and out: what was printed is read again, strictly, as prompts ----
# (but for NUL, which no prompt may hold)
sed 's/\\u0000//g' "$tmp/json" | "$run" -m "$m" -j 4 --json --json-prompts -n 30 --seed 1 --stop th >"$tmp/out" 2>"$tmp/err"
pass "--json-prompts reads what --json printed" same "$tmp/out" "$tmp/json"
printf '{"prompt": "a\\nb", "more": [1.5, {"x": null}]}\n{"prompt": "c"}\n' | "$run" -m "$m" -j 2 --json --json-prompts -n 2 --temp 0 >"$tmp/out"
pass "a prompt of two lines, other keys are let be" grep -q '^{"index": 0, "prompt": "a\\nb", "text": ".*", "tokens": 2, "logprob": -[0-9.]*, "end": "length"}$' "$tmp/out"
printf '{"prompt": "the"}\n{"prompt": "and"}\n{"prompt": 5}\n{"prompt": "no"}\n' | "$run" -m "$m" -j 4 --json-prompts -n 4 --seed 1 >"$tmp/out" 2>"$tmp/err"
status=$?
pass "a bad line fails the run" exited 1
pass "and is named" one_line "standard input, line 3: JSON: "
printf 'the\nand\n' | "$run" -m "$m" -j 1 -n 4 --seed 1 >"$tmp/expected"
pass "the texts before it are there" same "$tmp/out" "$tmp/expected"
for line in 'no JSON' '' '{}' '[]' '{"prompt": "a"} x' '{"prompt": "a\u0000"}' '{"prompt": "a", "prompt": "b"}'; do
    printf '%s\n' "$line" | "$run" -m "$m" -j 2 --json-prompts -n 4 --seed 1 >"$tmp/out" 2>"$tmp/err"
    status=$?
    pass "refused: '$line'" refused 1 "standard input, line 1: JSON"
done

# ---- each as by itself ----
printf 'the house\n\nand so\n' >"$tmp/few"
"$run" -m "$m" -j 2 -n 12 --temp 0 -0 <"$tmp/few" >"$tmp/out" 2>"$tmp/err"
{ "$run" -m "$m" -n 12 --temp 0 -f "$tmp/few"; printf '\0'; } >"$tmp/expected"
pass "-0: newlines belong to the prompt" same "$tmp/out" "$tmp/expected"
for p in "the house" "" "and so"; do
    "$run" -m "$m" -n 12 --temp 0 -p "$p"
    printf '\0'
done >"$tmp/expected"
tr '\n' '\0' <"$tmp/few" | "$run" -m "$m" -j 2 -n 12 --temp 0 -0 >"$tmp/out"
pass "each text is that of its prompt alone" same "$tmp/out" "$tmp/expected"
tr '\0' '\n' <"$tmp/expected" >"$tmp/lines"
"$run" -m "$m" -j 3 -n 12 --temp 0 <"$tmp/few" >"$tmp/out"
pass "without -0 a newline after each" same "$tmp/out" "$tmp/lines"
printf 'the house' >"$tmp/a.txt"
: >"$tmp/b.txt"
printf 'and so' >"$tmp/c.txt"
for j in 1 2 5; do
    try "$run" -m "$m" -j $j -n 12 --temp 0 "$tmp/a.txt" "$tmp/b.txt" "$tmp/c.txt"
    pass "-j $j: files are prompts, an empty one, too" same "$tmp/out" "$tmp/lines"
done
try "$run" -m "$m" -j 2 -n 12 --temp 0 --json "$tmp/a.txt" "$tmp/c.txt"
pass "JSON names the file" sh -c 'grep -qF "{\"index\": 1, \"file\": \"$1\", \"text\"" "$2"' sh "$tmp/c.txt" "$tmp/out"
try "$run" -m "$m" -j 2 -n 12 --temp 0 "$tmp/a.txt" "$tmp/none.txt" "$tmp/c.txt"
"$run" -m "$m" -j 2 -n 12 --temp 0 "$tmp/a.txt" >"$tmp/expected"
pass "a missing file fails the run" exited 1
pass "and is named" one_line "none.txt: cannot open: No such file"
pass "the text before it is there" same "$tmp/out" "$tmp/expected"
"$run" -m "$m" -j 2 -n 12 --temp 0 --echo <"$tmp/few" >"$tmp/out"
{
    for p in "the house" "" "and so"; do
        "$run" -m "$m" -n 12 --temp 0 -p "$p" --echo
        echo
    done
} >"$tmp/expected"
pass "--echo puts each prompt before its text" same "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -p "once and for all" -n 5 --seed 3 -q --save "$tmp/session"
{
    for p in "the house" "" "and so"; do
        "$run" -m "$m" -n 12 --temp 0 -q --load "$tmp/session" -p "$p"
        echo
    done
} >"$tmp/expected"
"$run" -m "$m" -j 2 -n 12 --temp 0 -q --load "$tmp/session" <"$tmp/few" >"$tmp/out" 2>"$tmp/err"
pass "--load: each goes on from the saved session" same "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -j 3 -n 12 -f /dev/null --seed 1
pass "no prompts, no texts" sh -c '[ "$1" = 0 ] && [ ! -s "$2" ]' sh "$status" "$tmp/out"
printf '5 17\n9\n' | "$run" -m "$tmp/ids.ltn" -j 2 --tokens - -n 6 --temp 0 --ignore-eos >"$tmp/out"
{ "$run" -m "$tmp/ids.ltn" --tokens 5,17 -n 6 --temp 0 --ignore-eos; "$run" -m "$tmp/ids.ltn" --tokens 9 -n 6 --temp 0 --ignore-eos; } >"$tmp/expected"
pass "--tokens -: lines of ids" same "$tmp/out" "$tmp/expected"
printf '5 17\n9\n' | "$run" -m "$tmp/ids.ltn" -j 2 --tokens - -n 3 --temp 0 --ignore-eos --json >"$tmp/out"
pass "--json: a list of ids" grep -qE '^\{"index": 1, "prompt": "9", "ids": \[[0-9]+, [0-9]+, [0-9]+\], "tokens": 3, "logprob": -[0-9.]+, "end": "length"\}$' "$tmp/out"
eos=$(sed -n '1s/ .*//p' "$tmp/expected")
"$LTN_TESTS/make_model" tokens "$tmp/eos.ltn" 1 "$eos"
printf '5 17\n' | "$run" -m "$tmp/eos.ltn" -j 2 --tokens - -n 3 --temp 0 --json >"$tmp/out"
pass "the end token ends a text" grep -qF '"ids": [], "tokens": 0, "logprob": 0, "end": "eos"}' "$tmp/out"
printf '5\n4 x\n7\n' | "$run" -m "$tmp/ids.ltn" -j 2 --tokens - -n 3 --temp 0 >"$tmp/out" 2>"$tmp/err"
status=$?
pass "a bad id is named by its line" one_line "standard input, line 2: token 1: expected an id, found 'x'"
pass "after the text before it" sh -c '[ "$1" = 1 ] && [ "$(wc -l <"$2")" -eq 1 ]' sh "$status" "$tmp/out"
printf 'a\n\n' | "$run" -m "$tmp/nobos.ltn" -j 2 -n 3 --temp 0 >"$tmp/out" 2>"$tmp/err"
pass "an empty prompt without BOS is named by its line" one_line "standard input, line 2: empty prompt: the model has no BOS"
try "$run" -m "$m" -j 4 -n 10 --seed 1 --stats -f "$tmp/few"
pass "--stats is one line on stderr" one_line "3 prompts, "

# ---- ends ----
: >"$tmp/out" # what an earlier run left there must not pass for this one's
mkfifo "$tmp/fifo"
"$run" -m "$m" -j 2 -n 5 --seed 1 --json <"$tmp/fifo" >"$tmp/out" 2>"$tmp/err" &
pid=$!
exec 3>"$tmp/fifo"
printf 'the\nand\nthen\nnot the end of a li' >&3
i=0
while [ "$(wc -l <"$tmp/out")" -lt 3 ] && [ $i -lt 200 ]; do
    sleep 0.05
    i=$((i + 1))
done
printf 'the\nand\nthen\n' | "$run" -m "$m" -j 1 -n 5 --seed 1 --json >"$tmp/expected"
pass "texts come while more input may" same "$tmp/out" "$tmp/expected"
kill -INT $pid
wait $pid
status=$?
exec 3>&-
pass "Ctrl-C while waiting for input: 130" exited 130
pass "quietly" test ! -s "$tmp/err"
pass "with the texts that are done" same "$tmp/out" "$tmp/expected"
: >"$tmp/out"
printf 'the\nand\n' | "$run" -m "$m" -j 2 -n -1 --ignore-eos >"$tmp/out" 2>"$tmp/err" &
pid=$!
while [ ! -s "$tmp/out" ]; do sleep 0.05; done
kill -INT $pid
wait $pid
status=$?
pass "Ctrl-C while writing: 130" exited 130
printf 'the\nand\n' >"$tmp/two"
"$run" -m "$m" -j 2 -n -1 --ignore-eos --json -q -f "$tmp/two" >"$tmp/out" 2>"$tmp/err" &
pid=$!
ready $pid
sleep 0.5
kill -INT $pid
wait $pid
status=$?
pass "Ctrl-C with --json: 130" exited 130
pass "each text as far as it was" is "$(grep -c '"end": "stopped"}$' "$tmp/out")" 2
{
    "$run" -m "$m" -j 2 -n -1 --ignore-eos --seed 1 -f "$tmp/two" 2>"$tmp/err"
    echo $? >"$tmp/status"
} | head -c 10 >"$tmp/out"
status=$(cat "$tmp/status")
pass "a reader that leaves ends it, quietly" sh -c '[ "$1" = 0 ] && [ ! -s "$2" ]' sh "$status" "$tmp/err"
"$run" -m "$m" -j 2 -n 5 --seed 1 -f "$tmp/two" 2>"$tmp/err" >/dev/full
status=$?
: >"$tmp/out"
pass "a full disk is an error" refused 1 "standard output: cannot write: No space left"

# ---- constant memory ----
# (AddressSanitizer must not keep what was freed)
ASAN_OPTIONS=quarantine_size_mb=1:${ASAN_OPTIONS:-} "$run" -m "$m" -j 8 -n 2 -t 1 --json --seed 1 <"$tmp/fifo" >"$tmp/out" 2>"$tmp/err" &
pid=$!
exec 3>"$tmp/fifo"
rss() { sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' /proc/$pid/status; }
written() { # written LINES: waits until so many are
    i=0
    while [ "$(wc -l <"$tmp/out")" -lt "$1" ] && [ $i -lt 600 ]; do
        sleep 0.1
        i=$((i + 1))
    done
}
yes "the other thing" | head -n 500 >&3
written 500
early=$(rss)
yes "the other thing" | head -n 10000 >&3
written 10500
late=$(rss)
exec 3>&-
wait $pid
status=$?
pass "ten thousand prompts" sh -c '[ "$1" = 0 ] && [ "$(wc -l <"$2")" -eq 10500 ]' sh "$status" "$tmp/out"
pass "in the memory of five hundred (+1 MiB)" test $((late - early)) -le 1024

# ---- usage ----
refuses() { # refuses TEXT ARGUMENT...
    text=$1
    shift
    try "$run" -m "$m" "$@"
    pass "refused: $*" refused 2 "$text"
}
refuses "-j: expected a whole number from 0 to 4096, found '-1'" -j -1
refuses "unexpected argument 'a.txt': files that are prompts need -j N" a.txt
refuses "--n-best: for one prompt" -j 2 -f x --n-best 3
refuses "--logprobs: for one prompt" -j 2 -f x --logprobs 3
refuses "--json-prompts: for many prompts" --json-prompts -p a
refuses "--null: for many prompts" -0 -p a
refuses "-p: for one prompt, not with -j" -j 2 -p a
refuses "--save: for one prompt" -j 2 -f x --save y
refuses "--prefix-cache: for one prompt" -j 2 -f x --prefix-cache y
refuses "--ingest: for one prompt" -j 2 --ingest
refuses "at most one of -f" -j 2 -f x y
refuses "--tokens: with -j expected -" -j 2 --tokens 1,2
refuses "--null: for prompts that are lines" -j 2 -0 x
refuses "--echo: prints the prompt as it is, not with --json" -j 2 --json --echo -f x
refuses "--stop: expected some text" -j 2 -f x --stop ""
finish
