#!/usr/bin/env python3
"""What a trained model is worth on a text it has not seen.

    measure.py DIR VAL.txt [--orders N]      figures of a Hugging Face directory, JSON on standard output

Three things are measured:
  bits_per_byte  the file as one unbroken stream from an empty state: nats of every token but the first, over ln 2, over
                 all bytes of the file
  by_position    nats per token by position in the stream, over random orders of the file's documents. The texts at two
                 positions differ, so the standard error over the orders stands beside each mean.
  same_text      what position alone does: the same tokens of the same documents, once with the document at the start of
                 a stream (tokens 1,000 to 2,000 of a document then lie at positions 1,000 to 2,000), once with it deep
                 in a stream of others. `difference` is deep minus start, weighted by tokens; negative is better.
"""
import argparse
import json
import math
import os
import sys

import numpy as np
import sentencepiece
import torch

import data
from model import TNL

POSITIONS = [1, 256, 1000, 2000, 5000, 10000, 50000, 100000, 200000]
PARTS = [(1, 256), (256, 1000), (1000, 2000)]  # tokens of a document, for same_text
STARTS = [2000, 10000, 50000, 100000, 200000]  # where in the long stream the document starts


@torch.no_grad()
def stream_nll(model, rows, dtype, T=1024):
    """rows int64 [R,n] of ids, R streams from an empty state -> f32 [R,n-1], nats of every token but the first."""
    R, n = rows.shape
    state, out = model.new_state(R), []
    for a in range(0, n - 1, T):
        ids = rows[:, a:a + T + 1]
        m = ids.shape[1] - 1
        ids = torch.nn.functional.pad(ids, (0, T - m))
        x, state = model.hidden(ids[:, :-1], state, dtype=dtype)
        out.append(model.loss(x, ids[:, 1:], dtype)[0][:, :m])
    return torch.cat(out, 1)


def many_nll(model, rows):
    """rows [R,n], NumPy -> f64 [R,n-1]; in bf16, 64 streams at a time."""
    rows = torch.from_numpy(rows.astype(np.int64)).to(model.embedding.device)
    return torch.cat([stream_nll(model, r, torch.bfloat16) for r in rows.split(64)]).double().cpu().numpy()


def by_position(nll):
    """nll [orders,n-1]; column t is the token at position t + 1."""
    edges = [e for e in POSITIONS if e < nll.shape[1]] + [nll.shape[1] + 1]
    rows = []
    for a, b in zip(edges[:-1], edges[1:]):
        means = nll[:, a - 1:b - 1].mean(1)
        rows.append({"from": a, "to": b, "nats": means.mean(), "stderr": means.std(ddof=1) / math.sqrt(len(means))})
    return rows


def same_text(docs, orders, start_nll, long_nll):
    """start_nll [docs,2000], each document from an empty state; long_nll [orders,n-1] of the documents in `orders`."""
    rows = []
    for a, b in PARTS:
        for lo, hi in zip(STARTS, STARTS[1:] + [10**9]):
            deep = {}  # document -> its mean loss in each order that puts its start between lo and hi
            for nll, order in zip(long_nll, orders):
                at = 0
                for d in order:
                    end = min(b, len(docs[d]))
                    if lo <= at < hi and end - a >= 200:
                        deep.setdefault(d, []).append(nll[at + a - 1:at + end - 1].mean())
                    at += len(docs[d])
            if len(deep) < 2:
                continue
            tokens = np.array([min(b, len(docs[d])) - a for d in deep])
            start = np.array([start_nll[d, a - 1:min(b, len(docs[d])) - 1].mean() for d in deep])
            diff = np.array([np.mean(x) for x in deep.values()]) - start
            w = tokens / tokens.sum()
            mean = (w * diff).sum()
            rows.append({"tokens": [a, b], "starts_from": lo, "starts_to": hi if hi < 10**9 else None,
                         "documents": len(deep), "at_start": (w * start).sum(), "difference": mean,
                         "stderr": math.sqrt((w**2 * (diff - mean)**2).sum())})
    return rows


def figures(model, val_ids, val_bytes, eot, n_orders):
    """All of the above; `model` is measured as it is, so give it the weights that are shipped."""
    device = model.embedding.device
    nll = stream_nll(model, torch.from_numpy(val_ids.astype(np.int64)).to(device)[None], torch.float32).double()
    ends = np.flatnonzero(val_ids == eot) + 1
    docs = np.split(val_ids[:ends[-1]], ends[:-1])
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(docs)) for _ in range(n_orders)]
    long_nll = many_nll(model, np.stack([np.concatenate([docs[i] for i in o]) for o in orders]))
    longest = PARTS[-1][1] + 1
    start_nll = many_nll(model, np.stack([np.pad(d[:longest], (0, max(0, longest - len(d)))) for d in docs]))
    return {"val_bytes": val_bytes, "val_tokens": len(val_ids), "nats_per_token": nll.mean().item(),
            "bits_per_byte": nll.sum().item() / math.log(2) / val_bytes,
            "orders": n_orders, "by_position": by_position(long_nll),
            "same_text": same_text(docs, orders, start_nll, long_nll)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("dir")
    ap.add_argument("val")
    ap.add_argument("--orders", type=int, default=128)
    a = ap.parse_args()
    tokenizer = os.path.join(a.dir, "tokenizer.model")
    text = data.read_text(a.val)
    model = TNL.load_hf(a.dir, "cuda" if torch.cuda.is_available() else "cpu")
    eot = sentencepiece.SentencePieceProcessor(model_file=tokenizer).piece_to_id(data.EOT)
    json.dump(figures(model, data.encode(tokenizer, text), len(text.encode()), eot, a.orders), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
