# The tools that put measurements into tools/results and the README's tables.
. tests/tap.sh
if ! command -v python3 >/dev/null 2>&1; then
    skip "tables of measurements" "no python3 here"
    finish
    exit
fi
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$tmp/p/tools/results"
cp README.md "$tmp/p"
cp tools/readme.py tools/quant_table.py tools/decode_table.py "$tmp/p/tools"
cp tools/results/quant.json tools/results/decode.json "$tmp/p/tools/results"
quant() { try python3 "$tmp/p/tools/quant_table.py" "$@"; }
json="$tmp/p/tools/results/quant.json"
# field MODEL DTYPE KEY: of the one row of a model and type
field() {
    python3 -c 'import json, sys
rows = [r for r in json.load(open(sys.argv[1]))["rows"] if (r["model"], r["dtype"]) == (sys.argv[2], sys.argv[3])]
assert len(rows) == 1, rows
print(rows[0][sys.argv[4]])' "$json" "$@"
}

quant
pass "the README's table is that of quant.json" sh -c '[ "$1" = 0 ] && cmp -s "$2/p/README.md" README.md' sh "$status" "$tmp"
try python3 "$tmp/p/tools/decode_table.py"
pass "and that of decode.json" sh -c '[ "$1" = 0 ] && cmp -s "$2/p/README.md" README.md' sh "$status" "$tmp"

# ---- a score ----
"$LTN_TESTS/make_model" text "$tmp/demo.ltn" 1 -1
yes "one thing and another" | head -n 60 >"$tmp/text"
"$LTN_BIN/tools/convert" --dtype q8 "$tmp/demo.ltn" "$tmp/q8.ltn"
"$LTN_BIN/ltn-score" --device cpu -m "$tmp/q8.ltn" --reference "$tmp/demo.ltn" -f "$tmp/text" --json >"$tmp/score.json"
quant --score "$tmp/score.json" "$tmp/q8.ltn" --text "a text" --calibrated "another" --commit 1234567
pass "a score: status 0, no word" sh -c '[ "$1" = 0 ] && [ ! -s "$2/out" ] && [ ! -s "$2/err" ]' sh "$status" "$tmp"
pass "its row replaces the old one" is "$(field demo q8 text)/$(field demo q8 calibrated)" "a text/another"
pass "with the file's size" is "$(field demo q8 bytes)" "$(($(wc -c <"$tmp/q8.ltn")))"
pass "and the divergence" sh -c 'grep -q "\"kl_mean\":.*${1%????}" "$2"' sh "$(field demo q8 kl_mean)" "$tmp/score.json"

# ---- a speed ----
cat >"$tmp/bench.json" <<'END'
{"device": "a card", "driver": "1", "date": "2026-01-02T03:04:05Z", "commit": "abc", "command": "ltn-bench decode",
 "read_gbps": 3000, "copy_gbps": 2900, "gemm_tflops": null, "backend": "cuda:0", "threads": 0, "rows": [
 {"impl": "ltn", "model": "7b", "dtype": "q4", "batch": 1, "position": 0, "tok_s": 654.321, "gbps": 2500.5,
  "share": 0.83, "weight_bytes": 3976724480, "state_bytes": 65011712, "samples": [654.321]},
 {"impl": "ltn", "model": "7b", "dtype": "q4", "batch": 64, "position": 0, "tok_s": 9999, "gbps": 1, "share": 0.1,
  "weight_bytes": 3976724480, "state_bytes": 65011712, "samples": [9999]}]}
END
quant --bench "$tmp/bench.json"
pass "a speed: status 0, no word" sh -c '[ "$1" = 0 ] && [ ! -s "$2/out" ] && [ ! -s "$2/err" ]' sh "$status" "$tmp"
pass "one stream's row" is "$(field 'random 7b' q4 tok_s)/$(field 'random 7b' q4 device)" "654.32/a card"
pass "the head is the run's" grep -q '"commit": "abc"' "$json"
pass "the README has it" grep -q '^| q4 .* 654 |' "$tmp/p/README.md"
sed 's/654.321/600/' "$tmp/bench.json" >"$tmp/again.json"
quant --bench "$tmp/again.json"
pass "a second run replaces the first" is "$(field 'random 7b' q4 tok_s)" 600

# ---- refusals ----
cp "$json" "$tmp/kept.json"
quant --bench "$tmp/none.json"
pass "what is not there: one line, nothing changed" sh -c '[ "$1" = 1 ] && [ "$(wc -l <"$2/err")" = 1 ] && cmp -s "$3" "$2/kept.json"' sh "$status" "$tmp" "$json"
quant --bench "$tmp/score.json"
pass "no benchmark: one line" sh -c '[ "$1" = 1 ] && grep -qF "score.json: expected a JSON object with \"rows\"" "$2/err"' sh "$status" "$tmp"
sed 's/<!-- quant.json -->//' README.md >"$tmp/p/README.md"
quant
pass "a README without the place: one line" sh -c '[ "$1" = 1 ] && grep -qF "README.md: expected the lines <!-- quant.json -->" "$2/err"' sh "$status" "$tmp"
finish
