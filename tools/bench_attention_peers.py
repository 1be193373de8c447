#!/usr/bin/env python3
"""Times ltn's lightning attention beside its peers on one GPU and writes tools/results/attention.json.

Every implementation gets the same tensors, is captured in a CUDA graph that walks over input sets which together
exceed the L2 cache, and is replayed; the time is the median of the replays. Peers that are not installed are left
out with a line on stderr: fla-core (simple_gla), lightning-attn (its Triton kernel), PyTorch (softmax attention:
cuDNN, flash).

    make build/release/tests/cuda/libattention.so
    tools/bench_attention_peers.py --ltn build/release/tests/cuda/libattention.so -o tools/results/attention.json
"""

import argparse
import ctypes
import datetime
import json
import os
import statistics
import sys
import time

import torch

L2_SPAN = 320 << 20  # bytes of inputs and outputs to walk over
HEAD_DIM = 128


def slopes_of(heads, layer):
    """ALiBi slopes of a power of two of heads, times the first or the last layer's factor."""
    power = 1 << (heads - 1).bit_length()
    factor = 1 + 1e-5 if layer == "first" else 1e-5
    head = torch.tensor([2.0 ** (-8.0 * (i + 1) / power) for i in range(heads)], dtype=torch.float32)
    return (head * factor).cuda()


def reference(q, k, v, slopes):
    """float64, chunk by chunk; q, k, v: [1, n, h, d]. Returns o [n, h, d] and the state [h, d, e]."""
    n, h, d = q.shape[1:]
    chunk = 256
    s = slopes.double()
    i = torch.arange(chunk, device="cuda", dtype=torch.float64)
    back = i[:, None] - i[None, :]
    mask = torch.where(back >= 0, torch.exp(-s[:, None, None] * back.clamp(min=0)), 0.0)  # [h, i, j]
    state = torch.zeros(h, d, d, device="cuda", dtype=torch.float64)
    out = torch.empty(n, h, d, device="cuda", dtype=torch.float64)
    for first in range(0, n, chunk):
        m = min(chunk, n - first)
        x, y, z = (t[0, first : first + m].double().transpose(0, 1) for t in (q, k, v))  # [h, m, d]
        intra = (x @ y.transpose(1, 2) * mask[:, :m, :m]) @ z
        inter = torch.exp(-s[:, None] * (i[:m] + 1))[:, :, None] * (x @ state)
        out[first : first + m] = (intra + inter).transpose(0, 1)
        decay = torch.exp(-s[:, None] * (m - 1 - i[:m]))[:, :, None]
        state = torch.exp(-s * m)[:, None, None] * state + (y * decay).transpose(1, 2) @ z
    return out, state


def relative(x, ref):
    return ((x.double() - ref).norm() / ref.norm()).item()


class Ltn:
    """The kernel under test, through the C interface of tests/cuda/attention.cu."""

    def __init__(self, path, walkers=0, portable=False):
        self.lib = ctypes.CDLL(path)
        self.lib.attention_workspace.restype = ctypes.c_size_t
        self.walkers = walkers
        self.portable = portable

    def fits(self, heads, n):
        return self.walkers <= 1 or (self.walkers * heads <= 128 and n >= 128 * self.walkers)

    def prepare(self, heads, n, slopes):
        self.slopes, self.heads, self.n = slopes, heads, n
        size = self.lib.attention_workspace(heads, HEAD_DIM)
        self.work = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.state = torch.zeros(heads, HEAD_DIM, HEAD_DIM, device="cuda")

    def __call__(self, q, k, v, out=None):
        o = torch.empty_like(q) if out is None else out
        address = [ctypes.c_void_p(t.data_ptr()) for t in (o, q, k, v)]
        rc = self.lib.attention_call(
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), *address,
            self.heads * HEAD_DIM, self.heads, HEAD_DIM, ctypes.c_void_p(self.slopes.data_ptr()),
            ctypes.c_void_p(self.state.data_ptr()), self.n, ctypes.c_void_p(self.work.data_ptr()),
            self.walkers, int(self.portable))
        if rc != 0:
            raise RuntimeError(f"attention_call: error {rc}")
        return o


class SimpleGla:
    def __init__(self, fused):
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla

        self.op = fused_chunk_simple_gla if fused else chunk_simple_gla

    def prepare(self, heads, n, slopes):
        self.g = -slopes

    def __call__(self, q, k, v):
        return self.op(q, k, v, g_gamma=self.g, scale=1.0)[0]


class LightningTriton:
    """[1, h, n, d]"""

    heads_first = True

    def __init__(self):
        from lightning_attn.ops.triton.lightning_attn2 import lightning_attn2

        self.op = lightning_attn2

    def prepare(self, heads, n, slopes):
        self.slopes = slopes.view(heads, 1, 1)

    def __call__(self, q, k, v):
        return self.op(q, k, v, self.slopes)


class Softmax:
    """[1, h, n, d]; another operation, timed because it is what one would use instead."""

    heads_first = True
    other_operation = True

    def __init__(self, backend):
        from torch.nn.attention import SDPBackend

        self.backend = SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else SDPBackend.FLASH_ATTENTION

    def prepare(self, heads, n, slopes):
        pass

    def __call__(self, q, k, v):
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self.backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def copy_speed():
    """Device-to-device copy in GB/s, bytes read plus bytes written."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * a.numel() / min(times) * 1e-6


class DeviceState:
    """Clock, power and throttle reasons, where NVML is at hand."""

    def __init__(self):
        self.driver = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml = pynvml
            self.device = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.driver = pynvml.nvmlSystemGetDriverVersion()
        except Exception as error:
            self.nvml = None
            print(f"no clocks and power: {error}", file=sys.stderr)

    def read(self):
        if self.nvml is None:
            return {}
        return {"sm_mhz": self.nvml.nvmlDeviceGetClockInfo(self.device, self.nvml.NVML_CLOCK_SM),
                "watts": self.nvml.nvmlDeviceGetPowerUsage(self.device) / 1000,
                "throttle": self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.device)}


def compile_part(part, parts):
    """From here on Triton's autotuners try only every parts-th of their variants: for a process that fills the cache
    of compiled kernels beside others."""
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_part(self, *args, **kwargs):
        if not hasattr(self, "all_configs"):
            self.all_configs = self.configs
            self.configs = self.all_configs[part::parts] or self.all_configs[:1]
        return run(self, *args, **kwargs)

    Autotuner.run = run_part


def make_set(heads, n):
    return [torch.randn(1, n, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def make_sets(heads, n):
    size = 4 * n * heads * HEAD_DIM * 2
    count = L2_SPAN // size + 1
    return [make_set(heads, n) for _ in range(count)]


def time_graph(op, sets, seconds):
    """Milliseconds per call of each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in sets[:2]:
            op(*x)  # compiles, tunes, allocates
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = max(len(sets), 4 if len(sets) > 1 else 1)
    keep = []  # outputs of their own, as the inputs
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            keep.append(op(*sets[i % len(sets)]))
    graph.replay()
    torch.cuda.synchronize()
    samples = []
    stop = time.monotonic() + seconds
    while len(samples) < 7 or (time.monotonic() < stop and len(samples) < 50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / calls)
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ltn", required=True, metavar="LIB", help="tests/cuda/attention.cu as a shared library")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where the results go")
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 16, 32, 40])
    parser.add_argument("--rows", type=int, nargs="+",
                        default=[512, 1024, 2048, 4096, 8192, 16384, 65536, 262144, 1 << 20])
    parser.add_argument("--walkers", type=int, nargs="*", default=[], metavar="W",
                        help="time ltn with these numbers of walkers too, not only the one it chooses")
    parser.add_argument("--only", nargs="*", metavar="PART", help="implementations whose name holds one of these")
    parser.add_argument("--part", metavar="I/N", help="only compile, and of the peers' variants only every N-th, from the "
                        "I-th on: N processes at once fill Triton's cache in little time")
    parser.add_argument("--wait", metavar="FILE", help="after compiling everything, wait until FILE exists")
    parser.add_argument("--softmax-rows", type=int, default=65536, metavar="N", help="longest softmax run")
    parser.add_argument("--seconds", type=float, default=0.1, help="replay each graph at least this long")
    parser.add_argument("--budget", type=float, default=400, help="stop starting new rows after this many seconds")
    args = parser.parse_args()

    if args.part:
        compile_part(*(int(x) for x in args.part.split("/")))
    torch.manual_seed(1)
    started = time.monotonic()
    makers = {"ltn": lambda: Ltn(args.ltn), **{f"ltn, W={w}": lambda w=w: Ltn(args.ltn, w) for w in args.walkers},
              "ltn, portable": lambda: Ltn(args.ltn, portable=True),
              "fla chunk_simple_gla": lambda: SimpleGla(False), "fla fused_chunk_simple_gla": lambda: SimpleGla(True),
              "lightning-attn (Triton)": LightningTriton, "softmax, cuDNN": lambda: Softmax("cudnn"),
              "softmax, flash": lambda: Softmax("flash")}
    ops = {}
    for name, make in makers.items():
        if args.only and not any(part in name for part in args.only):
            continue
        try:
            ops[name] = make()
        except Exception as error:  # a peer that is missing or broken must not stop the others
            print(f"{name}: left out: {error}", file=sys.stderr)

    for name in list(ops):  # compile and tune first, on small inputs
        try:
            for heads in args.heads:
                ops[name].prepare(heads, 512, slopes_of(heads, "last"))
                x = make_set(heads, 512)
                if getattr(ops[name], "heads_first", False):
                    x = [t.transpose(1, 2).contiguous() for t in x]
                if not (isinstance(ops[name], Ltn) and not ops[name].fits(heads, 512)):
                    ops[name](*x)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name}: left out: {str(error).splitlines()[0]}", file=sys.stderr)
            del ops[name]
    print(f"compiled after {time.monotonic() - started:.1f} s", flush=True)
    if args.part:
        return
    while args.wait and not os.path.exists(args.wait):
        time.sleep(0.05)

    copy = copy_speed()
    state = DeviceState()
    result = {"device": torch.cuda.get_device_name(), "driver": state.driver,
              "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
              "commit": os.environ.get("LTN_COMMIT"), "command": " ".join(sys.argv), "read_gbps": None,
              "copy_gbps": round(copy, 1), "gemm_tflops": None, "torch": torch.__version__, "rows": []}

    def save():
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")

    def errors():
        """Relative L2 error of o (and of ltn's state) against float64."""
        found = {}
        for heads in args.heads[:1]:
            for n in (2048, 65536):
                for layer in ("first", "last"):
                    slopes = slopes_of(heads, layer)
                    q, k, v = (torch.randn(1, n, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
                               for _ in range(3))
                    ref, ref_state = reference(q, k, v, slopes)
                    for name, op in ops.items():
                        if getattr(op, "other_operation", False) or getattr(op, "walkers", 0):
                            continue
                        try:
                            op.prepare(heads, n, slopes)
                            if getattr(op, "heads_first", False):
                                o = op(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)
                            else:
                                o = op(q, k, v)
                            row = {"rel_l2": relative(o[0], ref)}
                            if isinstance(op, Ltn):
                                row["state_rel_l2"] = relative(op.state, ref_state)
                            found[name, heads, n, layer] = row
                            print(f"{name:28} h={heads} n={n} {layer:5} {row}")
                        except Exception as error:
                            print(f"{name}: {error}", file=sys.stderr)
        return found

    error_rows = errors()
    for (name, heads, n, layer), row in error_rows.items():
        result["rows"].append({"impl": name, "h": heads, "d": HEAD_DIM, "n": n, "dtype": "bf16", "layer": layer,
                               "ms": None, "share": None, **row})
    save()

    for n in args.rows:
        for heads in args.heads:
            floor = 8 * HEAD_DIM * heads * n / copy * 1e-6
            slopes = slopes_of(heads, "last")
            sets = make_sets(heads, n)
            line = f"h={heads:<3} n={n:<8} floor {floor:.4f}"
            for name, op in ops.items():
                if time.monotonic() - started > args.budget:
                    print("out of time", file=sys.stderr)
                    save()
                    return
                if getattr(op, "other_operation", False) and n > args.softmax_rows:
                    continue
                if isinstance(op, Ltn) and not op.fits(heads, n):
                    continue
                inputs = sets
                if getattr(op, "heads_first", False):
                    if n > 262144:
                        continue
                    inputs = [[x.transpose(1, 2).contiguous() for x in s] for s in sets]
                try:
                    op.prepare(heads, n, slopes)
                    samples = time_graph(op, inputs, args.seconds)
                    ms = statistics.median(samples)
                except Exception as error:
                    print(f"{name} h={heads} n={n}: {str(error).splitlines()[0]}", file=sys.stderr)
                    torch.cuda.synchronize()
                    continue
                row = {"impl": name, "h": heads, "d": HEAD_DIM, "n": n, "dtype": "bf16", "layer": "last",
                       "ms": round(ms, 5), "share": round(floor / ms, 4),
                       "rel_l2": None,
                       "gbps": round(8e-6 * HEAD_DIM * heads * n / ms, 1), **state.read(),
                       "samples_ms": [round(x, 5) for x in samples]}
                result["rows"].append(row)
                line += f" | {name} {ms:.4f} ({100 * floor / ms:.0f}%)"
                del inputs
            del sets
            torch.cuda.empty_cache()
            print(line, flush=True)
            save()


if __name__ == "__main__":
    main()
