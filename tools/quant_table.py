#!/usr/bin/env python3
"""Puts what quantisation costs and brings into tools/results/quant.json, and writes the README's table from it.

   tools/quant_table.py [--score SCORE.json MODEL.ltn]... [--calibrated TEXT] [--text NAME] [--commit ID]
                        [--bench BENCH.json]...

SCORE.json: of `ltn-score --reference BF16.ltn --json -m MODEL.ltn`, or without --reference of the reference itself;
TEXT: what the models were calibrated with; NAME: what was scored; ID: of the programs that did it.
BENCH.json: of `ltn-bench decode --format json`; what it has for one stream is taken.
A row replaces the one of the same model, type and kind of device; the others stay. Without arguments, the README's
table alone, between the lines <!-- quant.json --> and <!-- end -->.

Rows of scores: {model, dtype, calibrated, bytes (the file), text, tokens, ppl, ppl_stderr, reference_ppl,
bits_per_byte, kl_mean, kl_stderr, kl_median, kl_p99, top1, largest_logit_difference, device, date, commit}; the KL
divergence in nats. Of speeds: {model ("random SHAPE"), dtype, device (of a CPU, and how it is used), threads (0: not a
CPU), bytes (of the weights that a token reads), state_bytes, tok_s (the median), gbps, share (of read_gbps), read_gbps,
samples, date, commit, command}. The head is that of the last run on a GPU.
"""
import argparse
import datetime
import json
import os

import readme

HEAD = ("device", "driver", "date", "commit", "command", "read_gbps", "copy_gbps", "gemm_tflops")
DTYPES = ("bf16", "q8", "fp8", "q4")
SCORES = {"ppl": "perplexity", "ppl_stderr": "perplexity_stderr", "reference_ppl": "reference_perplexity",
          "bits_per_byte": "bits_per_byte", "kl_mean": "kl_mean", "kl_stderr": "kl_stderr", "kl_median": "kl_median",
          "kl_p99": "kl_p99", "top1": "top1_agreement", "largest_logit_difference": "largest_logit_difference"}


def load(path, key):
    """One JSON object that has the key."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError) as e:
        raise SystemExit("quant_table: %s: expected a JSON object: %s" % (path, e))
    if not isinstance(found, dict) or key not in found:
        raise SystemExit('quant_table: %s: expected a JSON object with "%s"' % (path, key))
    return found


def short(x):
    return float("%.5g" % x) if isinstance(x, float) else x


def score_row(path, model, args):
    s = load(path, "perplexity")
    dtype = s["dtype"].lower()
    compared = "kl_mean" in s
    row = {"model": os.path.splitext(os.path.basename(args.master))[0], "dtype": dtype,
           "calibrated": args.calibrated if compared else None, "bytes": os.path.getsize(model), "text": args.text,
           "tokens": s["tokens"]}
    row.update((key, short(s[name])) for key, name in SCORES.items() if name in s)
    date = datetime.datetime.fromtimestamp(os.path.getmtime(path), datetime.timezone.utc)
    row.update(device=s["device"], date=date.strftime("%Y-%m-%dT%H:%M:%SZ"), commit=args.commit)
    return row


def speed_rows(path):
    b = load(path, "rows")
    device = "%s (%s)" % (b["device"], b["backend"]) if b["threads"] else b["device"]
    for r in b["rows"]:
        if r["batch"] == 1 and r["position"] == 0:
            yield {"model": "random " + r["model"], "dtype": r["dtype"], "device": device,
                   "threads": b["threads"], "bytes": r["weight_bytes"], "state_bytes": r["state_bytes"],
                   "tok_s": short(r["tok_s"]), "gbps": short(r["gbps"]), "share": short(r["share"]),
                   "read_gbps": short(b["read_gbps"]), "samples": [short(x) for x in r["samples"]],
                   "date": b["date"], "commit": b["commit"], "command": b["command"]}


def same(a, b):
    """Whether a row is of the same thing as another."""
    return all(a.get(key) == b.get(key) for key in ("model", "dtype", "threads"))


def put(results, row):
    results["rows"] = [r for r in results["rows"] if not same(r, row)] + [row]
    results["rows"].sort(key=lambda r: (r["model"], r.get("threads", 0), DTYPES.index(r["dtype"])))


# ---- the table -----------------------------------------------------------------------------------------------------

def exponent(x):
    mantissa, power = ("%.1e" % x).split("e")
    return "%se%d" % (mantissa, int(power))


def table(results):
    rows = results["rows"]
    scores = {r["dtype"]: r for r in rows if "ppl" in r}
    speeds = {(r["model"], r["dtype"], r["threads"]): r for r in rows if "tok_s" in r}
    cpu = sorted({r["threads"] for r in rows if r.get("threads")})
    columns = [("random 1b", 0, "GPU, 1B"), ("random 7b", 0, "GPU, 7B")]
    columns += [("random 385m", n, "CPU, %d threads, 385M" % n) for n in cpu]
    columns = [c for c in columns if any((c[0], d, c[1]) in speeds for d in DTYPES)]
    out = ["| | MB | KL mean | KL 99 % | perplexity | same likeliest token | tokens/s: " +
           " | ".join(title for _, _, title in columns) + " |", "|---" * (6 + len(columns)) + "|"]
    for d in DTYPES:
        s = scores.get(d)
        cells = [d]
        if s:
            cells.append("%.1f" % (1e-6 * s["bytes"]))
        if s and "kl_mean" in s:
            cells += [exponent(s["kl_mean"]), exponent(s["kl_p99"]),
                      "%+.2f %%" % (100 * (s["ppl"] / s["reference_ppl"] - 1)), "%.1f %%" % (100 * s["top1"])]
        elif s:
            cells += ["", "", "%.2f" % s["ppl"], ""]
        cells += [""] * (6 - len(cells))
        for model, threads, _ in columns:
            r = speeds.get((model, d, threads))
            cells.append(format(round(r["tok_s"]), ",") if r else "")
        out.append("| " + " | ".join(cells) + " |")
    notes, texts = [], {}
    for d in DTYPES:
        s = scores.get(d)
        if s and "kl_mean" in s:
            text = "%s tokens of %s on %s" % (format(s["tokens"], ","), s["text"], s["device"])
            texts.setdefault((s["model"], text), []).append(d)
    for (model, text), types in texts.items():
        notes.append("%s, %s%s" % (model, text, " (%s)" % ", ".join(types) if len(texts) > 1 else ""))
    for kind in ("cuda", "CPU"):
        of_kind = sorted({r["device"] for r in speeds.values() if (r["threads"] > 0) == (kind == "CPU")})
        notes += ["speeds on " + device for device in of_kind]
    return "\n".join(out + ["", "Measured: " + "; ".join(notes) + "."])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", nargs=2, action="append", default=[], metavar=("SCORE.json", "MODEL.ltn"))
    parser.add_argument("--master", default="demo", help="the model that the scored ones were made from")
    parser.add_argument("--calibrated", metavar="TEXT")
    parser.add_argument("--text", metavar="NAME", default="val.txt")
    parser.add_argument("--commit", metavar="ID")
    parser.add_argument("--bench", action="append", default=[], metavar="BENCH.json")
    args = parser.parse_args()
    path = readme.result("quant.json")
    results = load(path, "rows")
    for score, model in args.score:
        put(results, score_row(score, model, args))
    for bench in args.bench:
        head = load(bench, "rows")
        if head["threads"] == 0:
            results.update((key, head.get(key)) for key in HEAD)
        for row in speed_rows(bench):
            put(results, row)
    if args.score or args.bench:
        readme.replace(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    readme.put("quant.json", table(results))


main()
