#!/usr/bin/env python3
"""Train a small TransNormerLLM on one GPU and export it as a Hugging Face directory.

    train.py --train train.npy --val val.txt --tokenizer tokenizer.model --out DIR --minutes 9

Writes DIR/stable.pt (all that is needed to go on, saved before the learning rate falls), DIR/hf/ (the model) and
DIR/log.json (curves and final figures). README.md beside this file has the whole recipe.
"""
import argparse
import json
import math
import os
import time

import numpy as np
import sentencepiece
import torch

import data
import measure
from model import TNL
from sample import generate

START = time.time()


class Streams:
    """B endless streams over the documents, shuffled anew each epoch. Stream b starts anew (from an empty state) before
    a step with a probability of its own, so that mean lengths lie evenly, on a log scale, between T and 1000 T tokens.
    A new start goes on where the text is, or skips to the next document, with its end token before it or without."""

    def __init__(self, ids, eot, B, T, seed, device):
        ends = np.flatnonzero(ids == eot) + 1
        ids = np.concatenate([ids[ends[-1]:], ids[:ends[-1]]])  # the end of the file leads the first document
        ends = np.flatnonzero(ids == eot) + 1
        self.docs = np.split(ids, ends[:-1])
        self.eot, self.B, self.T, self.device = eot, B, T, device
        self.n = (len(ids) - 1) // B  # tokens of a stream per epoch
        self.p_reset = 1000.0 ** (-np.arange(B) / max(1, B - 1))
        self.rng = np.random.default_rng(seed)
        self.epoch, self.step = 0, 0

    def _shuffle(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.docs))
        ids = np.concatenate([self.docs[i] for i in order])
        self.ends = np.flatnonzero(ids == self.eot)
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(self.device)
        self.window = torch.arange(self.T + 1, device=self.device)

    def next(self):
        """-> ids [B,T+1], keep [B] (0.0 for streams that start anew)."""
        if self.step % (self.n // self.T) == 0:
            self.epoch += 1
            self._shuffle()
            self.first = np.arange(self.B) * self.n
            self.at = self.first.copy()
        fresh = self.rng.random(self.B) < self.p_reset
        for b in np.flatnonzero(fresh):
            kind = self.rng.integers(4)
            if kind >= 2:
                after = np.searchsorted(self.ends, self.at[b])
                if after < len(self.ends):
                    self.at[b] = self.ends[after] + (0 if kind == 2 else 2)  # 2: past the end token and its newline
        past = self.at + self.T + 1 > self.first + self.n
        self.at[past] = self.first[past]
        ids = self.ids[torch.from_numpy(self.at).to(self.device)[:, None] + self.window].long()
        self.at += self.T
        self.step += 1
        return ids, torch.from_numpy(~fresh).float().to(self.device)

    def state_dict(self):
        return dict(epoch=self.epoch, step=self.step, at=self.at, rng=self.rng.bit_generator.state)

    def load_state_dict(self, d):
        self.epoch, self.step, self.at = d["epoch"], d["step"], d["at"]
        self.rng.bit_generator.state = d["rng"]
        self.first = np.arange(self.B) * self.n
        self._shuffle()


def orthogonal(g):
    """g [N,a,b] -> about the nearest matrices with all singular values 1, by five Newton-Schulz steps in bf16."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        y = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(y, y, y, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised per matrix (K. Jordan, 2024), scaled so that an update has the size of an AdamW update
    (arXiv 2502.16982). Parameters are [L,k,a,b]."""

    def __init__(self, params, weight_decay, momentum=0.95):
        self.params, self.weight_decay, self.momentum = params, weight_decay, momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        for p, buf in zip(self.params, self.buffers):
            buf.lerp_(p.grad, 1 - self.momentum)
            update = orthogonal(p.grad.lerp(buf, self.momentum).flatten(0, 1)).view_as(p)
            p.mul_(1 - lr * self.weight_decay)
            p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape[-2:])))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--train", required=True, nargs="+", help="ids, .npy (data.py encode)")
    ap.add_argument("--val", required=True, help="text for measuring, never trained on")
    ap.add_argument("--tokenizer", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--width", type=int, default=384)
    ap.add_argument("--layers", type=int, default=9)
    ap.add_argument("--heads", type=int, default=6)
    ap.add_argument("--glu", type=int, default=960)
    ap.add_argument("--streams", type=int, default=96)
    ap.add_argument("--chunk", type=int, default=1024, help="tokens of a stream per step")
    ap.add_argument("--block", type=int, default=128, help="tokens per attention block")
    ap.add_argument("--lr", type=float, default=5e-3, help="matrices (Muon)")
    ap.add_argument("--lr-embedding", type=float, default=8e-3, help="embedding (AdamW)")
    ap.add_argument("--lr-theta", type=float, default=3e-4, help="LRPE frequencies (AdamW)")
    ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--dropout", type=float, default=0.05)
    ap.add_argument("--z-loss", type=float, default=1e-4, help="weight of the squared log-sum-exp of the logits")
    ap.add_argument("--warmup", type=int, default=200, help="steps")
    ap.add_argument("--steps", type=int, default=10**9, help="all steps, those of the decay included")
    ap.add_argument("--decay", type=float, default=0.3, help="last part of the training, with a falling rate")
    ap.add_argument("--minutes", type=float, default=1e9, help="stop training this long after the start")
    ap.add_argument("--resume", help="a stable.pt to go on from")
    ap.add_argument("--eval-every", type=int, default=500, help="steps")
    ap.add_argument("--orders", type=int, default=128, help="random orders of the documents that are measured")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--no-compile", action="store_true")
    a = ap.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(a.seed)
    os.makedirs(a.out, exist_ok=True)
    sp = sentencepiece.SentencePieceProcessor(model_file=a.tokenizer)
    eot = sp.piece_to_id(data.EOT)
    val_text = data.read_text(a.val)
    val_ids = data.encode(a.tokenizer, val_text)
    train_ids = np.concatenate([np.load(f) for f in a.train])

    model = TNL(sp.vocab_size(), a.width, a.layers, a.heads, a.glu).to(device)
    n_params = sum(p.numel() for p in model.parameters())
    if not a.no_compile:
        model.compile()
    muon = Muon([model.mixer, model.glu], a.weight_decay)
    adam = torch.optim.AdamW([{"params": [model.embedding], "peak": a.lr_embedding, "weight_decay": a.weight_decay},
                              {"params": [model.theta], "peak": a.lr_theta, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), fused=device == "cuda")
    streams = Streams(train_ids, eot, a.streams, a.chunk, a.seed, device)
    state = model.new_state(a.streams)
    log = {"args": [vars(a)], "params": n_params, "train_tokens": len(train_ids), "seconds": 0.0,
           "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "train": [], "eval": []}
    if a.resume:
        c = torch.load(a.resume, map_location=device, weights_only=False)
        model.load_state_dict(c["model"])
        adam.load_state_dict(c["adam"])
        muon.buffers, state, log = c["muon"], c["state"], dict(c["log"], args=c["log"]["args"] + [vars(a)])
        streams.load_state_dict(c["streams"])
        for group, peak in zip(adam.param_groups, (a.lr_embedding, a.lr_theta)):
            group["peak"] = peak
        adam.param_groups[0]["weight_decay"] = a.weight_decay

    def save_stable():
        torch.save({"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.buffers, "state": state,
                    "streams": streams.state_dict(), "log": log}, os.path.join(a.out, "stable.pt"))

    # Validation and as much training text, each as 16 parallel streams: quick, to watch the two part.
    def quick_rows(ids):
        n = len(ids) // 16
        return torch.from_numpy(ids[:16 * n].reshape(16, n).astype(np.int64)).to(device)

    val_rows, seen_rows = quick_rows(val_ids), quick_rows(train_ids[len(train_ids) // 2:][:len(val_ids)])

    def quick_eval():
        model.eval()
        nats, seen = (measure.stream_nll(model, r, torch.bfloat16).mean().item() for r in (val_rows, seen_rows))
        model.train()
        bpb = nats / math.log(2) * len(val_ids) / len(val_text.encode())
        log["eval"].append({"step": streams.step, "seconds": round(seconds(), 1), "val": nats, "seen": seen})
        print(f"step {streams.step} epoch {streams.epoch} {seconds():.0f} s: val {nats:.4f} nats/token = "
              f"{bpb:.4f} bits/byte (short streams), training text {seen:.4f}", flush=True)

    seconds_before = log["seconds"]

    def seconds():
        return seconds_before + time.time() - START

    print(f"{n_params} parameters, {len(train_ids)} training tokens, {time.time() - START:.1f} s to set up", flush=True)
    first_step, decay_from, decay_steps, clock = streams.step, None, 0, None
    total, count = torch.zeros((), device=device), 0
    deadline = START + 60 * a.minutes
    while True:
        step = streams.step
        # The rate falls over the last part of the steps, or of the time, whichever ends first.
        if decay_from is None:
            done = step - first_step
            if clock is not None and done % 20 == 0:
                if device == "cuda":
                    torch.cuda.synchronize()
                per_step = (time.time() - clock[1]) / max(1, done - clock[0])
                steps_left = (deadline - time.time()) / per_step
            else:
                steps_left = float("inf")
            whole = min(step + steps_left, a.steps)
            if whole - step <= a.decay * whole:
                save_stable()
                decay_from, decay_steps = step, max(1, int(whole - step))
                print(f"step {step}: the rate falls over {decay_steps} steps", flush=True)
            if done == 20:
                clock = (done, time.time())
        if decay_from is not None and step - decay_from >= decay_steps:
            break
        f = min(1.0, (step + 1) / a.warmup)
        if decay_from is not None:
            f *= 1 - (step - decay_from) / decay_steps
        for group in adam.param_groups:
            group["lr"] = group["peak"] * f

        ids, keep = streams.next()
        x, state = model.hidden(ids[:, :-1], state, keep, torch.bfloat16, a.block, a.dropout)
        nll, lse = model.loss(x, ids[:, 1:], torch.bfloat16)
        loss = nll.mean()
        (loss + a.z_loss * lse.square().mean()).backward()
        muon.step(a.lr * f)
        adam.step()
        model.zero_grad(set_to_none=True)
        total += loss.detach()
        count += 1
        if streams.step % 50 == 0:
            value = total.item() / count
            if not math.isfinite(value):
                raise SystemExit(f"step {streams.step}: loss is {value}")
            log["train"].append({"step": streams.step, "seconds": round(seconds(), 1), "loss": round(value, 4),
                                 "rate": round(f, 4)})
            total, count = torch.zeros((), device=device), 0
        if streams.step % a.eval_every == 0:
            quick_eval()
    if streams.step % a.eval_every:
        quick_eval()
    if device == "cuda":
        torch.cuda.synchronize()
    log["seconds"], log["steps"], log["epochs"] = seconds(), streams.step, streams.epoch
    log["tokens"] = streams.step * a.streams * a.chunk
    rate = (streams.step - first_step - clock[0]) * a.streams * a.chunk / (time.time() - clock[1]) if clock else 0
    print(f"{log['tokens']} tokens in {log['seconds']:.0f} s; {rate:.0f} tokens/s after compiling", flush=True)

    hf = os.path.join(a.out, "hf")
    model.save_hf(hf, a.tokenizer, eot)
    model = TNL.load_hf(hf, device)  # all figures are those of the exported weights
    log.update(measure.figures(model, val_ids, len(val_text.encode()), eot, a.orders))
    prompts = ["Once upon a time", "The old house at the end of the lane"]
    log["samples"] = []
    for prompt in prompts:
        new = torch.stack(list(generate(model, sp.encode(prompt), 200, 0.8, 0.95, copies=2)), 1)
        log["samples"] += [prompt + sp.decode(row) for row in new.tolist()]
    with open(os.path.join(a.out, "log.json"), "w") as f:
        json.dump(log, f, indent=1)
        f.write("\n")
    print(f"{log['bits_per_byte']:.4f} bits/byte on {a.val} as one stream")
    for r in log["by_position"]:
        print(f"  positions {r['from']:>6} to {r['to']:>6}: {r['nats']:.4f} +- {r['stderr']:.4f} nats/token")
    print("\n---\n".join(log["samples"]))
    print(f"{time.time() - START:.0f} s in all")


if __name__ == "__main__":
    main()
