#!/usr/bin/env python3
"""Draws the loss by position in the stream from what `ltn-score --positions` wrote.

    tools/plot_loss.py OUT.svg NAME=POSITIONS.csv ...

One curve for each file, with a band of two standard errors. Needs matplotlib.
"""
import csv
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ["#1f5fa8", "#d97f26", "#4a8f4a", "#8a5aa8", "#8a8f98"]


def read(path):
    with open(path, encoding="utf-8", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["stderr"]]  # a bin of one token says nothing
    x = [(max(float(r["first"]), 1) * float(r["end"])) ** 0.5 for r in rows]
    return x, [float(r["nats_per_token"]) for r in rows], [2 * float(r["stderr"]) for r in rows]


def main(out, curves):
    plt.rcParams.update({"font.size": 11, "svg.fonttype": "path", "svg.hashsalt": "ltn"})
    fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for i, curve in enumerate(curves):
        name, _, path = curve.partition("=")
        x, y, band = read(path)
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(x, y, color=colour, linewidth=2, label=name)
        ax.fill_between(x, [a - b for a, b in zip(y, band)], [a + b for a, b in zip(y, band)], color=colour,
                        alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.set_xlabel("position in the stream (tokens)")
    ax.set_ylabel("nats per token")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in a for a in sys.argv[2:]):
        sys.exit(__doc__.strip())
    main(sys.argv[1], sys.argv[2:])
