# tools/convert and ltn-info through a real shell: what they print where, how they end, what they refuse.
. tests/tap.sh
convert=$LTN_BIN/tools/convert
info=$LTN_BIN/ltn-info
golden=tests/data/golden/a4_tnl2_f32_hidden_ne_embed_sharded

# ---- help, version, usage ----
for program in "$convert" "$info"; do
    name=$(basename "$program")
    try "$program" --help
    pass "$name --help: status 0" exited 0
    pass "$name --help: on stdout alone" sh -c '[ -s "$1/out" ] && [ ! -s "$1/err" ]' sh "$tmp"
    try "$program" --version
    pass "$name --version" grep -qE '^ltn-(convert|info) \(ltn\) [0-9]+\.[0-9]+\.[0-9]+$' "$tmp/out"
    try "$program"
    pass "$name without operands: usage on stderr, status 2" sh -c '[ "$1" = 2 ] && grep -q ^Usage: "$2" && [ ! -s "$3" ]' \
        sh "$status" "$tmp/err" "$tmp/out"
    try "$program" --nonsense
    pass "$name with an unknown flag: status 2" exited 2
done
pass "no default is invented for --dtype" sh -c '! "$1" --help | grep -A 2 -e --dtype | grep -q default' sh "$convert"
try "$convert" "$golden" "$tmp/x.ltn" --dtype q5
pass "an unknown dtype: status 2" refused 2 "expected one of f32|bf16|f16|q8|fp8|q4, found 'q5'"
try "$convert" "$golden" "$tmp/x.ltn" --dtype bf16 --calibrate README.md
pass "a text for nothing: status 2" refused 2 "--calibrate: expected --dtype q8, fp8 or q4"
try "$convert" "$golden" "$tmp/x.ltn" extra
pass "a third operand: status 2" exited 2
pass "nothing was written" test ! -e "$tmp/x.ltn"

# ---- converting ----
try "$convert" "$golden" "$tmp/a4.ltn"
pass "a conversion: status 0" exited 0
pass "nothing on stdout" test ! -s "$tmp/out"
pass "one line on stderr: there is no tokenizer" one_line "no tokenizer.model"
try "$info" --verify "$tmp/a4.ltn"
pass "ltn-info --verify: status 0, nothing on stderr" sh -c '[ "$1" = 0 ] && [ ! -s "$2" ]' sh "$status" "$tmp/err"
pass "its checksum is verified" grep -qE '^checksum +[0-9a-f]{32}, verified; all weights are finite$' "$tmp/out"
pass "its sizes are those of config.json" grep -q 'vocabulary 140, embedding 64, hidden 128, glu 64, 3 layers, 8 heads of 16$' \
    "$tmp/out"
pass "its state is 3 layers of 8 heads of 16 x 16 floats" grep -qE '^state +24,576 bytes a sequence$' "$tmp/out"
try "$info" "$tmp/a4.ltn" --tensors
pass "ltn-info --tensors lists them" sh -c '[ "$(grep -c "^model\." "$1")" = 31 ]' sh "$tmp/out"
pass "without --verify nothing is called verified" sh -c '! grep -q verified "$1"' sh "$tmp/out"
try "$convert" --dtype bf16 "$golden" "$tmp/a4.ltn"
try "$info" "$tmp/a4.ltn"
pass "--dtype, over an existing file" grep -qE '^matrices +BF16$' "$tmp/out"
"$convert" "$golden" "$tmp/b.ltn" 2>/dev/null
"$convert" "$golden/" "$tmp/c.ltn" 2>/dev/null
pass "the same twice gives the same bytes" same "$tmp/b.ltn" "$tmp/c.ltn"

# ---- quantising ----
for d in q8 fp8 q4; do
    try "$convert" --dtype $d "$golden" "$tmp/$d.ltn"
    pass "$d from a checkpoint: status 0" exited 0
    try "$convert" --dtype $d "$tmp/b.ltn" "$tmp/again.ltn"
    pass "$d from a .ltn: status 0, no word" sh -c '[ "$1" = 0 ] && [ ! -s "$2" ]' sh "$status" "$tmp/err"
    pass "the same bytes" same "$tmp/$d.ltn" "$tmp/again.ltn"
    try "$info" --verify "$tmp/$d.ltn"
    pass "$d: the same parameters, all finite" sh -c 'grep -q "verified; all weights are finite" "$1/out" &&
        [ "$(grep ^parameters "$1/out")" = "$("$2" "$1/b.ltn" | grep ^parameters)" ]' sh "$tmp" "$info"
    pass "nothing between stays" test ! -e "$tmp/$d.ltn.unquantised"
done
try "$convert" --dtype q4 "$tmp/q8.ltn" "$tmp/x.ltn"
pass "quantising twice: status 1, one line" refused 1 "already quantised, to q8"
try "$convert" --dtype bf16 "$tmp/b.ltn" "$tmp/x.ltn"
pass "a .ltn for no quantisation: status 1, one line" refused 1 "expected --dtype q8, fp8 or q4"
try "$convert" --dtype q4 "$tmp/none" "$tmp/x.ltn"
pass "what is not there: status 1, one line" refused 1 "$tmp/none"
try "$convert" --dtype q4 "$tmp/b.ltn" "$tmp/x.ltn" --calibrate README.md
pass "calibration without a tokenizer: status 1, one line" refused 1 "has no tokenizer"
"$LTN_TESTS/make_model" text "$tmp/text.ltn" 1 -1
echo "a short text" >"$tmp/short"
try "$convert" --dtype q4 "$tmp/text.ltn" "$tmp/x.ltn" --calibrate "$tmp/short"
pass "a text too short: status 1, one line" refused 1 "short: too short to calibrate by: expected at least 4096 tokens"
pass "nothing was written" test ! -e "$tmp/x.ltn"
yes "the other thing and then some" | head -n 1500 >"$tmp/long"
for t in 1 3; do try "$convert" --dtype q4 "$tmp/text.ltn" "$tmp/cal$t.ltn" --calibrate "$tmp/long" -t $t; done
pass "calibrated: status 0" exited 0
pass "the same bytes with any number of threads" same "$tmp/cal1.ltn" "$tmp/cal3.ltn"
"$convert" --dtype q4 "$tmp/text.ltn" "$tmp/near.ltn"
kl() { "$LTN_BIN/ltn-score" --device cpu -m "$1" --reference "$tmp/text.ltn" -f "$tmp/long" | awk '$1 == "kl_mean" { print $2 }'; }
pass "it loses less on such a text than the nearest" awk -v a="$(kl "$tmp/cal1.ltn")" -v b="$(kl "$tmp/near.ltn")" \
    'BEGIN { exit !(a > 0 && a < 0.8 * b) }'

# ---- a checkpoint with a tiktoken vocabulary ----
"$LTN_TESTS/test_convert" generate "$tmp/tt" 64 2 2 96 1204 1 f32
cp tests/data/tokenizer/tiny.tiktoken "$tmp/tt"
try "$convert" "$tmp/tt" "$tmp/tt.ltn"
pass "without its special tokens: status 1, one line" refused 1 "tiny.tiktoken: 1200 ranks: expected their special tokens"
echo '{"<|endoftext|>": 1200, "<s>": 1201}' >"$tmp/tt/added_tokens.json"
try "$convert" "$tmp/tt" "$tmp/tt.ltn"
pass "with them: status 0, no word" sh -c '[ "$1" = 0 ] && [ ! -s "$2" ]' sh "$status" "$tmp/err"
try "$info" "$tmp/tt.ltn"
pass "the vocabulary is inside" grep -qE "^tokenizer +[0-9,]+ bytes$" "$tmp/out"
try "$LTN_BIN/ltn-run" --device cpu -m "$tmp/tt.ltn" -p "It's 3 o'clock" -n 60 --seed 1 --echo
pass "and the model speaks: whole characters" sh -c '[ "$1" = 0 ] && iconv -f UTF-8 -t UTF-8 "$2" >/dev/null' sh "$status" "$tmp/out"
pass "after the prompt" grep -q "^It's 3 o'clock" "$tmp/out"

# ---- failing ----
cp "$tmp/b.ltn" "$tmp/kept.ltn"
try "$convert" "$tmp/nowhere" "$tmp/kept.ltn"
pass "a missing directory: status 1, one line" refused 1 "nowhere: cannot open: No such file or directory"
cp -r "$golden" "$tmp/cut"
head -c 1000 "$golden/model-00002-of-00003.safetensors" >"$tmp/cut/model-00002-of-00003.safetensors"
try "$convert" "$tmp/cut" "$tmp/kept.ltn"
pass "a shard cut short: status 1, one line that names it" refused 1 "cut/model-00002-of-00003.safetensors: "
pass "the file that was there is kept" same "$tmp/b.ltn" "$tmp/kept.ltn"
try "$convert" "$golden" /dev/null
pass "a device is not replaced" refused 1 "/dev/null: exists and is not a regular file"
pass "/dev/null is still one" test -c /dev/null
try "$convert" "$golden" "$tmp/no/such/x.ltn"
pass "a missing folder for the output" refused 1 "x.ltn: cannot create: No such file or directory"
(
    trap '' XFSZ
    ulimit -f 100
    "$convert" "$golden" "$tmp/kept.ltn" >"$tmp/out" 2>"$tmp/err"
)
status=$?
pass "no room: status 1, one line" refused 1 "kept.ltn: cannot reserve"
pass "the file that was there is kept then, too" same "$tmp/b.ltn" "$tmp/kept.ltn"
pass "no temporary file is left" sh -c '[ -z "$(ls -A "$1" | grep "tmp$")" ]' sh "$tmp"

try "$info" "$tmp/nowhere.ltn"
pass "ltn-info of a missing file" refused 1 "nowhere.ltn: cannot open"
try "$info" "$tmp"
pass "ltn-info of a folder" refused 1 "not a regular file"
try "$info" "$golden/model-00001-of-00003.safetensors"
pass "ltn-info of a plain safetensors file" refused 1 "not a .ltn file"
printf x | dd of="$tmp/b.ltn" bs=1 seek=400000 conv=notrunc 2>/dev/null
try "$info" "$tmp/b.ltn"
pass "damaged data is not looked at without --verify" exited 0
try "$info" --verify "$tmp/b.ltn"
pass "ltn-info --verify of damaged data" refused 1 "b.ltn: damaged: the checksum of the data is"
"$info" "$tmp/kept.ltn" 2>"$tmp/err" >&-
pass "a closed stdout is no crash" sh -c '[ "$1" -lt 126 ]' sh $?
finish
