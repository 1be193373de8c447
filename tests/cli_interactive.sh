# ltn-run -i on a terminal of its own: every command, each against runs without a terminal.
. tests/tap.sh
on_cpu ltn-run
run=$tmp/ltn-run
m=$tmp/text.ltn
"$LTN_TESTS/make_model" text "$m" 1 -1 || exit 1
"$LTN_TESTS/make_model" tokens "$tmp/ids.ltn" 1 2 || exit 1
HOME=$tmp/home
mkdir "$HOME"
export HOME
unset LTN_MODEL XDG_STATE_HOME

# session OPTION...: types standard input (tests/typist.c) at ltn-run -i; leaves $status, $tmp/out and, what the
# terminal saw, $tmp/err
session() {
    : >"$tmp/out"
    "$LTN_TESTS/typist" "$tmp/err" sh -c 'out=$1; shift; exec "$@" >"$out"' sh "$tmp/out" "$run" -m "$m" -i "$@"
    status=$?
}
said() { grep -qF -e "$1" "$tmp/err"; }
# text PROMPT OPTION...: what a run without a terminal answers, ending in a newline as each answer does there
text() {
    text_prompt=$1
    shift
    "$run" -m "$m" -q -p "$text_prompt" "$@" >"$tmp/text" && ended "$tmp/text"
}
# more PROMPT OPTION...: the same from the session $tmp/s on; saves there
more() {
    text_prompt=$1
    shift
    "$run" -m "$m" -q --load "$tmp/s" --save "$tmp/s" ${text_prompt:+-p "$text_prompt"} "$@" >"$tmp/text" && ended "$tmp/text"
}
ended() { # a newline at the end of the file unless there is one
    cat "$1"
    [ "$(tail -c 1 "$1" | od -An -tx1)" = " 0a" ] || echo
}
answered() { exited 0 && same "$tmp/out" "$tmp/expected"; }

# ---- where it works ----
try "$run" -m "$m" -i </dev/null
pass "no terminal: usage" refused 2 "-i: expected a terminal"
try "$run" -m "$m" -i --tokens 1
pass "not with --tokens" refused 2 "-i: the input is typed text"
try "$run" -m "$m" -i --n-best 2
pass "not with several answers" refused 2 "-i: answers are text"
try "$run" -m "$m" -p x --prefix y
pass "--prefix asks for -i" refused 2 "expected -i"
session <<'END'
type /quit
END
if [ "$status" -eq 99 ]; then
    skip "everything at a terminal" "no terminal to be had here"
    finish
    exit 0
fi

# ---- text ----
session -n 20 --seed 5 -q <<'END'
type hello there
type and then
type /quit
END
{ text "hello there" -n 20 --seed 5 --save "$tmp/s"; more "and then" -n 20; } >"$tmp/expected"
pass "two inputs: the text of two runs, and stdout has nothing else" answered
session -n 20 --seed 5 -q <<'END'
type hello there
type
see > 
keys ^D
END
{ text "hello there" -n 20 --seed 5 --save "$tmp/s"; more "" -n 20; } >"$tmp/expected"
pass "an empty line goes on; Ctrl-D leaves" answered
session -n 20 --seed 5 -q <<'END'
type
type /quit
END
text "" -n 20 --seed 5 >"$tmp/expected"
pass "an empty line at the beginning: from BOS" answered
session -n 20 --seed 5 -q -p "hello there" <<'END'
type and then
type /quit
END
{ text "hello there" -n 0 --seed 5 --save "$tmp/s"; more "and then" -n 20; } | tail -n +2 >"$tmp/expected"
pass "-p begins the text" answered
session -n 20 --seed 5 -q --prefix "[" --suffix "]
" <<'END'
type hello
type /quit
END
text "[hello]
" -n 20 --seed 5 >"$tmp/expected"
pass "--prefix and --suffix go around an input" answered
printf 'type one \\\nmore two \\\nmore three\ntype /quit\n' | session -n 20 --seed 5 -q
text "one 
two 
three" -n 20 --seed 5 >"$tmp/expected"
pass "lines that end in a backslash go on" answered
printf 'type """\nmore /help\nmore \nmore one \\\nmore """\ntype /quit\n' | session -n 20 --seed 5 -q
text "/help

one \\" -n 20 --seed 5 >"$tmp/expected"
pass "a block is taken as it is" answered
printf 'type smörgås 語\ntype /quit\n' | LC_ALL=C session -n 20 --seed 5 -q
text "smörgås 語" -n 20 --seed 5 >"$tmp/expected"
pass "UTF-8 whatever the locale" answered

# ---- stop strings ----
# With seed 3 the text has ".FCF", of four tokens, and "<unk>", which is one; both are on stdout at most up to STOP.
# The session must then stand behind KEPT: all whole tokens before it.
stops() { # stops STOP KEPT
    printf 'type hello there\ntype /quit\n' | session -n 60 --seed 3 -q --stop "$1" --save "$tmp/s"
    text "hello there" -n 60 --seed 3 --stop "$1" >"$tmp/expected"
    answered && grep -qaF "$2" "$tmp/expected" || return 1
    k=0
    until "$run" -m "$m" -q -p "hello there" -n $k --seed 3 --save "$tmp/s1" | tail -c ${#2} | grep -qaF "$2"; do
        k=$((k + 1))
        [ $k -lt 60 ] || return 1
    done
    "$run" -m "$m" --load "$tmp/s" --seed 9 -n 20 >"$tmp/out"
    "$run" -m "$m" --load "$tmp/s1" --seed 9 -n 20 | cmp -s - "$tmp/out"
}
pass "an answer ends before a stop string, and the session too" stops FCF .
pass "a token that holds a stop string's beginning goes with it" stops "nk><" "K"

# ---- back ----
session -n 20 --seed 5 <<'END'
type hello there
type never mind
type /undo
type and then
type /undo
type /undo
type hello there
type /undo
type /undo
type /quit
END
{
    text "hello there" -n 20 --seed 5 --save "$tmp/s"
    cp "$tmp/s" "$tmp/s1"
    more "never mind" -n 20
    cp "$tmp/s1" "$tmp/s"
    more "and then" -n 20
    text "hello there" -n 20 --seed 5
} >"$tmp/expected"
pass "/undo: as if the exchange had not been" answered
pass "/undo says where it leads" said "back at token 0"
pass "/undo at the beginning: one line" said "/undo: there is no exchange"
for seed in 5 6; do
    session -n 20 --seed $seed <<'END'
type hello there
type /rewind 5
type
type /rewind 35
type
type /rewind 0
type /rewind 36000
type /rewind five
type /quit
END
    {
        text "hello there" -n 20 --seed $seed
        "$run" -m "$m" -q -p "hello there" -n 15 --seed $seed --save "$tmp/s" >/dev/null
        more "" -n 20
        "$run" -m "$m" -q -p "hello there" -n 0 --seed $seed --save "$tmp/s" >/dev/null
        more "" -n 20
    } >"$tmp/expected"
    pass "/rewind within an answer and across two (seed $seed)" answered
done
pass "/rewind 0: one line" said "/rewind: expected 1 to "
pass "/rewind too far: says how far" said "which leads back to token 0, found 36000"
pass "/rewind five: one line" said "/rewind: expected a number of tokens, found 'five'"
again() {
    session -n 20 --seed 5 -q <<'END'
type hello there
type /regenerate
type /regenerate
type /undo
type hello there
type /quit
END
}
again
cp "$tmp/out" "$tmp/first"
again
text "hello there" -n 20 --seed 5 >"$tmp/once"
pass "/regenerate is reproducible" same "$tmp/out" "$tmp/first"
size=$(wc -c <"$tmp/once")
head -c "$size" "$tmp/first" >"$tmp/a"
tail -c "$size" "$tmp/first" >"$tmp/b"
tail -c +$((size + 1)) "$tmp/first" | head -c -"$size" >"$tmp/others"
pass "the first answer is that of a run" same "$tmp/a" "$tmp/once"
pass "/undo goes back behind all of them" same "$tmp/b" "$tmp/once"
half=$(($(wc -c <"$tmp/others") / 2))
pass "/regenerate: other answers, each" sh -c '[ "$3" -gt 10 ] && ! cmp -s "$1" "$2" && ! head -c "$3" "$1" | cmp -s - "$2" &&
    [ "$(head -c 12 "$1" | od -An -tx1)" != "$(head -c 12 "$2" | od -An -tx1)" ]' sh "$tmp/others" "$tmp/once" "$half"
session -n 20 --temp 0 <<'END'
type /rewind 1
type /regenerate
type hello there
type /regenerate
type /quit
END
{ text "hello there" -n 20 --temp 0; text "hello there" -n 20 --temp 0; } >"$tmp/expected"
pass "/regenerate at temperature 0: the same answer" answered
pass "and says so" said "every answer is the same"
pass "/rewind at the beginning: one line" said "/rewind: there is nothing to take back before token 0"
pass "/regenerate at the beginning: one line" said "/regenerate: there is no input"

# ---- forks, files ----
session -n 20 --seed 5 <<'END'
type hello there
type /fork b
see b
type and then
type /fork main
see main
type but now
type /fork b
see b
type so it was
type /undo
type /undo
type /undo
type hello there
type /fork main
see main
type so it was
type /fork
type /fork main
type /fork x y
type /quit
END
{
    text "hello there" -n 20 --seed 5 --save "$tmp/s"
    cp "$tmp/s" "$tmp/s1"
    more "and then" -n 20
    cp "$tmp/s" "$tmp/s2"
    cp "$tmp/s1" "$tmp/s"
    more "but now" -n 20
    cp "$tmp/s" "$tmp/s3"
    cp "$tmp/s2" "$tmp/s"
    more "so it was" -n 20
    text "hello there" -n 20 --seed 5
    cp "$tmp/s3" "$tmp/s"
    more "so it was" -n 20
} >"$tmp/expected"
pass "/fork: two timelines, each with its own past" answered
pass "/fork alone lists them" sh -c 'grep -q "\* main at token" "$1" && grep -q "  b at token" "$1"' sh "$tmp/err"
pass "/fork to the present one: one line" said "/fork: this is 'main' already"
pass "a name has no spaces" said "/fork: expected a name without spaces, found 'x y'"
session -n 20 --seed 5 <<END
type hello there
type /save $tmp/saved
type and then
type /load ~/../saved
type and then
type /undo
type /undo
type /load $tmp/none
type /save $tmp/none/x
type /save
type /stats
type /stats now
type /hello
type /help
type /quit
END
{
    text "hello there" -n 20 --seed 5 --save "$tmp/s"
    cp "$tmp/s" "$tmp/s1"
    more "and then" -n 20
    ended "$tmp/text"
} >"$tmp/expected"
pass "/save, then /load: the same again" answered
pass "what is saved is what a run saves" same "$tmp/saved" "$tmp/s1"
pass "it says where" sh -c 'grep -q "saved: saved at token" "$1" && grep -q "saved: resumed at token" "$1"' sh "$tmp/err"
pass "nothing to undo behind a load" said "/undo: there is no exchange"
pass "no file to load: one line" said "/load: $tmp/none: "
pass "no folder to save in: one line" said "/save: $tmp/none/x: "
pass "/save without a name: one line" said "/save: expected FILE, found nothing"
pass "/stats" said "back to token"
pass "/stats with an argument: one line" said "/stats: expected nothing after it, found 'now'"
pass "no such command: one line" said "/hello: no such command; /help lists them"
pass "/help names every command" sh -c 'for k in save load fork rewind undo regenerate stats help quit; do
    grep -q "^  /$k " "$1" || exit 1; done' sh "$tmp/err"

# ---- Ctrl-C, signals ----
session -n -1 --seed 5 --save "$tmp/saved" <<END
type hello there
wait $tmp/out
interrupt > 
interrupt Ctrl-C again
see > 
interrupt saved at token
END
pass "Ctrl-C ends an answer, then a second one at an empty line the program" exited 130
head -c -1 "$tmp/out" >"$tmp/part"
"$run" -m "$m" -p "hello there" -n 20000 --seed 5 | head -c "$(wc -c <"$tmp/part")" >"$tmp/expected"
pass "what was printed is the beginning of the answer" sh -c '[ -s "$1" ] && cmp -s "$1" "$2"' sh "$tmp/part" "$tmp/expected"
# (but for its end, where a character may be cut)
"$run" -m "$m" --load "$tmp/saved" -n 40 -q | head -c -12 >"$tmp/rest"
"$run" -m "$m" -p "hello there" -n 20000 --seed 5 | tail -c +"$(($(wc -c <"$tmp/part") + 1))" |
    head -c "$(wc -c <"$tmp/rest")" >"$tmp/expected"
pass "and the session saved at the end goes on from there" same "$tmp/rest" "$tmp/expected"
session -n 20 --seed 5 <<'END'
see > 
keys dropped
see dropped
interrupt > 
keys hello there^M
type /quit
END
text "hello there" -n 20 --seed 5 >"$tmp/expected"
pass "Ctrl-C drops the line" answered
session -n 20 --seed 5 <<'END'
type """
more one
see ... 
interrupt > 
keys hello there^M
type /quit
END
pass "Ctrl-C drops a block" answered

# ---- history ----
rm -rf "$HOME/.local"
session -n 20 --seed 5 -q <<'END'
type hello there
type /quit
END
history=$HOME/.local/state/ltn/history
pass "the history is kept, for its owner alone" sh -c '[ "$(stat -c %a "$1" "${1%/*}" | tr "\n" " ")" = "600 700 " ] && grep -q hello "$1"' sh "$history"
session -n 20 --seed 5 -q <<'END'
see > 
keys \e[A\e[A^M
type /quit
END
pass "and comes back in the next run" answered
printf 'not a history\n' >"$history"
session -n 20 --seed 5 <<'END'
type hello there
type /quit
END
pass "another file in its place is left alone" sh -c '[ "$(cat "$1")" = "not a history" ] && grep -q "left alone" "$2"' sh "$history" "$tmp/err"
rm "$history"
mkfifo "$history"
session -n 20 --seed 5 <<'END'
type hello there
type /quit
END
pass "and so is what is no file at all" sh -c '[ -p "$1" ] && grep -q "no regular file" "$2" && [ "$3" = 0 ]' sh "$history" "$tmp/err" "$status"
rm "$history"
mkdir "$tmp/state"
XDG_STATE_HOME=$tmp/state/deep session -n 20 --seed 5 <<'END'
type hello there
type /quit
END
pass "\$XDG_STATE_HOME" test -f "$tmp/state/deep/ltn/history"
(
    unset HOME
    printf 'type hello there\ntype /quit\n' | session -n 20 --seed 5
    exit "$status"
)
status=$?
pass "without HOME: none is kept, all else works" answered

# ---- models ----
m=$tmp/ids.ltn
session </dev/null
pass "a model without a tokenizer: one line" sh -c '[ "$2" = 1 ] && grep -q "has no tokenizer" "$1"' sh "$tmp/err" "$status"
"$LTN_TESTS/make_model" text "$tmp/nobos.ltn" -1 -1
m=$tmp/nobos.ltn
session -n 5 <<'END'
type
type /quit
END
pass "nothing to go on from: one line" said "nothing to go on from"
finish
