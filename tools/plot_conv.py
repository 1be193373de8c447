#!/usr/bin/env python3
"""Draws and tabulates the results of `ltn-bench conv --format json`.

    tools/plot_conv.py RESULT.json SPEED.svg MEMORY.svg

SPEED: how much faster than cuDNN's best (of layouts, engines and channel paddings, for the same arithmetic) im2win is,
layer by layer. MEMORY: bytes beyond input and output. Standard output: the same as tables in Markdown. Needs
matplotlib.
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SERIES = [  # label, impl, dtype, colour
    ("explicit, f32", "im2win", "f32", "#8a8f98"),
    ("fused, tf32", "im2win-fused", "tf32", "#1f5fa8"),
    ("fused, bf16", "im2win-fused", "bf16", "#c0392b"),
]


def best(rows, layer, impl, dtype, form=None):
    """The fastest row, or None; form: a word that its variant must have."""
    found = [r for r in rows if r["layer"] == layer and r["impl"] == impl and r["dtype"] == dtype
             and (form is None or form in r["variant"])]
    return min(found, key=lambda r: r["total_us"]) if found else None


def whole_batch(rows, layer):
    found = [r for r in rows if r["layer"] == layer and r["impl"] == "im2col-cublas" and r["dtype"] == "f32"
             and r["variant"] != "image by image"]
    return found[0] if found else None


def style(ax):
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)


def draw_speed(result, rows, layers, out):
    fig, ax = plt.subplots(figsize=(9.6, 3.9))
    shown = [s for s in SERIES if any(r["impl"] == s[1] and r["dtype"] == s[2] for r in rows)]
    width = 0.8 / len(shown)
    for i, (label, impl, dtype, colour) in enumerate(shown):
        for layer in layers:
            own, peer = best(rows, layer, impl, dtype), best(rows, layer, "cudnn", dtype)
            if not own or not peer:
                continue
            ratio = peer["total_us"] / own["total_us"]
            x = layer + (i - (len(shown) - 1) / 2) * width
            ax.bar(x, ratio, width * 0.92, color=colour, label=label if layer == layers[0] else None)
            ax.text(x, ratio, f" {ratio:.2f}", ha="center", va="bottom", fontsize=6.5, rotation=90)
    ax.axhline(1, color="#333333", linewidth=1)
    ax.set_xticks(layers)
    ax.set_xlabel("layer")
    ax.set_ylabel("times as fast as cuDNN's best")
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize=9.5)
    ax.set_title(f"Im2win against cuDNN, {result['images']} images ({result['device']})", loc="left", fontsize=11)
    style(ax)
    fig.tight_layout()
    fig.savefig(out, metadata={"Date": None})


def draw_memory(result, rows, layers, out):
    fig, ax = plt.subplots(figsize=(9.6, 3.9))
    shown = [
        ("im2col of the whole batch", "#b7bdc6", lambda l: whole_batch(rows, l)),
        ("im2win, explicit", "#1f5fa8", lambda l: best(rows, l, "im2win", "f32")),
        ("cuDNN's fastest in f32", "#2e8b57", lambda l: best(rows, l, "cudnn", "f32")),
    ]
    for i, (label, colour, find) in enumerate(shown):
        for layer in layers:
            row = find(layer)
            if row:
                mib = row["workspace_bytes"] / 2**20
                ax.bar(layer + (i - 1) * 0.27, max(mib, 1), 0.25, color=colour,
                       label=label if layer == layers[0] else None)
    ax.set_yscale("log")
    ax.set_ylim(1, 10 * max(r["workspace_bytes"] for r in rows if r["dtype"] == "f32") / 2**20)
    ax.set_xticks(layers)
    ax.set_xlabel("layer")
    ax.set_ylabel("MiB beyond input and output")
    ax.legend(frameon=False, fontsize=9.5, ncols=3, loc="upper center")
    ax.set_title(f"Workspace, f32, {result['images']} images (fused im2win: none)", loc="left", fontsize=11)
    style(ax)
    fig.tight_layout()
    fig.savefig(out, metadata={"Date": None})


def us(row):
    return f"{row['total_us']:,.0f}" if row else "–"


def ratio(peer, own):
    if not peer or not own:
        return "–"
    value = peer["total_us"] / own["total_us"]
    return f"**{value:.2f}**" if value >= 1 else f"{value:.2f}"


def table(rows, layers):
    print("| layer | im2win | transform | TFLOP/s | im2col + cuBLAS, batch | image by image | direct | cuDNN | its engine | "
          "image / im2win | batch / im2win | cuDNN / im2win | workspace, im2win / im2col |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    image_ratios = []
    for layer in layers:
        own, peer = best(rows, layer, "im2win", "f32"), best(rows, layer, "cudnn", "f32")
        batch, image = whole_batch(rows, layer), best(rows, layer, "im2col-cublas", "f32", "image by image")
        direct = best(rows, layer, "direct", "f32")
        engine = f"{peer['layout']}, {peer['variant']}" if peer else "–"
        if own and image:
            image_ratios.append(image["total_us"] / own["total_us"])
        saved = f"{own['workspace_bytes'] / batch['workspace_bytes']:.2f}" if own and batch else "–"
        print(f"| {layer} | {us(own)} | {own['transform_us']:,.0f} | {own['tflops']:.1f} | {us(batch)} | {us(image)} | "
              f"{us(direct)} | {us(peer)} | {engine} | {ratio(image, own)} | {ratio(batch, own)} | {ratio(peer, own)} | "
              f"{saved} |")
    if image_ratios:
        print(f"\nOver the image-by-image form on average: {sum(image_ratios) / len(image_ratios):.2f}.")
    print("\n| layer | " + " | ".join(f"{d}: fused | cuDNN | cuDNN / fused" for d in ("tf32", "bf16")) + " |")
    print("|---|---|---|---|---|---|---|")
    for layer in layers:
        cells = []
        for dtype in ("tf32", "bf16"):
            own, peer = best(rows, layer, "im2win-fused", dtype), best(rows, layer, "cudnn", dtype)
            where = lambda r: f" {r['layout']}" + (f" {r['channels']} ch" if r["channels"] % 4 == 0 and layer in
                                                   (1, 2, 3, 7) else "") if r else ""
            cells += [us(own) + where(own), us(peer) + where(peer), ratio(peer, own)]
        print(f"| {layer} | " + " | ".join(cells) + " |")


def main(source, speed, memory):
    with open(source, encoding="utf-8") as f:
        result = json.load(f)
    rows = result["rows"]
    layers = sorted({r["layer"] for r in rows})
    plt.rcParams.update({"font.size": 10.5, "svg.fonttype": "path", "svg.hashsalt": "ltn"})
    draw_speed(result, rows, layers, speed)
    draw_memory(result, rows, layers, memory)
    table(rows, layers)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__.strip())
    main(*sys.argv[1:])
