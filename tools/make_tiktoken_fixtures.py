#!/usr/bin/env python3
"""Makes tests/data/tokenizer/tiny.tiktoken, a small vocabulary of our own, and tiny_tiktoken.ids, what tiktoken makes
of the texts of make_tokenizer_fixtures.py with it. tests/test_tiktoken.c compares ltn with it.

    pip install tiktoken regex sentencepiece==0.2.0 xxhash
    tools/make_tiktoken_fixtures.py [--corpus DIR] [--train]

--train makes tiny.tiktoken anew; else the one that is there is used. DIR holds val.txt.xz or val.txt; without it there
are no lines about val.txt. The lines of the .ids file are those that make_tokenizer_fixtures.py describes, and
    piece HEX ID ID ...              of texts on which the pattern or the merging is at its limits
Text that is not UTF-8 is made so as ltn does: each byte that is part of no character becomes U+FFFD.
"""

import argparse
import base64
import collections
import lzma
import pathlib

import regex
import tiktoken
import xxhash

import make_tokenizer_fixtures as common

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
VOCABULARY = 1200
# Tokens that no merging leads to: they come only where the pattern has just this as a piece.
WHOLE = [".\u180e", "\u180e\u180e", "'\u017f", ".\u0085", "qzxqz", " \u200b", "\u2028\u2028", "1\u00bd"]
SPECIAL = ["<|endoftext|>", "<s>", "<pad>", "\u6771\u4eac"]  # their ids follow the ranks

MORE = """I'll say we've seen that she'd be there; they're sure it isn't so, I'm told. HE'S, WE'LL, YOU'RE, I'VE, DON'T, I'D.
for (int i = 0; i < n; i++) {\n    sum += a[i] * b[i];\n    if (sum > limit)\n        return -1;\n}
def count(words):\n    return {w: words.count(w) for w in set(words)}\n\n\n# 3.14159, 2.71828, 1,000,000
Die kleine Lokomotive fuhr über die Brücke, während die Krähe auf dem Zaun saß und zählte. Größe, Straße, schön.
La petite locomotive était très contente; le corbeau, lui, ne l'était pas. Où est la mer ? Là-bas, derrière le mur.
Маленький паровоз стоял на краю долины и каждое утро считал свои колёса: одно, два, три, четыре.
小さな機関車は谷のはずれに住んでいました。毎朝、車輪を数えました。海はどこですか。壁の向こうです。
小火车住在山谷的边上。每天早上它都数自己的轮子。大海在哪里？在墙的后面。
작은 기관차는 골짜기 끝에 살았습니다. 바다는 어디에 있나요? 벽 뒤에 있어요.
한국어 日本語 中文 Ελληνικά עברית العربية हिन्दी ไทย 😀 😀😀 👍🏽 🇩🇪 — “quoted” … ‘so’ ½ ² ™ © → ←
\t\ttabs\t\tand   spaces    of     many      widths\r\n\r\nand lines\r\n
""" * 2

PIECES = [
    ".\u180e", "\u180e\u180e", "a.\u180e.\u180e\u180e", ".\u0085", ".\u0085\n", "qzxqz", "qzxqzq", " qzxqz", " \u200b",
    "a \u200ba", "\u2028\u2028", "\u2028\u2028a", "1\u00bd", "x'\u017f'\u017fx",
    "'s", "'S", "'\u017f", "'\u017fs", "'ll", "'LL", "'Ll", "'re", "'rE", "'x", "''s", "don't", "DON'T", "x'd", " 's", "'", "'ve'm't",
    "a's b's", "\u180ea", "a\u180eb", " \u180e ", "\u0085a", "\u0085\u0085a", "a\u0085", "\u2028a", "\u2029\n", "\u200ba",
    "\u1680a", "\u202fa", "\u205fa", "\x1ca", "\x1fa", "\x0b\x0ca", "\n a", "\n  a", " \n\n a", "   \n", "  \n  ", " \r \n \r a", "\r\r\na",
    "!!!\n\n\n", "!!!\r\n a", " !!!\n", "  !!!", "\n!!!", "a1b2", "12 34", " 1", "  1", "\u0661\u0662", "\u2160\u2161", "\u00bd\u00bc",
    "e\u0301a", "\u0301a", " \u0301", "_a", "-a", "--a", " -a", "\na", "\r\na", "\ta", "\t\ta", " \ta", "\t a", "a \t b", "\ufeffa", "\x00a",
    "\U0001f600a", "\u4f60\u597d\u4e16\u754c", "\u00aa\u00ba", "\u02b0a", "\u3007", "\ua66e", "\U00010140a", "\U0001d7ce\U0001d7cf",
    "abcdefghijklmnopqrstuvwxyz" * 8, "the" * 200, "ab" * 333, "\u00e9" * 300, "-" * 257, " -" * 100, "=" * 64 + "\n" * 64,
    " " * 63 + "a", "\n" * 63 + "a", " \n" * 63 + "a", "\t" * 64,
]


def train():
    """Ranks by the usual rule: the most frequent pair of neighbours next; of equals the one with the lower bytes."""
    words = collections.Counter(w.encode() for w in regex.findall(PATTERN, common.STORY * 2 + MORE))
    # As in real files the bytes do not stand in their order: those that print come first.
    ranks = sorted((bytes([b]) for b in range(256)), key=lambda b: (not 0x21 <= b[0] <= 0x7E, b))
    parts = {w: [bytes([b]) for b in w] for w in words}
    while len(ranks) < VOCABULARY - len(WHOLE):
        pairs = collections.Counter()
        for word, n in words.items():
            for a, b in zip(parts[word], parts[word][1:]):
                pairs[a, b] += n
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        ranks.append(pair[0] + pair[1])
        for p in parts.values():
            i = 0
            while i + 1 < len(p):
                if (p[i], p[i + 1]) == pair:
                    p[i:i + 2] = [pair[0] + pair[1]]
                i += 1
    ranks += [t.encode() for t in WHOLE]
    assert len(set(ranks)) == VOCABULARY
    return "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks))


def characters(data):
    """Each byte that is part of no character becomes U+FFFD."""
    text, at = "", 0
    while at < len(data):
        for n in range(4, 0, -1):
            try:
                c = data[at:at + n].decode()
            except UnicodeDecodeError:
                continue
            text, at = text + c[0], at + len(c[0].encode())
            break
        else:
            text, at = text + "\ufffd", at + 1
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=pathlib.Path)
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    path = common.OUT / "tiny.tiktoken"
    if args.train:
        path.write_text(train())
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in path.read_text().splitlines())}
    enc = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks,
                            special_tokens={t: len(ranks) + i for i, t in enumerate(SPECIAL)})

    def encode(data):
        return enc.encode(characters(data), allowed_special="all")

    texts = [t.encode() for t in common.TEXTS] + common.BYTES
    assert "".join(t.hex() + "\n" for t in texts) == (common.OUT / "texts.hex").read_text()
    lines = [f"model {xxhash.xxh3_128(path.read_bytes()).hexdigest()}"]
    lines += [" ".join(["text"] + [str(i) for i in encode(text)]) for text in texts]
    lines += [" ".join(["piece", t.encode().hex()] + [str(i) for i in encode(t.encode())]) for t in PIECES]
    h = common.Hash()
    for text in common.random_texts(texts):
        h.ids(encode(text))
    lines.append(f"random-encode {common.N_RANDOM} {h}")
    h = common.Hash()
    for ids in common.random_ids(enc.n_vocab):
        h.bytes(enc.decode(ids, errors="replace").encode())
    lines.append(f"random-decode {common.N_RANDOM} {h}")
    for text, times in common.RUNS:
        data = b"\xff" if text == "\xff" else text.encode()
        lines.append(f"run {data.hex()} {times} {common.Hash().ids(encode(data * times))}")
    if args.corpus:
        packed = args.corpus / "val.txt.xz"
        val = lzma.decompress(packed.read_bytes()) if packed.exists() else (args.corpus / "val.txt").read_bytes()
        h = common.Hash()
        for line in val.split(b"\n"):
            h.ids(encode(line))
        lines.append(f"val-lines {h}")
        lines.append(f"val-whole {common.Hash().ids(enc.encode(val.decode(), allowed_special='all'))}")
    (common.OUT / "tiny_tiktoken.ids").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
