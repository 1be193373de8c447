#!/usr/bin/env python3
"""Times how fast ltn and PyTorch models read, on one GPU in one run, and writes tools/results/prefill.json.

    tools/bench_prefill.py --bench ./ltn-bench -o tools/results/prefill.json

ltn: `ltn-bench prefill` for each shape, exactly and in fp8 (the rows' "prefill"), and a long text beside short ones. The
peers have the same shapes, random weights, bf16 products by cuBLAS, and read from an empty state up to the last
token's logits, all of it captured in a CUDA graph. "PyTorch + fla": flash-linear-attention's `chunk_simple_gla`, what
lies between the products fused by torch.compile. "PyTorch + lightning-attn": the Triton kernel of the published
models' own code, and the rest as that code has it, operation by operation. Needs torch, and for the peers fla-core and
lightning-attn; where one is missing, its peer is left out with a line on stderr.
"""
import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time

# as in model/config.c: layers, width, heads, width of the channel mixer
SHAPES = {"385m": (24, 1024, 8, 2816), "1b": (16, 2048, 16, 5632), "7b": (30, 4096, 32, 11008)}
VOCAB, HEAD_DIM = 64000, 128


def fla():
    """q, k, v [1, n, heads, 128] -> [1, n, heads, 128]"""
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, slopes: chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0)[0]


def lightning():
    """The same; heads lie outside for this kernel."""
    from lightning_attn.ops.triton.lightning_attn2 import lightning_attn2

    def attend(q, k, v, slopes):
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        return lightning_attn2(q, k, v, slopes.view(-1, 1, 1)).transpose(1, 2)

    return attend


PEERS = {"PyTorch + fla": (fla, True), "PyTorch + lightning-attn": (lightning, False)}  # and whether compiled


def peer(name, shape):
    """A function of ids [n] on the GPU that returns the last token's logits."""
    import torch
    import torch.nn.functional as F

    layers, width, heads, glu = SHAPES[shape]
    attention, compiled = PEERS[name]
    attend = attention()
    fuse = functools.partial(torch.compile, dynamic=False) if compiled else lambda f: f

    def weight(rows, cols):
        return 0.02 * torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)

    embed = weight(VOCAB, width)
    mats = [[weight(4 * width, width), weight(width, width), weight(2 * glu, width), weight(width, glu)]
            for _ in range(layers)]
    head_slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)], device="cuda")
    slopes = [head_slopes * (1 - l / (layers - 1) + 1e-5) for l in range(layers)]
    theta = 10000.0 ** (-2 * torch.arange(width, device="cuda", dtype=torch.float64) / width).view(heads, HEAD_DIM)

    def norm(x):
        x = x.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()

    @fuse
    def before(x, w):
        q, k, v, u = F.linear(norm(x), w).chunk(4, -1)
        q, k, v = (t.reshape(1, -1, heads, HEAD_DIM) for t in (F.silu(q), F.silu(k), v))
        return q, k, v, u

    @fuse
    def turn(q, k, by):
        return q * by, k * by

    @fuse
    def after(x, o, u, wo, w12, w3):
        x = x + F.linear(u * norm(o), wo)
        a, b = F.linear(norm(x), w12).chunk(2, -1)
        return x + F.linear(a * b, w3)

    def forward(ids, cos, sin):
        x = embed[ids].float() * width ** 0.5
        for l, (wqkvu, wo, w12, w3) in enumerate(mats):
            q, k, v, u = before(x, wqkvu)
            if l == 0:  # LRPE: keys twice as wide are the sum of two attentions
                o = attend(*turn(q, k, cos), v, slopes[l]) + attend(*turn(q, k, sin), v, slopes[l])
            else:
                o = attend(q, k, v, slopes[l])
            x = after(x, o.reshape(-1, width), u, wo, w12, w3)
        return F.linear(norm(x[-1:]), embed).float()

    def angles(n):
        a = torch.arange(n, device="cuda", dtype=torch.float64)[:, None, None] * theta
        return torch.cos(a).bfloat16()[None], torch.sin(a).bfloat16()[None]

    return forward, angles


def time_peer(name, shape, n, seconds):
    """Tokens/s of each replay."""
    import torch

    forward, angles = peer(name, shape)
    ids = torch.randint(VOCAB, (n,), device="cuda")
    cos, sin = angles(n)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            forward(ids, cos, sin)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            forward(ids, cos, sin)
        graph.replay()
        stream.synchronize()
        samples, begin = [], time.monotonic()
        while len(samples) < 3 or time.monotonic() - begin < seconds:
            start = time.monotonic()
            graph.replay()
            stream.synchronize()
            samples.append(n / (time.monotonic() - start))
    return samples


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--bench", default="./ltn-bench", metavar="PROGRAM")
    ap.add_argument("-o", "--output", default="tools/results/prefill.json", metavar="FILE")
    ap.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    ap.add_argument("-l", "--lengths", default="32768", help="of ltn, with commas between")
    ap.add_argument("--seconds", type=float, default=3, help="of each of ltn's passes and products at these")
    ap.add_argument("--brief-lengths", default="2048,8192", help="of ltn, measured more briefly")
    ap.add_argument("--long", default="1048576", help="of ltn, in slices beside texts of --loop; for --long-shapes")
    ap.add_argument("--long-shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    ap.add_argument("--loop", default="8192", help="tokens of these short texts")
    ap.add_argument("--fp8-lengths", default="32768", help="of ltn in fp8, briefly")
    ap.add_argument("--brief", type=float, default=0.5, help="seconds of these, and of the peer")
    ap.add_argument("--peer-lengths", type=int, nargs="*", default=[32768])
    ap.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    ap.add_argument("--compile", action="store_true", help="time nothing and write nothing: run each peer once, which "
                    "fills the caches of compiled kernels")
    args = ap.parse_args()

    def write():
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump(result, f, indent=1)
            f.write("\n")

    def peers():
        """(shape, n, name, samples) of each that runs."""
        for shape in args.shapes:
            for n in args.peer_lengths:
                for name in args.peers:
                    try:
                        yield shape, n, name, time_peer(name, shape, n, 0 if args.compile else args.brief)
                    except Exception as error:  # a peer that is missing or broken must not stop the others
                        reason = (str(error).splitlines() or [type(error).__name__])[0]
                        print(f"{name} {shape} {n}: left out: {reason}", file=sys.stderr)
                    gc.collect()  # its weights and graph
                    if "torch" in sys.modules:
                        sys.modules["torch"].cuda.empty_cache()

    if args.compile:
        for shape, n, name, _ in peers():
            print(f"{name} {shape} {n}: compiled", flush=True)
        return

    result = None
    for shape in args.shapes:
        long = args.long if shape in args.long_shapes else ""
        for prefill, lengths, seconds, loop in (("exact", args.lengths, args.seconds, "0"),
                                                ("exact", args.brief_lengths, args.brief, "0"),
                                                ("exact", long, args.brief, args.loop),
                                                ("fp8", args.fp8_lengths, args.brief, "0")):
            if not lengths:
                continue
            run = subprocess.run([args.bench, "prefill", "--shape", shape, "-l", lengths, "--prefill", prefill,
                                  "--seconds", str(seconds), "--loop", loop, "--device", "cuda", "--format", "json"],
                                 stdout=subprocess.PIPE, check=True)
            one = json.loads(run.stdout)
            if result is None:
                result = one
                result["command"] = " ".join(["tools/bench_prefill.py", *sys.argv[1:]])
            else:
                result["rows"] += one["rows"]
            if prefill == "exact" and lengths == args.lengths:
                result["gemm_tflops"] = one["gemm_tflops"]
            for row in one["rows"]:
                print(f"{row['impl']:8} {prefill:7} {shape:5} {row['n']:8} {row['tok_s']:10.0f} tok/s, "
                      f"{100 * row['share']:.1f} % of the products alone"
                      + (f", {row['loop_n']} again and again {row['loop_tok_s']:.0f}" if "loop_n" in row else ""),
                      flush=True)
            write()
    for shape, n, name, samples in peers():
        speed = statistics.median(samples)
        bare = [r for r in result["rows"] if r["impl"] == "ltn" and r["model"] == shape and r["n"] == n
                and r["prefill"] == "exact"]
        result["rows"].append({"impl": name, "model": shape, "dtype": "bf16", "n": n, "tok_s": speed,
                               "share": speed / bare[0]["gemm_tok_s"] if bare else None, "samples": samples})
        print(f"{name} {shape} {n:8} {speed:10.0f} tok/s", flush=True)
        write()


if __name__ == "__main__":
    main()
