# ltn-score through a real shell.
. tests/tap.sh
on_cpu ltn-score
score=$tmp/ltn-score
"$LTN_TESTS/make_model" text "$tmp/text.ltn" 1 -1 || exit 1
"$LTN_TESTS/make_model" text "$tmp/nobos.ltn" -1 -1 || exit 1
"$LTN_TESTS/make_model" tokens "$tmp/ids.ltn" 1 2 || exit 1
"$LTN_TESTS/make_model" rounded "$tmp/rounded.ltn" 1 2 || exit 1
m=$tmp/text.ltn
unset LTN_MODEL

value() { awk -v key="$1" '$1 == key { print $2 }' "$tmp/out"; }
# near A B: equal within rounding to six digits
near() { awk -v a="$1" -v b="$2" 'BEGIN { d = a - b; if (d < 0) d = -d; exit !(a + 0 != 0 && d <= 2e-5 * (a < 0 ? -a : a)) }'; }

for f in -m --reference -f --tokens --logits --positions --json -t --device --help --version; do
    try "$score" --help
    pass "--help names $f" grep -qE "^ +$f( |\$)" "$tmp/out"
done

# ---- token ids: the losses computed again from the logits that were written ----
try "$score" -m "$tmp/ids.ltn" --tokens 5,17,9,200,3,3,77 --logits "$tmp/l.npy"
pass "token ids are scored" exited 0
pass "the first has nothing before it" is "$(value tokens) $(value scored_tokens)" "7 6"
pass "there are no bytes to speak of" is "$(value bytes) $(value bits_per_byte)" "- -"
pass "NumPy's magic" is "$(head -c 8 "$tmp/l.npy" | od -An -tx1 | tr -d ' ')" 934e554d50590100
pass "type and shape" sh -c "head -c 128 '$tmp/l.npy' | grep -aqF \"{'descr': '<f4', 'fortran_order': False, 'shape': (7, 360), }\""
pass "size" is "$(wc -c <"$tmp/l.npy")" $((128 + 4 * 7 * 360))
tail -c +129 "$tmp/l.npy" | od -An -v -tf4 -w1440 | awk '
    BEGIN { split("5 17 9 200 3 3 77", id) }
    NR < 7 { m = $1; for (i = 2; i <= NF; i++) if ($i > m) m = $i
             s = 0; for (i = 1; i <= NF; i++) s += exp($i - m)
             nats += m + log(s) - $(id[NR + 1] + 1) }
    END { printf "%.6g\n", nats }' >"$tmp/nats"
pass "the loss is that of the logits" near "$(value nats)" "$(cat "$tmp/nats")"
pass "the mean is over the scored tokens" near "$(value nats_per_token)" "$(awk '{ print $1 / 6 }' "$tmp/nats")"
pass "perplexity is its exponential" near "$(value perplexity)" "$(awk '{ print exp($1 / 6) }' "$tmp/nats")"
echo "5 17 9 200 3,3,77" | "$score" -m "$tmp/ids.ltn" --tokens - --logits "$tmp/l2.npy" >"$tmp/out"
pass "ids from standard input" same "$tmp/l.npy" "$tmp/l2.npy"
try "$score" -m "$tmp/ids.ltn" --tokens 5
pass "one id alone has no loss" is "$(value scored_tokens) $(value nats) $(value perplexity)" "0 - -"


# ---- a reference: all figures computed again from the logits of both ----
ids=5,17,9,200,3,3,77,41,300,12
try "$score" -m "$tmp/ids.ltn" --tokens $ids --logits "$tmp/a.npy"
try "$score" -m "$tmp/rounded.ltn" --reference "$tmp/ids.ltn" --tokens $ids --logits "$tmp/b.npy" --positions "$tmp/r.csv"
pass "a comparison" exited 0
for f in a b; do tail -c +129 "$tmp/$f.npy" | od -An -v -tf4 -w1440; done | awk -v ids=$ids '
    function lse(f, r,   m, s, i) {
        m = f[r, 1]; for (i = 2; i <= 360; i++) if (f[r, i] > m) m = f[r, i]
        s = 0; for (i = 1; i <= 360; i++) s += exp(f[r, i] - m)
        return m + log(s)
    }
    { for (i = 1; i <= 360; i++) x[NR, i] = $i }
    END {
        n = split(ids, id, ",")
        for (r = 1; r <= n; r++) {
            a = lse(x, r); b = lse(x, r + n); kl = 0; p = q = 1
            for (i = 1; i <= 360; i++) {
                kl += exp(x[r, i] - a) * (x[r, i] - a - x[r + n, i] + b)
                d = x[r, i] - x[r + n, i]; if (d < 0) d = -d
                if (d > most) most = d
                if (x[r, i] > x[r, p]) p = i
                if (x[r + n, i] > x[r + n, q]) q = i
            }
            sum += kl; squares += kl * kl; same += p == q; all[r] = kl
            if (r < n) { t = b - x[r + n, id[r + 1] + 1]; nats += t; nn += t * t; ref += a - x[r, id[r + 1] + 1] }
        }
        for (r = 1; r <= n; r++) { below = 0; for (i = 1; i <= n; i++) below += all[i] < all[r]; if (below == 4) median = all[r]
                                   if (all[r] > top) top = all[r] }
        e = sqrt((nn - nats * nats / 9) / 8 / 9)
        printf "nats_stderr %.6g\nperplexity_stderr %.6g\nreference_perplexity %.6g\nkl_mean %.6g\nkl_stderr %.6g\n",
            e, e * exp(nats / 9), exp(ref / 9), sum / n, sqrt((squares - sum * sum / n) / 9 / 10)
        printf "kl_max %.6g\ntop1_agreement %.6g\nlargest_logit_difference %.6g\nmedian %.6g\n", top, same / n, most, median
    }' >"$tmp/figures"
expected() { awk -v key="$1" '$1 == key { print $2 }' "$tmp/figures"; }
# within FACTOR A B: equal but for so much
within() { awk -v f="$1" -v a="$2" -v b="$3" 'BEGIN { d = a - b; if (d < 0) d = -d; exit !(a > 0 && d <= f * a) }'; }
for f in nats_stderr perplexity_stderr reference_perplexity top1_agreement largest_logit_difference; do
    pass "$f" near "$(value $f)" "$(expected $f)"
done
for f in kl_mean kl_stderr kl_max; do # small differences of float32 numbers
    pass "$f" within 0.01 "$(value $f)" "$(expected $f)"
done
pass "kl_median" within 0.02 "$(value kl_median)" "$(expected median)"
pass "kl_p99 of ten is the largest" within 0.02 "$(value kl_p99)" "$(value kl_max)"
pass "every token is compared" is "$(value compared_tokens)" 10
pass "positions have the reference's loss and the divergence" is "$(head -n 1 "$tmp/r.csv")" \
    first,end,tokens,nats_per_token,stderr,reference_nats_per_token,kl
pass "whose mean is the reference's perplexity" near "$(value reference_perplexity)" \
    "$(awk -F, 'NR > 1 { n += $3; s += $3 * $6 } END { print exp(s / n) }' "$tmp/r.csv")"
try "$score" -m "$tmp/ids.ltn" --reference "$tmp/ids.ltn" --tokens $ids
pass "a model does not diverge from itself" is "$(value kl_max) $(value top1_agreement) $(value largest_logit_difference)" "0 1 0"
try "$score" -m "$tmp/ids.ltn" --reference "$tmp/rounded.ltn" --tokens $ids --json
pass "JSON names the reference" grep -qE '"reference":[[:space:]]*"[0-9a-f]{32}"' "$tmp/out"
pass "and has its figures" grep -qE '"kl_p99":[[:space:]]*[0-9]' "$tmp/out"

# ---- text ----
yes "the other thing and then some" | head -n 400 >"$tmp/text"
bytes=$(wc -c <"$tmp/text")
try "$score" -m "$m" -f "$tmp/text" --positions "$tmp/p.csv" --logits "$tmp/l.npy"
pass "a text is scored" exited 0
pass "from its first token on" is "$(value scored_tokens)" "$(value tokens)"
pass "and says so" grep -q "^first_token *scored, given BOS" "$tmp/out"
pass "all its bytes count" is "$(value bytes)" "$bytes"
nats=$(value nats)
tokens=$(value tokens)
pass "bits per byte" near "$(value bits_per_byte)" "$(awk -v n="$nats" -v b="$bytes" 'BEGIN { print n / log(2) / b }')"
pass "logits have a row for each token of the text" is "$(wc -c <"$tmp/l.npy")" $((128 + 4 * 360 * tokens))
pass "positions: header" is "$(head -n 1 "$tmp/p.csv")" first,end,tokens,nats_per_token,stderr
pass "positions: every token is in a bin" is "$(awk -F, 'NR > 1 { n += $3 } END { print n }' "$tmp/p.csv")" "$tokens"
pass "positions: their losses add up" near "$(awk -F, 'NR > 1 { n += $3 * $4 } END { print n }' "$tmp/p.csv")" "$nats"
pass "positions: edges at 1000 and 2000" grep -q '^1000,2000,1000,' "$tmp/p.csv"
"$score" -m "$m" <"$tmp/text" >"$tmp/out"
pass "the same from standard input" is "$(value nats)" "$nats"
(head -c 1000 "$tmp/text"; sleep 0.2; tail -c +1001 "$tmp/text") | "$score" -m "$m" >"$tmp/out"
pass "the same from a slow pipe" is "$(value nats)" "$nats"
for t in 1 3; do
    try "$score" -m "$m" -f "$tmp/text" -t $t
    pass "the same with $t threads" is "$(value nats)" "$nats"
done
printf '<s>' | cat - "$tmp/text" >"$tmp/bos"
try "$score" -m "$m" -f "$tmp/bos"
pass "a text that begins with BOS is given no other" is "$(value tokens) $(value scored_tokens)" "$((tokens + 1)) $tokens"
try "$score" -m "$tmp/nobos.ltn" -f "$tmp/text"
pass "without BOS the first token is not scored" is "$(value scored_tokens)" $((tokens - 1))
try "$score" -m "$m" -f "$tmp/text" --json
pass "JSON" grep -qE '"tokens":[[:space:]]*'"$tokens," "$tmp/out"
try "$score" -m "$m" --reference "$m" -f "$tmp/text"
pass "a text against its own model, BOS included" is "$(value compared_tokens) $(value kl_max)" "$((tokens + 1)) 0"
pass "leaves the loss as it is" is "$(value nats)" "$nats"
pass "on stdout alone" test ! -s "$tmp/err"

# ---- failures ----
try "$score" -m "$m" -f "$tmp/text" --tokens 5
pass "-f and --tokens" refused 2 "at most one of"
try "$score" -m "$m" -f "$tmp/text" --logit x extra
pass "an argument too many" refused 2 "unexpected argument 'extra'"
try "$score" -m "$m" --tokens 5,x
pass "bad ids" refused 2 "--tokens: token 1: expected an id, found 'x'"
try "$score" -m "$m" --tokens 5,360
pass "ids beyond the vocabulary" refused 1 "expected an id from 0 to 359, found 360"
try "$score" -m "$tmp/ids.ltn" -f "$tmp/text"
pass "text for a model without a tokenizer" refused 1 "no tokenizer"
"$score" -m "$m" </dev/null >"$tmp/out" 2>"$tmp/err"
status=$?
pass "nothing to score" refused 1 "nothing to score"
try "$score" -m "$m" -f "$tmp/none"
pass "a missing text" refused 1 "none: cannot open"
try "$score" -m "$tmp/none.ltn" -f "$tmp/text"
pass "a missing model" refused 1 "none.ltn"
try "$score" -m "$m" -f "$tmp/text" --reference "$tmp/none.ltn"
pass "a missing reference" refused 1 "none.ltn"
try "$score" -m "$m" -f "$tmp/text" --reference "$tmp/nobos.ltn"
pass "a reference that starts otherwise" refused 1 "expected the model's BOS token 1, found -1"
try "$score" -m "$m" -f "$tmp/text" --reference model/demo/demo.ltn
pass "a reference of another vocabulary" refused 1 "expected the model's vocabulary of 360, found 8192"
try "$score" -m "$m" -f "$tmp/text" --logits "$tmp/no/l.npy"
pass "a folder that is not there" refused 1 "no/l.npy: cannot create"
try "$score" -m "$m" -f "$tmp/text" --logits /dev/full
pass "a device without room" refused 1 "/dev/full"
"$score" -m "$m" -f "$tmp/text" >/dev/full 2>"$tmp/err"
status=$?
: >"$tmp/out"
pass "stdout without room" refused 1 "standard output: cannot write"

echo old >"$tmp/old.npy"
(ulimit -f 64; "$score" -m "$m" -f "$tmp/text" --logits "$tmp/old.npy" >"$tmp/out" 2>"$tmp/err")
status=$?
pass "no room for the logits: an error" refused 1 "old.npy: cannot write"
pass "the old file stays" is "$(cat "$tmp/old.npy")" old
pass "nothing else stays" is "$(ls "$tmp" | grep -c old.npy)" 1
mkfifo "$tmp/fifo"
"$score" -m "$m" --logits "$tmp/int.npy" <"$tmp/fifo" >"$tmp/out" 2>"$tmp/err" &
pid=$!
exec 3>"$tmp/fifo"
cat "$tmp/text" >&3
ready $pid
kill -INT $pid
wait $pid
status=$?
exec 3>&-
pass "Ctrl-C: 130" exited 130
pass "and no file" is "$(ls "$tmp" | grep -c int.npy)" 0
finish
