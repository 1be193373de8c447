#!/usr/bin/env python3
"""Text in, token ids out.

    data.py tokenizer OUT.model TEXT...          train the SentencePiece BPE on a sample of the texts
    data.py encode TOKENIZER.model OUT.npy TEXT...   texts to one stream of uint16 ids
    data.py pieces OUT.txt TEXT...               pieces from all over the texts, to calibrate by

A text is UTF-8, plain or .xz; each document is ended by a line `<|endoftext|>`. The stream is formed as the engine
forms it: the raw file is split at the literal `<|endoftext|>`, which becomes its id, and everything between,
newlines included, is encoded by SentencePiece as it stands.
"""
import argparse
import lzma
import multiprocessing
import random
import sys

import numpy as np
import sentencepiece

EOT = "<|endoftext|>"


def read_text(path):
    with (lzma.open if path.endswith(".xz") else open)(path, "rb") as f:
        return f.read().decode("utf-8")


def train_tokenizer(out, texts, vocab_size, sample_mb, seed):
    """BPE with byte fallback and no normalisation at all: decode(encode(text)) == text, byte for byte."""
    docs = [d for t in texts for d in read_text(t).split(EOT)]
    random.Random(seed).shuffle(docs)
    lines, size = [], 0
    for doc in docs:
        for line in doc.split("\n"):
            if line:
                lines.append(line)
                size += len(line)
        if size > sample_mb * 1e6:
            break
    with open(out, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            byte_fallback=True, split_digits=True, character_coverage=0.99999, max_sentence_length=1 << 20,
            user_defined_symbols=["\n", "\n\n"], unk_id=0, eos_id=1, eos_piece=EOT, bos_id=-1, pad_id=-1,
            num_threads=2)


_sp = None  # one processor per worker of the pool below


def _open(model):
    global _sp
    _sp = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(pieces):
    eot = _sp.piece_to_id(EOT)
    ids = []
    for i, piece in enumerate(pieces):
        ids += [eot] * (i > 0) + _sp.encode(piece)
    return np.array(ids, np.uint16)


def encode(model, text, workers=1):
    """-> uint16 [n], the ids of one whole file."""
    pieces = text.split(EOT)
    # Neighbouring parts share one piece: cut at i, the left part ends before the end token that piece i follows.
    parts = [[""] * (a > 0) + pieces[a:a + 64] for a in range(0, len(pieces), 64)]
    if workers == 1:
        _open(model)
        return np.concatenate([_encode(p) for p in parts])
    with multiprocessing.Pool(workers, _open, (model,)) as pool:
        return np.concatenate(pool.map(_encode, parts, chunksize=1))


def pieces(text, n, size):
    """-> n pieces of `size` bytes, evenly spread; each begins with a line and ends where it ends, and with a newline."""
    raw = text.encode("utf-8")
    starts = [raw.find(b"\n", len(raw) * i // n) + 1 for i in range(n)]
    return [raw[a:a + size].decode("utf-8", "ignore") + "\n" for a in starts]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="cmd", required=True)
    t = sub.add_parser("tokenizer")
    t.add_argument("out")
    t.add_argument("texts", nargs="+")
    t.add_argument("--vocab-size", type=int, default=8192)
    t.add_argument("--sample-mb", type=float, default=60, help="megabytes of text to learn from")
    t.add_argument("--seed", type=int, default=1)
    e = sub.add_parser("encode")
    e.add_argument("tokenizer")
    e.add_argument("out")
    e.add_argument("texts", nargs="+")
    e.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    p = sub.add_parser("pieces")
    p.add_argument("out")
    p.add_argument("texts", nargs="+")
    p.add_argument("--pieces", type=int, default=100, help="of each text")
    p.add_argument("--size", type=int, default=1000, help="bytes of a piece")
    a = ap.parse_args()
    if a.cmd == "tokenizer":
        train_tokenizer(a.out, a.texts, a.vocab_size, a.sample_mb, a.seed)
        return
    if a.cmd == "pieces":
        with open(a.out, "w", encoding="utf-8", newline="") as f:
            for t in a.texts:
                f.writelines(pieces(read_text(t), a.pieces, a.size))
        return
    streams = [encode(a.tokenizer, read_text(t), a.workers) for t in a.texts]
    np.save(a.out, np.concatenate(streams))
    print(" + ".join(str(len(s)) for s in streams), "tokens", file=sys.stderr)


if __name__ == "__main__":
    main()
