#!/usr/bin/env python3
"""Draws milliseconds per token against length, ltn and its peers, from tools/bench_attention_peers.py's results.

    tools/plot_attention.py RESULT.json OUT.svg

Needs matplotlib. The points are medians, with a panel for each number of heads; the grey line is the floor, the
bytes that must move at the speed of a copy.
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# impl: (label, colour, line style, marker)
STYLES = {
    "ltn": ("ltn", "#c0392b", "-", "o"),
    "fla chunk_simple_gla": ("flash-linear-attention, chunk", "#1f5fa8", "-", "s"),
    "fla fused_chunk_simple_gla": ("flash-linear-attention, fused chunk", "#6fa3d8", "-", "D"),
    "lightning-attn (Triton)": ("lightning-attention (Triton)", "#2e8b57", "-", "^"),
    "softmax, cuDNN": ("softmax, cuDNN", "#8e6bb8", "--", "v"),
    "softmax, flash": ("softmax, FlashAttention", "#b9a3d3", "--", "<"),
}


def length(n):
    return f"{n >> 20}M" if n % (1 << 20) == 0 else f"{n >> 10}K" if n % 1024 == 0 else str(n)


def panel(ax, rows, heads, dim, copy_gbps):
    lengths = sorted({r["n"] for r in rows})
    for impl, (label, colour, line, marker) in STYLES.items():
        points = sorted((r["n"], r["ms"] / r["n"]) for r in rows if r["impl"] == impl)
        if points:
            own = impl == "ltn"
            ax.plot(*zip(*points), line, color=colour, marker=marker, markersize=6 if own else 4.5,
                    linewidth=2.6 if own else 1.5, label=label, zorder=5 if own else 3)
    floor = 8 * dim * heads / copy_gbps * 1e-6
    ax.axhline(floor, color="#999999", linewidth=1)
    ax.text(lengths[-1], floor * 0.94, "floor: one read and write at a copy's speed", ha="right", va="top",
            color="#777777", fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor / 1.6)
    ticks = lengths[:1]
    for n in lengths:
        if n >= 4 * ticks[-1]:
            ticks.append(n)
    ax.set_xticks(ticks, [length(n) for n in ticks])
    ax.minorticks_off()
    ax.set_title(f"{heads} heads", loc="left", fontsize=11)
    ax.set_xlabel("tokens")
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def main(source, out):
    with open(source, encoding="utf-8") as f:
        result = json.load(f)
    rows = [r for r in result["rows"] if r.get("ms") and r["layer"] == "last"]
    heads = sorted({r["h"] for r in rows if r["impl"] not in ("ltn", "ltn, portable") and r["n"] > 512})
    plt.rcParams.update({"font.size": 10.5, "svg.fonttype": "path", "svg.hashsalt": "ltn"})
    fig, axes = plt.subplots(1, len(heads), figsize=(4.9 * len(heads), 4.4), sharey=False, squeeze=False)
    for ax, h in zip(axes[0], heads):
        panel(ax, [r for r in rows if r["h"] == h], h, rows[0]["d"], result["copy_gbps"])
    axes[0][0].set_ylabel("milliseconds per token")
    fig.suptitle(f"Attention forward of one layer, d = {rows[0]['d']}, bf16, batch 1 ({result['device']})", x=0.01,
                 ha="left", fontsize=12)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9.5)
    fig.tight_layout(rect=(0, 0.11, 1, 0.99))
    fig.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    main(*sys.argv[1:])
