#!/usr/bin/env python3
"""Draws and tabulates the results of `ltn-bench conv` and of PyTorch in the same layers.

    tools/plot_conv.py

From tools/results/conv.json and conv_torch.json: conv_speed.svg (how much faster than cuDNN's best of layouts, engines
and channel paddings, for the same arithmetic, im2win is, layer by layer) and conv_memory.svg (bytes beyond input and
output) beside them, the tables of kernels/conv/README.md and the paragraph of README.md between the lines
<!-- conv.json --> and <!-- end -->. Needs matplotlib.
"""
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import readme

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


def mean(values):
    return sum(values) / len(values)


def ratios(rows, layers, dtype, impl):
    """cuDNN's best over im2win's, by layer."""
    pairs = [(l, best(rows, l, "cudnn", dtype), best(rows, l, impl, dtype)) for l in layers]
    return {l: peer["total_us"] / own["total_us"] for l, peer, own in pairs if peer and own}


def tables(result, torch_result):
    rows, torch_rows = result["rows"], torch_result["rows"]
    layers = sorted({r["layer"] for r in rows})
    out = [f"{result['device']}, {result['images']} images, {result['libraries']}, driver {result['driver']}, "
           f"{result['date'][:10]}; PyTorch: {torch_result['libraries']}, {torch_result['date'][:10]}. Microseconds, medians.", "",
           "f32 (bold: im2win is the faster):", "",
           "| layer | im2win | transform | TFLOP/s | im2col + cuBLAS, batch | image by image | PyTorch's fallback | cuDNN | "
           "its engine | PyTorch's cuDNN | batch / im2win | image / im2win | fallback / im2win | cuDNN / im2win | workspace, "
           "im2win / im2col |", "|" + "---|" * 15]
    by_image, by_fallback = [], []
    for layer in layers:
        own, peer = best(rows, layer, "im2win", "f32"), best(rows, layer, "cudnn", "f32")
        batch, image = whole_batch(rows, layer), best(rows, layer, "im2col-cublas", "f32", "image by image")
        fallback, theirs = best(torch_rows, layer, "torch-fallback", "f32"), best(torch_rows, layer, "torch-cudnn", "f32")
        by_image.append(image["total_us"] / own["total_us"])
        by_fallback.append(fallback["total_us"] / own["total_us"])
        out.append(f"| {layer} | {us(own)} | {own['transform_us']:,.0f} | {own['tflops']:.1f} | {us(batch)} | {us(image)} | "
                   f"{us(fallback)} | {us(peer)} | {peer['layout']}, {peer['variant']} | {us(theirs)} | {ratio(batch, own)} | "
                   f"{ratio(image, own)} | {ratio(fallback, own)} | {ratio(min(peer, theirs, key=lambda r: r['total_us']), own)} | "
                   f"{own['workspace_bytes'] / batch['workspace_bytes']:.2f} |")
    out += ["", f"On average {mean(by_image):.2f} times as fast as im2col and cuBLAS image by image, "
            f"{mean(by_fallback):.2f} times as PyTorch's fallback, which is that form.", "",
            'Tensor cores, the best of both layouts on either side; "ch": channels padded beforehand, untimed:', "",
            "| layer | " + " | ".join(f"{d}: fused | cuDNN | cuDNN / fused" for d in ("tf32", "bf16")) + " |",
            "|---|---|---|---|---|---|---|"]
    for layer in layers:
        cells = []
        for dtype in ("tf32", "bf16"):
            own, peer = best(rows, layer, "im2win-fused", dtype), best(rows, layer, "cudnn", dtype)
            where = lambda r: f" {r['layout']}" + (f" {r['channels']} ch" if r["channels"] % 4 == 0 and layer in
                                                   (1, 2, 3, 7) else "") if r else ""
            cells += [us(own) + where(own), us(peer) + where(peer), ratio(peer, own)]
        out.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def span(values):
    return f"{min(values):.1f} to {max(values):.1f}"


def paragraph(result, torch_result):
    rows = result["rows"]
    layers = sorted({r["layer"] for r in rows})
    fused = {d: ratios(rows, layers, d, "im2win-fused") for d in ("tf32", "bf16")}
    few = [r for d in fused for l, r in fused[d].items() if l in (1, 2, 3, 7)]
    many = [r for d in fused for l, r in fused[d].items() if l not in (1, 2, 3, 4, 7)]
    own = {l: best(rows, l, "im2win", "f32") for l in layers}
    fallback = [best(torch_result["rows"], l, "torch-fallback", "f32")["total_us"] / own[l]["total_us"] for l in layers]
    saved = [100 * own[l]["workspace_bytes"] / whole_batch(rows, l)["workspace_bytes"] for l in layers]
    return (f"Fused im2win on tensor cores is {span(few)} times as fast on the four layers of three channels,\n"
            f"{span([fused[d][4] for d in fused])} on a wide 7x7 layer, and {span(many)} where channels are many; it wins "
            f"{sum(r >= 1 for r in fused['tf32'].values())} of {len(layers)} in tf32 and "
            f"{sum(r >= 1 for r in fused['bf16'].values())} in bf16. Explicit im2win in\nf32 is {mean(fallback):.1f} times as "
            f"fast as PyTorch's fallback (im2col and cuBLAS, image by image) on average and takes\n{min(saved):.0f} to "
            f"{max(saved):.0f} % of the memory of im2col of the whole batch.")


def main():
    with open(readme.result("conv.json"), encoding="utf-8") as f:
        result = json.load(f)
    with open(readme.result("conv_torch.json"), encoding="utf-8") as f:
        torch_result = json.load(f)
    rows = result["rows"]
    layers = sorted({r["layer"] for r in rows})
    plt.rcParams.update({"font.size": 10.5, "svg.fonttype": "path", "svg.hashsalt": "ltn"})
    draw_speed(result, rows, layers, readme.result("conv_speed.svg"))
    draw_memory(result, rows, layers, readme.result("conv_memory.svg"))
    readme.put("conv.json", tables(result, torch_result), "kernels/conv/README.md")
    readme.put("conv.json", paragraph(result, torch_result))


if __name__ == "__main__":
    main()
