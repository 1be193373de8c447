#!/usr/bin/env python3
"""Writes the README's tables of decoding on the GPU from tools/results/decode.json.

   tools/decode_table.py          between the lines <!-- decode.json --> and <!-- end --> of README.md
"""
import json

import readme

MODELS = (("385m", "385M"), ("1b", "1B"), ("7b", "7B"))
# PyTorch 2.11 on another card of the same kind: torch.compile in a CUDA graph for one stream, the best of
# compiled and graph for 64.
PEERS = {1: ("PyTorch, `torch.compile` in a CUDA graph", ("1,217", "860", "185")),
         64: ("PyTorch, the best of compiled and graph", ("15,400", "21,300", "5,700"))}


def table(results):
    rows = {(r["model"], r["batch"], r["position"]): r for r in results["rows"] if r["dtype"] == "bf16"}
    batches = sorted({batch for _, batch, _ in rows})
    first = min(position for _, _, position in rows)
    out = ["| writing, tokens/s | " + " | ".join(name for _, name in MODELS) + " |", "|---|---|---|---|"]
    for batch in batches:
        cells = []
        for model, _ in MODELS:
            r = rows.get((model, batch, first))
            cells.append("%s (%.0f %%)" % (format(round(r["tok_s"]), ","), 100 * r["share"]) if r else "–")
        out.append("| %s | %s |" % ("one stream" if batch == 1 else "%d streams" % batch, " | ".join(cells)))
        if batch in PEERS:
            name, figures = PEERS[batch]
            out.append("| %s | %s |" % (name, " | ".join(figures)))
    worst = max(abs(r["tok_s"] / rows[model, batch, first]["tok_s"] - 1)
                for (model, batch, position), r in rows.items())
    far = max(position for _, _, position in rows)
    out += ["", "Measured on %s, %s: read %s GB/s. Speed at token %s differs from that at token %d by at most "
            "%.1f %%." % (results["device"], results["date"][:10], format(round(results["read_gbps"]), ","),
                          format(far, ","), first, 100 * worst)]
    return "\n".join(out)


def main():
    with open(readme.result("decode.json"), encoding="utf-8") as f:
        results = json.load(f)
    readme.put("decode.json", table(results))


main()
