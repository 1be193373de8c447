#!/usr/bin/env python3
"""Times PyTorch (eager, CPU, f32) on the same .ltn model as `ltn-bench`: the peer of the CPU backend.

    tools/bench_torch.py MODEL.ltn [-t THREADS] [-l 512,2048] [-n 64] [-r 5]

v1/v2 models with SimpleRMSNorm and without biases, in any type but q4; all weights are made f32 first. Prefill is the
intra/inter block form with blocks of 256, decode the recurrence, both with the decay as the engine applies it; the
logits of both are compared with each other first. Prints one JSON object with the row keys of `ltn-bench --format json`. Needs torch, numpy and safetensors.
"""
import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from safetensors import safe_open

BLOCK = 256


class Model:
    def __init__(self, path):
        with safe_open(path, "pt") as f:
            self.config = c = json.loads(f.metadata()["config"])
            if f.metadata().get("dtype") == "q4":
                raise SystemExit(f"{path}: expected any type but q4")
            w = {k: f.get_tensor(k).float() for k in f.keys() if k != "tokenizer"}
        for k in [k for k in w if k.endswith(".scales")]:  # of quantised matrices: one for 32 columns, or for a row
            of, scales = k.removesuffix(".scales"), w.pop(k)
            w[of] *= scales.repeat_interleave(32, 1)[:, :w[of].shape[1]] if scales.shape[1] > 1 else scales
        if c["gate_dim"] or c["bias"] or c["norm_type"] != "simplermsnorm" or c["linear_act_fun"] != "swish":
            raise SystemExit("only v1/v2 models with SimpleRMSNorm, swish and no biases")
        self.D, self.h, self.L = c["decoder_embed_dim"], c["decoder_attention_heads"], c["decoder_layers"]
        self.e = c["hidden_dim"] // self.h
        self.embed = w["model.embed_tokens.weight"]
        self.head = w.get("lm_head.weight", self.embed)
        self.scale = 1.0 if c["no_scale_embedding"] else math.sqrt(self.D)
        self.layers = []
        for l in range(self.L):
            p = f"model.layers.{l}."
            names = ("token_mixer.qkvu_proj", "token_mixer.out_proj", "channel_mixer.l1", "channel_mixer.l2",
                     "channel_mixer.l3")
            mats = [w[p + n + ".weight"] for n in names]
            s = self.slopes(l)
            i = torch.arange(BLOCK, dtype=torch.float64)
            dist = i[:, None] - i
            decay = (torch.where(dist >= 0, torch.exp(-s * dist.clamp(min=0)), 0).float(),
                     torch.exp(-s * (i[:, None] + 1)).float(), torch.exp(-s * (BLOCK - 1 - i)[:, None]).float(),
                     -torch.expm1(-s * BLOCK).float(), -torch.expm1(-s).float())
            self.layers.append((mats, decay, w.get(p + "token_mixer.lrpe.theta")))

    def slopes(self, l):
        p = 1 << (self.h.bit_length() - 1)
        s = [2 ** (-8 * (i + 1) / p) if i < p else 2 ** (-4 * (2 * (i - p) + 1) / p) for i in range(self.h)]
        factor = torch.tensor(1 - l / (self.L - 1) + 1e-5, dtype=torch.float32)
        return (torch.tensor(s, dtype=torch.float32) * factor).double().view(-1, 1, 1)

    def state(self):
        return [torch.zeros(self.h, self.e * (2 if t is not None else 1), self.e) for _, _, t in self.layers]

    @staticmethod
    def norm(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def forward(self, ids, S, pos):
        """ids [n], S updated in place -> logits of the last token."""
        n = len(ids)
        x = self.scale * self.embed[ids]
        for l, ((wqkvu, wo, w1, w2, w3), (intra, query, key, lost, lost1), theta) in enumerate(self.layers):
            q, k, v, u = F.linear(self.norm(x), wqkvu).chunk(4, -1)
            q, k, v = (t.view(n, self.h, self.e).transpose(0, 1) for t in (F.silu(q), F.silu(k), v))
            if theta is not None:
                a = (theta.double() * torch.arange(pos, pos + n, dtype=torch.float64).view(1, -1, 1))
                c, s = torch.cos(a).float(), torch.sin(a).float()
                q, k = torch.cat([q * c, q * s], -1), torch.cat([k * c, k * s], -1)
            if n == 1:
                S[l] += k.transpose(1, 2) @ v - lost1 * S[l]
                o = q @ S[l]
            else:
                out = []
                for b in range(0, n, BLOCK):  # n is a multiple of BLOCK
                    qb, kb, vb = (t[:, b:b + BLOCK] for t in (q, k, v))
                    out.append(((qb @ kb.transpose(1, 2)) * intra) @ vb + query * (qb @ S[l]))
                    S[l] += (kb * key).transpose(1, 2) @ vb - lost * S[l]
                o = torch.cat(out, 1)
            x = x + F.linear(u * self.norm(o.transpose(0, 1).reshape(n, -1)), wo)
            y = self.norm(x)
            x = x + F.linear(F.linear(y, w1) * F.linear(y, w2), w3)
        return F.linear(self.norm(x[-1:]), self.head)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("-t", type=int, default=0)
    ap.add_argument("-l", default="512,2048")
    ap.add_argument("-n", type=int, default=64)
    ap.add_argument("-r", type=int, default=5)
    args = ap.parse_args()
    if args.t:
        torch.set_num_threads(args.t)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    m = Model(args.model)
    ids = torch.randint(0, len(m.embed), (BLOCK,))
    a, S = m.forward(ids, m.state(), 0), m.state()
    for i, t in enumerate(ids):
        b = m.forward(t.view(1), S, i)
    assert torch.allclose(a, b, atol=1e-3 * float(a.abs().max())), "prefill and decode disagree"

    rows = []
    for length in map(int, args.l.split(",")):
        if length % BLOCK:
            raise SystemExit(f"{length} is not a multiple of {BLOCK}")
        ids = torch.randint(0, len(m.embed), (length,))
        for test, tokens in (("prefill", length), ("decode", args.n)):
            samples = []
            for repetition in range(args.r + 1):  # the first does not count
                S = m.state()
                if test == "decode":
                    m.forward(ids, S, 0)
                begin = time.perf_counter()
                if test == "prefill":
                    m.forward(ids, S, 0)
                else:
                    for i in range(args.n):
                        m.forward(ids[i % length].view(1), S, length + i)
                if repetition:
                    samples.append(tokens / (time.perf_counter() - begin))
            rows.append({"test": test, "length": length, "tokens": tokens, "tok_s": statistics.mean(samples),
                         "median": statistics.median(samples), "min": min(samples), "max": max(samples),
                         "samples": samples})
    print(json.dumps({"backend": f"PyTorch {torch.__version__}, f32, {torch.get_num_threads()} threads", "rows": rows},
                     indent=1))


if __name__ == "__main__":
    main()
