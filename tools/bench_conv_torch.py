#!/usr/bin/env python3
"""Times PyTorch's convolutions in the twelve layers of `ltn-bench conv`: the peer of its peers.

    tools/bench_conv_torch.py [-n IMAGES] [-l 1,2] [-r 15] [--dtypes f32,tf32,bf16] [-o RESULT.json]

A row is {layer, impl, dtype, layout, total_us, rel_l2, samples}: impl is torch-fallback (cuDNN switched off: im2col and
cuBLAS image by image, f32 in NCHW alone) or torch-cudnn (torch.backends.cudnn.benchmark on, so that cuDNN's algorithms
are tried first, untimed). Times are medians of event times in microseconds, caches flushed before each run as
`ltn-bench conv` does; rel_l2 is that of the first image against f64. Needs torch and a GPU.
"""
import argparse
import datetime
import json
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F

LAYERS = [  # ci, hi = wi, co, hf = wf, stride
    (3, 227, 96, 11, 4), (3, 231, 96, 11, 4), (3, 227, 64, 7, 2), (64, 224, 64, 7, 2), (96, 24, 256, 5, 1),
    (256, 12, 512, 3, 1), (3, 224, 64, 3, 1), (64, 112, 128, 3, 1), (64, 56, 64, 3, 1), (128, 28, 128, 3, 1),
    (256, 14, 256, 3, 1), (512, 7, 512, 3, 1)]
CASES = [("torch-fallback", "f32", "NCHW"), ("torch-cudnn", "f32", "NCHW"), ("torch-cudnn", "f32", "NHWC"),
         ("torch-cudnn", "tf32", "NCHW"), ("torch-cudnn", "tf32", "NHWC"),
         ("torch-cudnn", "bf16", "NCHW"), ("torch-cudnn", "bf16", "NHWC")]


def measure(layer, impl, dtype, layout, images, repetitions, seconds, flush):
    ci, side, co, filter_side, stride = LAYERS[layer - 1]
    torch.manual_seed(layer)
    type_ = torch.bfloat16 if dtype == "bf16" else torch.float32
    order = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    x = torch.randn(images, ci, side, side, device="cuda", dtype=type_).contiguous(memory_format=order)
    w = torch.randn(co, ci, filter_side, filter_side, device="cuda") / (ci * filter_side * filter_side) ** 0.5
    w = w.to(type_).contiguous(memory_format=order)
    torch.backends.cudnn.enabled = False
    exact = F.conv2d(x[:1].double(), w.double(), stride=stride)
    torch.backends.cudnn.enabled = impl == "torch-cudnn"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"

    y = F.conv2d(x, w, stride=stride)
    rel = ((y[:1].double() - exact).norm() / exact.norm()).item()
    del y, exact
    samples, spent = [], 0.0
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for i in range(1 + repetitions):
        flush.max()
        begin.record()
        y = F.conv2d(x, w, stride=stride)
        end.record()
        end.synchronize()
        del y
        if i > 0:
            samples.append(1e3 * begin.elapsed_time(end))
            spent += samples[-1] / 1e6
            if len(samples) >= 3 and spent > seconds:
                break
    return {"layer": layer, "impl": impl, "dtype": dtype, "layout": layout, "total_us": statistics.median(samples),
            "rel_l2": rel, "samples": samples}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-n", "--images", type=int, default=128)
    p.add_argument("-l", "--layers", default=",".join(str(i + 1) for i in range(len(LAYERS))))
    p.add_argument("-r", type=int, default=15, help="repetitions")
    p.add_argument("--seconds", type=float, default=0.2, help="time after which there are no more repetitions than 3")
    p.add_argument("--dtypes", default="f32")
    p.add_argument("--commit", default="")
    p.add_argument("-o", default="-", help="the result; -: standard output")
    a = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_conv_torch.py: no GPU that PyTorch can use")

    flush = torch.zeros(64 << 20, device="cuda")
    rows = []
    for layer in [int(l) for l in a.layers.split(",")]:
        for impl, dtype, layout in CASES:
            if dtype in a.dtypes.split(","):
                rows.append(measure(layer, impl, dtype, layout, a.images, a.r, a.seconds, flush))
                print("{layer:3} {impl:15} {dtype} {layout} {total_us:10.1f} {rel_l2:.2g}".format(**rows[-1]), file=sys.stderr)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                            capture_output=True).stdout.split("\n")[0]
    result = {"device": torch.cuda.get_device_name(), "driver": driver,
              "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": a.commit,
              "command": " ".join(sys.argv),
              "libraries": f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, CUDA {torch.version.cuda}",
              "images": a.images, "rows": rows}
    text = json.dumps(result, indent=1)
    if a.o == "-":
        print(text)
    else:
        with open(a.o, "w") as f:
            f.write(text + "\n")


if __name__ == "__main__":
    main()
