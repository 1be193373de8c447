#!/usr/bin/env python3
"""Text from a Hugging Face directory that train.py wrote, token by token from an empty state, in float32.

    sample.py DIR [-p TEXT] [-n TOKENS] [--temp T] [--top-p P] [--seed S]

Slow and simple: for checking the model with nothing but PyTorch.
"""
import argparse
import os
import sys

import sentencepiece
import torch

from model import TNL


def pick(logits, temp, top_p):
    """Draw one id per row of logits [B,V] at temperature `temp` from the fewest ids that hold `top_p` of the mass."""
    p, ids = torch.softmax(logits.float() / temp, -1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return ids.gather(-1, torch.multinomial(p, 1))


@torch.no_grad()
def generate(model, prompt, n, temp, top_p, copies=1):
    """Yields n tensors of ids [copies]: as many continuations of the ids `prompt` side by side."""
    device = model.embedding.device
    state = model.new_state(copies)
    for token in prompt:
        x, state = model.hidden(torch.full((copies, 1), token, device=device), state)
    for _ in range(n):
        ids = pick(model.logits(x)[:, -1], temp, top_p)
        yield ids[:, 0]
        x, state = model.hidden(ids, state)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("dir")
    ap.add_argument("-p", "--prompt", default="")
    ap.add_argument("-n", type=int, default=256)
    ap.add_argument("--temp", type=float, default=0.8)
    ap.add_argument("--top-p", type=float, default=0.95)
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    torch.manual_seed(a.seed)
    sp = sentencepiece.SentencePieceProcessor(model_file=os.path.join(a.dir, "tokenizer.model"))
    model = TNL.load_hf(a.dir, "cpu")
    ids = sp.encode(a.prompt) or [sp.eos_id()]
    new = [int(i) for i in generate(model, ids, a.n, a.temp, a.top_p)]
    sys.stdout.write(a.prompt + sp.decode(new) + "\n")


if __name__ == "__main__":
    main()
