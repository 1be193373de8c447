# ltn-run through a real shell: what it prints where, how it ends, what it refuses.
. tests/tap.sh
on_cpu ltn-run
run=$tmp/ltn-run
"$LTN_TESTS/make_model" text "$tmp/text.ltn" 1 -1 || exit 1
"$LTN_TESTS/make_model" tokens "$tmp/ids.ltn" 1 2 || exit 1
"$LTN_TESTS/make_model" text "$tmp/nobos.ltn" -1 -1 || exit 1
m=$tmp/text.ltn
unset LTN_MODEL

# ---- help, version ----
try "$run" --help
pass "--help goes to stdout" exited 0
pass "--help names every option" sh -c 'for f in -m -p -f -n --temp --top-k --top-p --min-p --typical \
    --repeat-penalty --presence-penalty --frequency-penalty --repeat-last --logit-bias --n-best --json --logprobs \
    --seed --stop --ignore-eos --echo --tokens --save --load --prefix-cache --prefix-cache-size --ingest --every -i --prefix --suffix -t \
    --device --stats -q --help --version; do grep -qE "^ +$f( |\$)" "$1" || exit 1; done' sh "$tmp/out"
pass "--help leaves stderr empty" test ! -s "$tmp/err"
try "$run" --temp 0.1 --version
pass "--version" sh -c 'grep -qE "^ltn-run \(ltn\) [0-9]+\.[0-9]+\.[0-9]+$" "$1"' sh "$tmp/out"

# ---- stdout carries only the text ----
try "$run" -m "$m" -p "hello" -n 40 --seed 1
cp "$tmp/out" "$tmp/text"
pass "a prompt by -p" exited 0
pass "text on stdout" test -s "$tmp/text"
pass "nothing on stderr with a seed given" test ! -s "$tmp/err"
printf hello >"$tmp/prompt"
try "$run" -m "$m" -f "$tmp/prompt" -n 40 --seed 1
pass "the same by -f" same "$tmp/out" "$tmp/text"
"$run" -m "$m" -n 40 --seed 1 <"$tmp/prompt" >"$tmp/out"
pass "the same by standard input" same "$tmp/out" "$tmp/text"
printf hello | "$run" -m "$m" -f - -n 40 --seed 1 | cat >"$tmp/out"
pass "the same between pipes" same "$tmp/out" "$tmp/text"
(printf he; sleep 0.2; printf llo) | "$run" -m "$m" -n 40 --seed 1 >"$tmp/out"
pass "the same from a slow pipe" same "$tmp/out" "$tmp/text"
LTN_MODEL=$m "$run" -p hello -n 40 --seed 1 >"$tmp/out"
pass "the model by \$LTN_MODEL" same "$tmp/out" "$tmp/text"
try "$run" -m "$m" -p hello -n 40 --seed 1 --echo
printf hello | cat - "$tmp/text" >"$tmp/expected"
pass "--echo puts the prompt before the text" same "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -p hello -n 0 --seed 1
pass "-n 0 prints nothing" sh -c '[ "$1" = 0 ] && [ ! -s "$2" ]' sh "$status" "$tmp/out"
try "$run" -m "$m" -p hello -n 5
pass "without --seed the seed is named on stderr" one_line "seed "
seed=$(sed -n 's/.*seed //p' "$tmp/err")
cp "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -p hello -n 5 --seed "$seed"
pass "and gives the same text again" same "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -p hello -n 5 -q
pass "-q keeps stderr empty" test ! -s "$tmp/err"
try "$run" -m "$m" -p hello -n 30 --seed 1 --stats
pass "--stats is one line on stderr" one_line "tok/s"
pass "--stats names the share of the measured bandwidth" grep -q "% of the .* GB/s measured here" "$tmp/err"

# ---- determinism ----
for t in 1 2 3; do
    try "$run" -m "$m" -p hello -n 40 --seed 1 -t $t
    pass "the same text with $t threads" same "$tmp/out" "$tmp/text"
done
try "$run" -m "$m" -p hello -n 40 --seed 2
pass "another seed, another text" sh -c '! cmp -s "$1" "$2"' sh "$tmp/out" "$tmp/text"
try "$run" -m "$m" -p hello -n 40 --temp 0 --seed 1
cp "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -p hello -n 40 --temp 0 --seed 2
pass "--temp 0 does not depend on the seed" same "$tmp/out" "$tmp/expected"
for flags in "--top-k 1" "--top-p 0" "--min-p 1"; do
    # shellcheck disable=SC2086
    try "$run" -m "$m" -p hello -n 40 --top-p 1 $flags --seed 3
    pass "$flags leaves the likeliest token" same "$tmp/out" "$tmp/expected"
done

# ---- what else steers the choice ----
try "$run" -m "$m" -p hello -n 40 --temp 0 --repeat-penalty 1 --presence-penalty 0 --frequency-penalty 0 --typical 1 --repeat-last 1024
pass "penalties that are none change nothing" same "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -p hello -n 40 --temp 0 --repeat-penalty 1.3 --repeat-last 0
pass "--repeat-last 0 looks at nothing" same "$tmp/out" "$tmp/expected"
try "$run" -m "$m" -p hello -n 40 --seed 1 --typical 0.3
pass "--typical changes the text" sh -c '[ "$1" = 0 ] && ! cmp -s "$2" "$3"' sh "$status" "$tmp/out" "$tmp/text"
cp "$tmp/out" "$tmp/typical"
try "$run" -m "$m" -p hello -n 40 --seed 1 --typical 0.3 -t 3
pass "the same with 3 threads" same "$tmp/out" "$tmp/typical"
try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 50 --temp 0 --ignore-eos
repeats=$(tr ' ' '\n' <"$tmp/out" | sort | uniq -d | wc -l)
pass "greedy ids repeat" test "$repeats" -gt 0
for flags in "--presence-penalty 100" "--frequency-penalty 100"; do
    # shellcheck disable=SC2086
    try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 50 --temp 0 --ignore-eos --repeat-last 64 $flags
    pass "$flags: none comes twice, nor one of the prompt" is \
        "$(tr ' ' '\n' <"$tmp/out" | grep -vxE '5|17|9' | sort -u | wc -l)" 50
done
try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 50 --temp 0 --ignore-eos --repeat-last 2 --presence-penalty 100
pass "--repeat-last 2: never twice in three, yet again later" sh -c 'tr " " "\n" <"$1" | awk "
    \$1 == a || \$1 == b { exit 1 } { b = a; a = \$1; n[a]++ } END { for (i in n) if (n[i] > 1) exit 0; exit 1 }"' sh "$tmp/out"
try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 30 --seed 1 --ignore-eos --logit-bias 44=1e6
pass "--logit-bias to one token" is "$(tr ' ' '\n' <"$tmp/out" | sort -u)" 44
try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 50 --temp 0 --ignore-eos
ban=$(cut -d' ' -f1 "$tmp/out")
try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 50 --temp 0 --ignore-eos --logit-bias "$ban=-inf" --logit-bias 3=-0.5
pass "--logit-bias -inf: it never comes" sh -c '[ "$1" = 0 ] && ! tr " " "\n" <"$2" | grep -qx "$3"' sh "$status" "$tmp/out" "$ban"

# ---- several texts, lines of JSON ----
try "$run" -m "$m" -p hello -n 40 --seed 1 --n-best 3
{ echo "==> 1 of 3 <=="; cat "$tmp/text"; echo; echo; echo "==> 2 of 3 <=="; } >"$tmp/expected"
head -c "$(wc -c <"$tmp/expected")" "$tmp/out" >"$tmp/begin"
pass "--n-best: the first text is the one without it" same "$tmp/begin" "$tmp/expected"
pass "under a line for each" is "$(grep -ac '^==> [123] of 3 <==$' "$tmp/out")" 3
cp "$tmp/out" "$tmp/best"
try "$run" -m "$m" -p hello -n 40 --seed 1 --n-best 3 -t 3
pass "the same with 3 threads" same "$tmp/out" "$tmp/best"
try "$run" -m "$m" --tokens 5,17 -n 20 --seed 1 --n-best 4
pass "ids: a line for each text, all different" is "$(sort -u "$tmp/out" | wc -l)" 4
try "$run" -m "$m" --tokens 5,17 -n 20 --seed 1
head -n 1 "$tmp/out" >"$tmp/expected"
try "$run" -m "$m" --tokens 5,17 -n 20 --seed 1 --n-best 2
pass "--n-best 2 begins as --n-best 4 and 1 do" is "$(head -n 1 "$tmp/out")" "$(cat "$tmp/expected")"
if command -v python3 >/dev/null; then
    try "$run" -m "$m" -p hello -n 40 --seed 1 --json
    pass "--json: one line with the text" python3 -c '
import json, sys
(line,) = open(sys.argv[1], "rb").read().splitlines()
j = json.loads(line)
assert list(j) == ["text", "tokens", "logprob", "end"], j
assert j["text"].encode() == open(sys.argv[2], "rb").read() and j["tokens"] == 40 and j["end"] == "length"
assert -40 * 20 < j["logprob"] < 0' "$tmp/out" "$tmp/text"
    cp "$tmp/out" "$tmp/json"
    try "$run" -m "$m" -p hello -n 40 --seed 1 --n-best 3 --json
    pass "--json --n-best: one line each, with its number" python3 -c '
import json, sys
lines = [json.loads(l) for l in open(sys.argv[1], "rb")]
one = json.load(open(sys.argv[2]))
assert [l.pop("index") for l in lines] == [0, 1, 2] and lines[0] == one
assert len({l["text"] for l in lines}) == 3' "$tmp/out" "$tmp/json"
    try "$run" -m "$m" -p hello -n 40 --seed 1 --logprobs 5
    pass "--logprobs: a line for each token" python3 -c '
import json, math, sys
lines = [json.loads(l) for l in open(sys.argv[1], "rb")]
one = json.load(open(sys.argv[2]))
assert "".join(l["text"] for l in lines).encode() == open(sys.argv[3], "rb").read()
tokens = [l for l in lines if "id" in l]
assert len(tokens) == 40 and all(list(l) == ["id", "text", "logprob", "top"] for l in tokens)
assert abs(sum(l["logprob"] for l in tokens) - one["logprob"]) < 1e-4
for l in tokens:
    top = l["top"]
    assert len(top) == 5 and all(list(t) == ["id", "piece", "logprob"] for t in top)
    assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
    assert sum(math.exp(t["logprob"]) for t in top) < 1 and l["logprob"] <= top[0]["logprob"] < 0
    assert all(t["logprob"] == l["logprob"] for t in top if t["id"] == l["id"])' "$tmp/out" "$tmp/json" "$tmp/text"
    try "$run" -m "$m" -p hello -n 40 --seed 1 --logprobs 100 --temp 0 --logit-bias 300=5 --repeat-penalty 1.2
    pass "log-probabilities are the model's own" python3 -c '
import json, sys
for line in open(sys.argv[1], "rb"):
    l = json.loads(line)
    if "id" in l and l["id"] != l["top"][0]["id"]:
        sys.exit(0) # the choice is another one than the likeliest
sys.exit(1)' "$tmp/out"
    try "$run" -m "$tmp/ids.ltn" --tokens 5,17 -n 5 --seed 1 --json
    pass "--json with --tokens: ids" python3 -c '
import json, sys
j = json.loads(open(sys.argv[1]).read())
assert list(j) == ["ids", "tokens", "logprob", "end"] and len(j["ids"]) == 5' "$tmp/out"
    try "$run" -m "$tmp/ids.ltn" --tokens 5,17 -n 2 --seed 1 --logprobs 1
    pass "--logprobs of a model without a tokenizer" python3 -c '
import json, sys
lines = [json.loads(l) for l in open(sys.argv[1])]
assert len(lines) == 2 and lines[0]["text"] == "" and lines[0]["top"][0]["piece"] is None' "$tmp/out"
    try "$run" -m "$m" -p hello -n 0 --seed 1 --json
    pass "--json of no tokens" is "$(cat "$tmp/out")" '{"text": "", "tokens": 0, "logprob": 0, "end": "length"}'
else
    skip "lines of JSON" "no python3 here"
fi

# ---- token ids ----
try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 6 --temp 0
cp "$tmp/out" "$tmp/ids"
pass "--tokens prints ids on one line" grep -qE '^[0-9]+( [0-9]+){5}$' "$tmp/ids"
printf '5 17\n9\n' | "$run" -m "$tmp/ids.ltn" --tokens - -n 6 --temp 0 >"$tmp/out"
pass "--tokens - reads them from standard input" same "$tmp/out" "$tmp/ids"
try "$run" -m "$tmp/ids.ltn" --tokens 5,17,9 -n 6 --temp 0 --echo
pass "--echo prints the ids of the prompt too" is "$(cat "$tmp/out")" "5 17 9 $(cat "$tmp/ids")"
try "$run" -m "$m" --tokens 5,17 -n 3 --temp 0
pass "--tokens on a model that has a tokenizer" grep -qE '^[0-9]+ [0-9]+ [0-9]+$' "$tmp/out"
eos=$(cut -d' ' -f3 "$tmp/ids")
first=$(tr ' ' '\n' <"$tmp/ids" | grep -nx "$eos" | head -n 1 | cut -d: -f1)
"$LTN_TESTS/make_model" tokens "$tmp/eos.ltn" 1 "$eos"
try "$run" -m "$tmp/eos.ltn" --tokens 5,17,9 -n 6 --temp 0
pass "the end token ends and is not printed" is "$(wc -w <"$tmp/out")" $((first - 1))
try "$run" -m "$tmp/eos.ltn" --tokens 5,17,9 -n 6 --temp 0 --ignore-eos
pass "--ignore-eos goes on" same "$tmp/out" "$tmp/ids"

# ---- empty prompts ----
try "$run" -m "$m" -p "" -n 20 --seed 4
cp "$tmp/out" "$tmp/expected"
pass "an empty prompt starts from BOS" sh -c '[ "$1" = 0 ] && [ -s "$2" ]' sh "$status" "$tmp/out"
"$run" -m "$m" -n 20 --seed 4 </dev/null >"$tmp/out"
pass "empty standard input, too" same "$tmp/out" "$tmp/expected"
try "$run" -m "$tmp/nobos.ltn" -p "" -n 5
pass "without BOS it is refused" refused 1 "no BOS token"

# ---- stop strings: every part of the text of 2 to 6 bytes at a few places, wherever tokens end ----
# (the text is letters: the stop string must survive the shell)
"$run" -m "$m" -p hello -n 400 --seed 5 | tr -d '\0' >"$tmp/long"
tr -c 'a-zA-Z' '\n' <"$tmp/long" | grep -E '^.{2,6}$' | head -n 8 >"$tmp/parts"
pass "there is something to stop at" test -s "$tmp/parts"
while read -r part; do
    try "$run" -m "$m" -p hello -n 400 --seed 5 --stop "not in this text" --stop "$part"
    before=$(LC_ALL=C grep -obaF -e "$part" "$tmp/long" | head -n 1 | cut -d: -f1)
    head -c "$before" "$tmp/long" >"$tmp/expected"
    tr -d '\0' <"$tmp/out" >"$tmp/got"
    pass "--stop $part" same "$tmp/got" "$tmp/expected"
done <"$tmp/parts"
try "$run" -m "$m" -p hello -n 40 --seed 1 --stop "not in this text"
pass "what a stop string held back comes at the end" same "$tmp/out" "$tmp/text"

# ---- ends ----
rm "$tmp/out" # what an earlier run left there must not pass for this one's text
"$run" -m "$m" -p hello -n -1 --ignore-eos >"$tmp/out" 2>"$tmp/err" &
pid=$!
while [ ! -s "$tmp/out" ]; do sleep 0.05; done
kill -INT $pid
wait $pid
status=$?
pass "Ctrl-C while writing: 130" exited 130
pass "the text so far is there" test -s "$tmp/out"
mkfifo "$tmp/fifo"
"$run" -m "$m" -n 5 -q <"$tmp/fifo" >"$tmp/out" 2>"$tmp/err" &
pid=$!
exec 3>"$tmp/fifo"
ready $pid
kill -INT $pid
wait $pid
status=$?
exec 3>&-
pass "Ctrl-C while waiting for input: 130" exited 130
pass "quietly" test ! -s "$tmp/err"
{
    "$run" -m "$m" -p hello -n -1 --ignore-eos --seed 1 2>"$tmp/err"
    echo $? >"$tmp/status"
} | head -c 10 >"$tmp/out"
status=$(cat "$tmp/status")
pass "a reader that leaves ends it" exited 0
pass "with what it read" is "$(wc -c <"$tmp/out")" 10
pass "and quietly" test ! -s "$tmp/err"
"$run" -m "$m" -p hello -n 5 --seed 1 2>"$tmp/err" >/dev/full
status=$?
: >"$tmp/out"
pass "a full disk is an error" refused 1 "standard output: cannot write: No space left"
"$run" -m "$m" -p hello -n 5 --seed 1 2>"$tmp/err" >&-
status=$?
pass "closed stdout is an error" refused 1 "standard output: cannot write"
"$run" --help 2>"$tmp/err" >/dev/full
status=$?
pass "so is --help to a full disk" refused 1 "standard output: cannot write: No space left"
"$run" -m "$m" -p hello -n 40 --seed 1 <&- >"$tmp/out" 2>/dev/null
pass "closed stdin does not matter with -p" same "$tmp/out" "$tmp/text"
"$run" -m "$m" -p hello -n 40 --seed 1 2>&- >"$tmp/out"
pass "closed stderr does not matter" same "$tmp/out" "$tmp/text"

# ---- terminals ----
if script -qec true /dev/null </dev/null >/dev/null 2>&1; then
    script -qec "'$run' -m '$m'" /dev/null </dev/null >"$tmp/out" 2>&1
    status=$?
    pass "no prompt on a terminal: usage" exited 2
    script -qec "'$run' -m '$m' -p hello -n 8 --seed 1 -q" /dev/null </dev/null >"$tmp/out" 2>&1
    pass "on a terminal the text ends in a newline" is "$(tail -c 2 "$tmp/out" | od -An -tx1 | tr -d ' ')" 0d0a
else
    skip "no prompt on a terminal: usage" "no terminal to be had here"
    skip "on a terminal the text ends in a newline" "no terminal to be had here"
fi

# ---- long input in constant memory ----
# (AddressSanitizer must not keep what was freed)
ASAN_OPTIONS=quarantine_size_mb=1:${ASAN_OPTIONS:-} "$run" -m "$m" -n 1 -q --seed 1 <"$tmp/fifo" >"$tmp/out" 2>"$tmp/err" &
pid=$!
exec 3>"$tmp/fifo"
words() { yes "the other thing and the one" | head -c "$1"; }
rss() { sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' /proc/$pid/status; }
words 200000 >&3
early=$(rss)
words 1000000 >&3
late=$(rss)
exec 3>&-
wait $pid
status=$?
pass "a million bytes of prompt" exited 0
case $LTN_BIN in *asan*) most=4096 ;; *) most=1024 ;; esac # the sanitizer's allocator spreads out
pass "in constant memory ($early KiB, then $late KiB)" test $((late - early)) -le $most
try "$run" -m "$m" -p "$(words 100000)" -n 1 --seed 1
pass "a long prompt by -p" exited 0

# ---- wrong usage ----
refuses_usage() { # refuses_usage EXPECTED-TEXT ARGUMENTS...
    text=$1
    shift
    try "$run" -m "$m" "$@"
    pass "usage: $(echo "$*" | cut -c 1-60)" refused 2 "$text"
}
refuses_usage "--tmp: no such option; did you mean --temp?" --tmp 1
refuses_usage "--frobnicate: no such option; see ltn-run --help" --frobnicate
refuses_usage "-z: no such option" -z
refuses_usage "unexpected argument 'hello'" hello
refuses_usage "at most one of -p, -f and --tokens" -p a -f b
refuses_usage "at most one of -p, -f and --tokens" -p a --tokens 1
refuses_usage "-n: expected a whole number of at least -1, found 'x'" -p a -n x
refuses_usage "-n: expected a whole number of at least -1, found '-2'" -p a -n -2
refuses_usage "-n: expected a whole number of at least -1, found '1.5'" -p a -n 1.5
refuses_usage "-n: expected a whole number of at least -1, found '99999999999999999999'" -p a -n 99999999999999999999
refuses_usage "--temp: expected a number of at least 0, found 'x'" -p a --temp x
refuses_usage "--temp: expected a number of at least 0, found '-1'" -p a --temp -1
refuses_usage "--temp: expected a number of at least 0, found 'nan'" -p a --temp nan
refuses_usage "--temp: expected a number of at least 0, found ''" -p a --temp ""
refuses_usage "--top-k: expected a whole number from 0 to 2147483647, found '-3'" -p a --top-k -3
refuses_usage "--top-p: expected a number from 0 to 1, found '1.5'" -p a --top-p 1.5
refuses_usage "--min-p: expected a number from 0 to 1, found '2'" -p a --min-p 2
refuses_usage "--typical: expected a number from 0 to 1, found '1.5'" -p a --typical 1.5
refuses_usage "--repeat-penalty: expected a number from 0.01 to 100, found '0'" -p a --repeat-penalty 0
refuses_usage "--presence-penalty: expected a number from -100 to 100, found 'nan'" -p a --presence-penalty nan
refuses_usage "--frequency-penalty: expected a number from -100 to 100, found '101'" -p a --frequency-penalty 101
refuses_usage "--repeat-last: expected a whole number from 0 to 1024, found '1025'" -p a --repeat-last 1025
for bias in 5 5= =5 x=1 5=x -5=1 5=inf 5=nan 5=1x 5=1e99 1234567890=1 5:1 " 5=1"; do
    refuses_usage "--logit-bias: expected ID=VALUE, a number or -inf for VALUE, found '$bias'" -p a --logit-bias "$bias"
done
refuses_usage "--n-best: expected a whole number from 1 to 65536, found '0'" -p a --n-best 0
refuses_usage "--n-best: with --temp 0 all texts would be the same" -p a --n-best 2 --temp 0
refuses_usage "--n-best: has no one session" -p a --n-best 2 --save "$tmp/x"
refuses_usage "--logprobs: expected a whole number from 0 to 100, found '101'" -p a --logprobs 101
refuses_usage "--logprobs: expected a whole number from 0 to 100, found '-1'" -p a --logprobs -1
refuses_usage "at most one of --json and --logprobs" -p a --json --logprobs 1
refuses_usage "--echo: prints the prompt as it is" -p a --json --echo
refuses_usage "--seed: expected a whole number from 0 to 18446744073709551615, found '-1'" -p a --seed -1
refuses_usage "--seed: expected a whole number from 0 to 18446744073709551615, found '18446744073709551616'" -p a --seed 18446744073709551616
refuses_usage "-t: expected a whole number from 0 to 1024, found 'many'" -p a -t many
refuses_usage "--device: expected auto, cpu, cuda or cuda:N, found 'gpu'" -p a --device gpu
refuses_usage "--stop: expected some text" -p a --stop ""
# shellcheck disable=SC2046
refuses_usage "--stop: expected TEXT up to 64 times, found 'x'" -p a $(seq 65 | sed 's/.*/--stop x/')
refuses_usage "--stop: looks for text" --tokens 1 --stop x
refuses_usage "--stats: expected no argument" -p a --stats=1
refuses_usage "-n: expected a whole number of at least -1, found nothing" -p a -n
refuses_usage "--tokens: token 1: expected an id, found 'x'" --tokens 5,x
refuses_usage "--tokens: token 1: expected an id, found ','" --tokens 5,,6
refuses_usage "--tokens: token 1: expected an id, found the end" --tokens 5,
refuses_usage "--tokens: token 0: expected an id, found '-'" --tokens -5
refuses_usage "--tokens: token 0: expected an id, found 4294967296" --tokens 4294967296

# ---- failures ----
try "$run" -m "$tmp/none.ltn" -p a
pass "a missing model" refused 1 "none.ltn"
try "$run" -m "$tmp" -p a
pass "a folder for a model" refused 1 "$tmp"
try "$run" -m tests/tap.sh -p a
pass "something else for a model" refused 1 "tests/tap.sh"
size=$(wc -c <"$m")
for bytes in 0 7 8 100 2000 $((size / 2)) $((size - 1)); do
    head -c "$bytes" "$m" >"$tmp/cut.ltn"
    try "$run" -m "$tmp/cut.ltn" -p a -n 1 --seed 1
    pass "a model cut after $bytes bytes" refused 1 "cut.ltn"
done
try "$run" -m "$tmp/ids.ltn" -p a
pass "text for a model without a tokenizer" refused 1 "no tokenizer"
try "$run" -m "$m" -f "$tmp/none.txt" --seed 1
pass "a missing prompt file" refused 1 "none.txt: cannot open: No such file"
try "$run" -m "$m" -f "$tmp" --seed 1
pass "a folder for a prompt" refused 1 "cannot read: Is a directory"
try "$run" -m "$m" --tokens 1,400 --seed 1
pass "an id beyond the vocabulary" refused 1 "token 1: expected an id from 0 to 359, found 400"
try "$run" -m "$m" -p a --logit-bias 360=1 --seed 1
pass "a bias for an id beyond the vocabulary" refused 1 "--logit-bias: expected an id from 0 to 359, found 360"
echo "1 2 x" | "$run" -m "$m" --tokens - --seed 1 >"$tmp/out" 2>"$tmp/err"
status=$?
pass "a bad id on standard input" refused 1 "token 2: expected an id, found 'x'"
# ---- where the model is looked for ----
mkdir -p "$tmp/place/bin" "$tmp/place/share/ltn"
cp "$LTN_BIN/ltn-run" "$tmp/place/bin"
try "$tmp/place/bin/ltn-run" --device cpu -p hello -n 40 --seed 1
pass "no model anywhere" refused 1 "no model: expected one by -m or in \$LTN_MODEL"
cp "$m" "$tmp/place/share/ltn/demo.ltn"
try "$tmp/place/bin/ltn-run" --device cpu -p hello -n 40 --seed 1
pass "the installed model" same "$tmp/out" "$tmp/text"
mkdir -p "$tmp/place/bin/model/demo"
cp "$m" "$tmp/place/bin/model/demo/demo.ltn"
rm "$tmp/place/share/ltn/demo.ltn"
try "$tmp/place/bin/ltn-run" --device cpu -p hello -n 40 --seed 1
pass "the model beside the program" same "$tmp/out" "$tmp/text"

# ---- a CUDA library that does not load ----
echo "not a library" >"$tmp/place/bin/libltn_cuda.so"
try "$tmp/place/bin/ltn-run" -p hello -n 40 --seed 1
pass "auto: the CPU, and one line that says why" one_line "using the CPU: CUDA: $tmp/place/bin/libltn_cuda.so"
pass "and the text" same "$tmp/out" "$tmp/text"
try "$tmp/place/bin/ltn-run" -p hello -n 40 --seed 1 -q
pass "-q: without the line" test ! -s "$tmp/err"
try "$tmp/place/bin/ltn-run" -p hello -n 40 --seed 1 --device cuda
pass "cuda: refused, with the reason" refused 1 "CUDA: $tmp/place/bin/libltn_cuda.so"
finish
