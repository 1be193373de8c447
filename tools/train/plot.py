#!/usr/bin/env python3
"""The pictures of a model card: plot.py training.json OUTDIR writes loss_curve.svg and loss_by_position.svg."""
import json
import math
import os
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

BLUE, ORANGE, GREY = "#1f5fa8", "#d9822b", "#8a8f98"


def axes(title, x, y):
    fig, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(color="#e3e5e8", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def save(fig, path):
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def loss_curve(log, path):
    args = log["args"][-1]
    millions = args["streams"] * args["chunk"] / 1e6
    fig, ax = axes("Loss while training", "million tokens", "nats per token")
    ax.plot([r["step"] * millions for r in log["train"]], [r["loss"] for r in log["train"]], color=GREY, linewidth=0.8,
            label="training step, with dropout")
    ax.plot([r["step"] * millions for r in log["eval"]], [r["seen"] for r in log["eval"]], color=ORANGE, marker="o",
            markersize=3, label="training text, no dropout")
    ax.plot([r["step"] * millions for r in log["eval"]], [r["val"] for r in log["eval"]], color=BLUE, marker="o",
            markersize=3, label="validation text")
    falling = next(r["step"] for r in log["train"] if r["rate"] < 1 and r["step"] > args["warmup"])
    ax.axvline(falling * millions, color=GREY, linestyle=":", linewidth=1)
    ax.text(falling * millions, 3.95, " the rate falls", fontsize=8, color=GREY, va="top")
    ax.set_ylim(2.7, 4.0)
    ax.legend(frameon=False, fontsize=8)
    save(fig, path)


def loss_by_position(log, path):
    rows = log["by_position"]
    fig, ax = axes(f"Loss by position in one unbroken stream ({log['orders']} orders of the validation documents)",
                   "position in the stream (tokens)", "nats per token")
    for i, r in enumerate(rows):
        ax.fill_between([r["from"], r["to"]], r["nats"] - 2 * r["stderr"], r["nats"] + 2 * r["stderr"], color=BLUE,
                        alpha=0.18, linewidth=0)
        ax.plot([r["from"], r["to"]], [r["nats"]] * 2, color=BLUE, linewidth=2)
        side = 1 if i % 2 else -1  # neighbours' figures above and below, or they would touch
        ax.text(math.sqrt(r["from"] * r["to"]), r["nats"] + side * (2 * r["stderr"] + 0.004), f"{r['nats']:.3f}",
                fontsize=7, ha="center", va="bottom" if side > 0 else "top")
    ax.set_xscale("log")
    ax.set_xlim(1, rows[-1]["to"] * 1.2)
    ax.set_ylim(min(r["nats"] for r in rows) - 0.1, max(r["nats"] for r in rows) + 0.12)
    ax.text(0.99, 0.03, "band: two standard errors", transform=ax.transAxes, fontsize=7, color=GREY, ha="right")
    save(fig, path)


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    with open(sys.argv[1]) as f:
        log = json.load(f)
    plt.rcParams["svg.hashsalt"] = "ltn"  # the same file for the same log
    plt.rcParams["svg.fonttype"] = "none"
    loss_curve(log, os.path.join(sys.argv[2], "loss_curve.svg"))
    loss_by_position(log, os.path.join(sys.argv[2], "loss_by_position.svg"))


if __name__ == "__main__":
    main()
