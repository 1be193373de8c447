# Sessions, the prefix cache and endless input of ltn-run, through a real shell.
. tests/tap.sh
on_cpu ltn-run
run=$tmp/ltn-run
info=$LTN_BIN/ltn-info
"$LTN_TESTS/make_model" text "$tmp/text.ltn" 1 -1 || exit 1
"$LTN_TESTS/make_model" tokens "$tmp/ids.ltn" 1 2 || exit 1
m=$tmp/text.ltn
s=$tmp/session
unset LTN_MODEL
words() { yes "the other thing and the one, and then some more" | head -c "$1"; }
ends_alike() { [ "$(wc -c <"$1")" -gt 0 ] && head -c "$(wc -c <"$1")" "$2" | cmp -s - "$1"; }

# ---- a run in two is a run in one, wherever it is cut ----
"$run" -m "$m" -p hello -n 60 --seed 1 >"$tmp/whole"
bad=
for n in $(seq 0 3 60); do
    "$run" -m "$m" -p hello -n "$n" --seed 1 -q --save "$s" >"$tmp/a" || bad="$bad $n"
    "$run" -m "$m" --load "$s" -n $((60 - n)) -q >"$tmp/b" || bad="$bad $n"
    cat "$tmp/a" "$tmp/b" | cmp -s - "$tmp/whole" || bad="$bad $n"
done
pass "cut at any token, amid characters too" is "$bad" ""
: >"$tmp/all"
"$run" -m "$m" -p hello -n 0 --seed 1 -q --save "$s"
for n in 1 2 3 5 8 13 21 7; do
    "$run" -m "$m" --load "$s" --save "$s" -n "$n" -q >>"$tmp/all"
done
"$run" -m "$m" --load "$s" -n 0 -q >>"$tmp/all" # a character that is not whole comes now
pass "many times over one file" same "$tmp/all" "$tmp/whole"
try "$run" -m "$m" -p hello -n 20 --seed 1 --save "$s"
pass "saving is reported on stderr" one_line "$s: saved at token "
cp "$s" "$tmp/kept"
try "$run" -m "$m" --load "$s" -n 5
pass "resuming is reported on stderr" one_line "$s: resumed at token $("$info" "$s" | sed -n 's/^position *\([0-9]*\) .*/\1/p')"
pass "loading leaves the file" same "$s" "$tmp/kept"
"$run" -m "$m" --load "$s" -n 40 -q >"$tmp/a"
"$run" -m "$m" --load "$s" -n 40 -q </dev/null >"$tmp/b"
pass "standard input is not the prompt then" same "$tmp/a" "$tmp/b"
"$run" -m "$m" --load "$s" -n 40 --seed 1 -q >"$tmp/b"
pass "--seed starts other draws" sh -c '! cmp -s "$1" "$2"' sh "$tmp/a" "$tmp/b"
"$run" -m "$m" --load "$s" -n 40 -q -t 1 >"$tmp/b"
pass "on another number of threads" same "$tmp/a" "$tmp/b"
"$run" -m "$m" --load "$s" -p " what" -n 10 -q --echo >"$tmp/b"
pass "with a further prompt" sh -c '[ "$(head -c 5 "$1")" = " what" ] && [ "$(wc -c <"$1")" -gt 5 ]' sh "$tmp/b"
"$run" -m "$tmp/ids.ltn" --tokens 5,17 -n 9 --temp 0 --ignore-eos >"$tmp/whole_ids"
"$run" -m "$tmp/ids.ltn" --tokens 5,17 -n 4 --temp 0 --ignore-eos -q --save "$tmp/ids" >"$tmp/a"
"$run" -m "$tmp/ids.ltn" --load "$tmp/ids" -n 0 -q
pass "a model without tokenizer needs no prompt, either" is $? 0
"$run" -m "$tmp/ids.ltn" --tokens "" --load "$tmp/ids" -n 5 --temp 0 --ignore-eos -q >"$tmp/b"
pass "token ids" is "$(cat "$tmp/a" "$tmp/b" | tr '\n' ' ')" "$(cat "$tmp/whole_ids") "
ulimit -f >/dev/null && "$run" -m "$m" -p "$(words 50000)" -n 1 -q --save "$tmp/long" --seed 1 >"$tmp/out"
pass "the size does not depend on the past" is "$(wc -c <"$tmp/long")" "$(wc -c <"$s")"

# ---- Ctrl-C: what was printed is what was saved ----
rm "$tmp/a"
"$run" -m "$m" -p hello -n -1 --ignore-eos --seed 7 -q --save "$tmp/stopped" >"$tmp/a" 2>"$tmp/err" &
pid=$!
while [ ! -s "$tmp/a" ]; do sleep 0.05; done
kill -INT $pid
wait $pid
status=$?
pass "Ctrl-C: 130" exited 130
"$run" -m "$m" --load "$tmp/stopped" -n 50 --ignore-eos -q >"$tmp/b"
cat "$tmp/a" "$tmp/b" >"$tmp/got"
"$run" -m "$m" -p hello -n $(($(wc -c <"$tmp/got") + 50)) --ignore-eos --seed 7 -q >"$tmp/expected"
pass "and goes on to the byte from there" ends_alike "$tmp/got" "$tmp/expected"
mkfifo "$tmp/fifo"
cp "$tmp/kept" "$s"
"$run" -m "$m" -n 5 -q --save "$s" <"$tmp/fifo" >"$tmp/out" 2>"$tmp/err" &
pid=$!
exec 3>"$tmp/fifo"
echo some text >&3
ready $pid
kill -INT $pid
wait $pid
status=$?
exec 3>&-
pass "Ctrl-C amid the prompt: 130" exited 130
pass "and the file that was there stays" same "$s" "$tmp/kept"

# ---- kill -9 ----
begin=$(date +%s%N)
"$run" -m "$m" -p hello -n 0 -q --seed 1 --save "$s"
span=$((($(date +%s%N) - begin) / 1000000 + 20)) # ms that a run takes, about
bad=
reported=0
for i in $(seq 100); do
    "$run" -m "$m" --load "$s" --save "$s" -n 5 --ignore-eos >/dev/null 2>"$tmp/report" &
    pid=$!
    sleep "$(awk -v s="$i" -v span="$span" 'BEGIN { srand(s * 7919); print rand() * 2 * span / 1000 }')"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    new=$(sed -n 's/.*saved at token //p' "$tmp/report")
    reported=${new:-$reported}
    "$info" --verify "$s" >"$tmp/out" 2>"$tmp/err" || bad="$bad $i"
    there=$(sed -n 's/^position *\([0-9]*\) .*/\1/p' "$tmp/out")
    [ "${there:-0}" -ge "$reported" ] || bad="$bad $i"
done
pass "killed 100 times: the last save that was reported is there" is "$bad" ""
pass "and there were such ($reported tokens)" test "$reported" -gt 5

# ---- refused ----
try "$run" -m "$m" --load "$tmp/none" -n 1
pass "a missing session" refused 1 "none: cannot open: No such file"
try "$run" -m "$m" --load "$m" -n 1
pass "a model for a session" refused 1 "text.ltn: not a session file"
try "$run" -m "$s" -p a -n 1
pass "a session for a model" refused 1 "session: not a .ltn file"
try "$run" -m "$tmp/ids.ltn" --load "$s" -n 1
pass "another model's session" refused 1 "session: a session of another model"
head -c 20000 "$s" >"$tmp/cut"
try "$run" -m "$m" --load "$tmp/cut" -n 1
pass "a session cut short" refused 1 "$tmp/cut: "
cp "$s" "$tmp/bad"
printf x | dd of="$tmp/bad" bs=1 seek=20000 conv=notrunc 2>/dev/null
try "$run" -m "$m" --load "$tmp/bad" -n 1
pass "a damaged session" refused 1 "$tmp/bad: damaged"
try "$info" --verify "$tmp/bad"
pass "ltn-info --verify, too" refused 1 "$tmp/bad: damaged"
try "$run" -m "$m" -p a -n 1 --seed 1 --save "$tmp/no/such"
pass "a missing folder: refused before any work" refused 1 "such: cannot create: No such file"
try "$run" -m "$m" -p a -n 1 --seed 1 --save /dev/null
pass "a device is not replaced" refused 1 "/dev/null: exists and is not a regular file"
cp "$s" "$tmp/kept"
(
    trap '' XFSZ
    ulimit -f 10
    "$run" -m "$m" -p a -n 1 --seed 1 -q --save "$s" >"$tmp/a" 2>"$tmp/err"
)
status=$?
: >"$tmp/out"
pass "no room: status 1, one line" refused 1 "session: cannot reserve"
pass "the text came all the same" test -s "$tmp/a"
pass "and the file that was there stays" same "$s" "$tmp/kept"

# ---- ltn-info ----
try "$info" --verify --tensors "$s"
pass "ltn-info of a session" exited 0
pass "position, model, sizes" sh -c 'grep -qE "^position +[0-9]+ tokens$" "$1" && grep -qE "^model +$2" "$1" &&
    grep -qE "^state +32,768 bytes in 3 layers$" "$1"' sh "$tmp/out" "$("$info" "$m" | sed -n 's/^checksum *//p')"
pass "a norm for each layer" is "$(grep -cE '^  layer [0-9] .* norm [0-9]' "$tmp/out")" 3
pass "verified" grep -qE '^checksum .*, verified; state and logits are finite$' "$tmp/out"
pass "its tensors" is "$(grep -cE '^(state\.[0-2]|logits|recent) ' "$tmp/out")" 5

# ---- prefix cache ----
c=$tmp/cache
words 6000 >"$tmp/p1"
(words 6000; echo something else) >"$tmp/p2"
(words 2000; echo a third thing) >"$tmp/p3"
for p in p1 p2 p3; do
    "$run" -m "$m" -f "$tmp/$p" -n 40 --seed 1 >"$tmp/$p.text"
done
try "$run" -m "$m" -f "$tmp/p1" -n 40 --seed 1 --prefix-cache "$c"
pass "an empty cache resumes nothing" one_line "$c: resumed 0 of "
pass "the same text" same "$tmp/out" "$tmp/p1.text"
try "$run" -m "$m" -f "$tmp/p1" -n 40 --seed 1 --prefix-cache "$c"
pass "the same prompt is resumed as a whole" grep -qE 'resumed ([0-9]+) of \1 prompt' "$tmp/err"
pass "the same text then" same "$tmp/out" "$tmp/p1.text"
n=$(sed -n 's/.*resumed \([0-9]*\) of.*/\1/p' "$tmp/err")
try "$run" -m "$m" -n 40 --seed 1 --prefix-cache "$c" <"$tmp/p2"
pass "a longer prompt resumes it" one_line "resumed $n of "
pass "with its own text" same "$tmp/out" "$tmp/p2.text"
try "$run" -m "$m" -p "$(cat "$tmp/p3")
" -n 40 --seed 1 --prefix-cache "$c"
pass "one that parts from it resumes a power of two" one_line "resumed 1024 of "
pass "with its own text, too" same "$tmp/out" "$tmp/p3.text"
try "$run" -m "$m" -f "$tmp/p1" -n 4 --seed 1 --prefix-cache "$c" -q
pass "-q says nothing" test ! -s "$tmp/err"
try "$run" -m "$m" --tokens "$(seq -s , 100)" -n 4 --seed 1 --prefix-cache "$c"
try "$run" -m "$m" --tokens "$(seq -s , 100)" -n 4 --seed 1 --prefix-cache "$c"
pass "token ids, too" one_line "resumed 100 of 100 "
pass "entries are of one size" is "$(ls -l "$c" | awk 'NR > 1 { print $5 }' | sort -u | wc -l)" 1
pass "and ltn-info shows them" sh -c '"$1" --verify "$2"/*-256.prefix | grep -qE "^prefix +[0-9a-f]{32}$"' sh "$info" "$c"
for i in $(seq 35); do
    echo "$i $(words 200)" | "$run" -m "$m" -n 0 --seed 1 -q --prefix-cache "$c" --prefix-cache-size 1
done
size=$(cat "$c"/*.prefix | wc -c)
pass "the size is limited ($size bytes)" test "$size" -le 1048576
pass "but used" test "$size" -gt 1000000
: >"$tmp/file"
try "$run" -m "$m" -p a -n 1 --seed 1 --prefix-cache "$tmp/file"
pass "a file for a folder" refused 1 "$tmp/file: cannot open: Not a directory"
try "$run" -m "$m" -p a -n 1 --seed 1 --prefix-cache "$tmp/no/such"
pass "a folder that cannot be made" refused 1 "such: cannot create"
if [ "$(id -u)" -ne 0 ]; then
    mkdir "$tmp/ro" && chmod 555 "$tmp/ro"
    try "$run" -m "$m" -f "$tmp/p1" -n 40 --seed 1 --prefix-cache "$tmp/ro"
else
    (
        trap '' XFSZ
        ulimit -f 10
        "$run" -m "$m" -f "$tmp/p1" -n 40 --seed 1 --prefix-cache "$tmp/ro" >"$tmp/out" 2>"$tmp/err"
    )
    status=$?
fi
pass "what cannot be stored is said" grep -q "prefix cache: not stored: $tmp/ro/" "$tmp/err"
pass "and the text comes" sh -c '[ "$1" = 0 ] && cmp -s "$2" "$3"' sh "$status" "$tmp/out" "$tmp/p1.text"

# ---- endless input ----
words 20000 >"$tmp/log"
"$run" -m "$m" -f "$tmp/log" -n 0 -q --seed 1 --save "$tmp/once"
total=$("$info" "$tmp/once" | sed -n 's/^position *\([0-9,]*\) .*/\1/p' | tr -d ,)
try "$run" -m "$m" --ingest -p " and" --every 3000 -n 8 --tokens 1
pass "-p and --tokens" refused 2 "at most one of -p, -f and --tokens"
ask() { "$run" -m "$m" --ingest -p " and" -n 8 --temp 0 -q --stop "
" "$@"; }
ask --every 3000 --save "$s" <"$tmp/log" >"$tmp/answers"
pass "an answer every 3,000 of $total tokens, and one at the end" is "$(wc -l <"$tmp/answers")" $((total / 3000 + 1))
(while IFS= read -r line; do printf '%s\n' "$line"; done <"$tmp/log") | ask --every 3000 >"$tmp/out"
pass "however the input comes" same "$tmp/out" "$tmp/answers"
ask <"$tmp/log" >"$tmp/out"
pass "without --every: the last one" is "$(cat "$tmp/out")" "$(tail -n 1 "$tmp/answers")"
"$run" -m "$m" --load "$tmp/once" -p " and" -n 8 --temp 0 -q --stop "
" >"$tmp/out"
echo >>"$tmp/out"
pass "it is what a session of the same text answers" is "$(cat "$tmp/out")" "$(tail -n 1 "$tmp/answers")"
pass "the stream is saved at its end" is "$("$info" "$s" | grep ^position)" "$("$info" "$tmp/once" | grep ^position)"
"$run" -m "$m" --load "$s" -n 40 --temp 0 -q >"$tmp/a"
"$run" -m "$m" --load "$tmp/once" -n 40 --temp 0 -q >"$tmp/b"
pass "and goes on as the text in one piece" same "$tmp/a" "$tmp/b"
ask --echo <"$tmp/log" >"$tmp/out"
pass "--echo: the stream, too" sh -c 'cat "$1" "$2" | cmp -s - "$3"' sh "$tmp/log" "$(tail -n 1 "$tmp/answers" >"$tmp/a"; echo "$tmp/a")" "$tmp/out"
seq 2000 | awk '{ print $1 % 300 }' | "$run" -m "$tmp/ids.ltn" --ingest --tokens 5,6 --every 600 -n 4 --ignore-eos -q >"$tmp/out"
pass "token ids" is "$(grep -cE '^[0-9]+( [0-9]+){3}$' "$tmp/out")" 4
(
    for i in 1 2 3 4; do
        echo "this is line number $i of the log"
        sleep 0.8
    done
) | ask --every 1s >"$tmp/out"
pass "--every 1s, and at the end" sh -c '[ "$1" -ge 3 ] && [ "$1" -le 4 ]' sh "$(wc -l <"$tmp/out")"
"$run" -m "$m" --ingest -q --save "$s" </dev/null
pass "no input at all" is "$?" 0
ask </dev/null >"$tmp/out"
pass "a question about nothing" is "$(wc -l <"$tmp/out")" 1
"$run" -m "$m" --ingest -q --echo --save "$s" <"$tmp/fifo" >"$tmp/echo" 2>"$tmp/err" &
pid=$!
exec 3>"$tmp/fifo"
cat "$tmp/log" >&3
until same "$tmp/log" "$tmp/echo"; do sleep 0.05; done
kill -INT $pid
wait $pid
status=$?
exec 3>&-
pass "Ctrl-C ends a stream: 130" exited 130
pass "and all of it is saved" is "$("$info" "$s" | grep ^position)" "$("$info" "$tmp/once" | grep ^position)"
"$run" -m "$m" --ingest -p " and" --every 3000 -n 8 -q --save "$s" --seed 1 <"$tmp/log" >/dev/full 2>"$tmp/err"
status=$?
: >"$tmp/out"
pass "stdout is full" refused 1 "standard output: cannot write"
pass "what was read is saved" test "$("$info" "$s" | sed -n 's/^position *\([0-9,]*\) .*/\1/p' | tr -d ,)" -ge 3000

# ---- wrong usage ----
refuses_usage() { # refuses_usage EXPECTED-TEXT ARGUMENTS...
    text=$1
    shift
    try "$run" -m "$m" "$@"
    pass "usage: $*" refused 2 "$text"
}
refuses_usage "--every: expected tokens, N, or seconds, Ns, of at least 1, found '0'" --ingest -p a --every 0
refuses_usage "found '-1'" --ingest -p a --every -1
refuses_usage "found '5m'" --ingest -p a --every 5m
refuses_usage "found ''" --ingest -p a --every ""
refuses_usage "found '99999999999999999999'" --ingest -p a --every 99999999999999999999
refuses_usage "--every: expected --ingest and a question" -p a --every 5
refuses_usage "--every: expected --ingest and a question" --ingest --every 5 --save x
refuses_usage "--ingest: expected a question by -p or --tokens, or a file by --save" --ingest
refuses_usage "--ingest: standard input is the stream" --ingest -f x
refuses_usage "--ingest: standard input is the stream" --ingest --tokens -
refuses_usage "--prefix-cache: for prompts from their beginning" -p a --prefix-cache x --load y
refuses_usage "--prefix-cache: for prompts from their beginning" -p a --prefix-cache x --ingest
refuses_usage "--prefix-cache-size: expected a whole number from 1" -p a --prefix-cache-size 0
finish
