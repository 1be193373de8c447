#!/usr/bin/env python3
"""Draws tokens per second against length from what `ltn-bench --format json` printed.

    tools/plot_speed.py RESULT.json OUT.svg

Needs matplotlib. The points are medians, the bars reach from the slowest repetition to the fastest.
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"prefill": ("reading (prefill)", "#1f5fa8"), "decode": ("writing (decode)", "#d97f26")}


def main(source, out):
    with open(source, encoding="utf-8") as f:
        result = json.load(f)
    plt.rcParams.update({"font.size": 11, "svg.fonttype": "path", "svg.hashsalt": "ltn"})
    fig, ax = plt.subplots(figsize=(8, 3.6))
    for test, (label, colour) in NAMES.items():
        rows = [r for r in result["rows"] if r["test"] == test and r.get("impl", "ltn") == "ltn"]
        if not rows:
            continue
        x = [r["length"] for r in rows]
        y = [r["median"] for r in rows]
        spread = [[r["median"] - r["min"] for r in rows], [r["max"] - r["median"] for r in rows]]
        ax.errorbar(x, y, yerr=spread, color=colour, marker="o", capsize=3, linewidth=2, label=label)
        ax.annotate(f"{y[-1]:,.0f}", (x[-1], y[-1]), xytext=(0, 8), textcoords="offset points", ha="center",
                    color=colour)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({r["length"] for r in result["rows"]})
    ax.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in ticks])
    low, high = ax.get_ylim()
    ax.set_ylim(low / 2, high * 2)
    ax.set_xlabel("tokens of text so far")
    ax.set_ylabel("tokens per second")
    ax.set_title(f"{result['backend']} ({result['device']})", loc="left", fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="center left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    fig.tight_layout()
    fig.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    main(*sys.argv[1:])
