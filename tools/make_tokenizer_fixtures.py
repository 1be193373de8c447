#!/usr/bin/env python3
"""Makes tests/data/tokenizer: small SentencePiece models of our own, odd texts, and what sentencepiece 0.2 makes of
them. tests/test_tokenizer.c compares ltn with it.

    pip install sentencepiece==0.2.0 xxhash
    tools/make_tokenizer_fixtures.py [--models DIR] [--corpus DIR]

DIR of models: every NAME.model in it gets a NAME.ids here; the model itself is not copied. DIR of the corpus: holds
val.txt.xz or val.txt. What is not given is not written: only our own models, no lines about val.txt.

texts.hex  one text a line, as hexadecimal bytes
NAME.ids   model HASH                       of the model file
           text ID ID ...                   of each text, in order
           random-encode N IDS HASH         of N texts put together from the texts
           random-decode N BYTES HASH       of the decodings of N random id sequences
           run HEX TIMES IDS HASH           of a text repeated
           val-lines IDS HASH               of each line of val.txt by itself
           val-whole IDS HASH               of val.txt in one call; BPE only, since a unigram model's float32 sums
                                            depend on where a call begins
HASH is XXH3-128 over little-endian int32 ids, each text's followed by -1 (or over bytes, each text's followed by 0).
"""

import argparse
import array
import io
import lzma
import pathlib
import sys
import tempfile

import sentencepiece
import xxhash

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "tokenizer"
N_RANDOM = 1000

STORY = """Once upon a time there was a little engine that lived at the edge of a wide green valley.
Every morning it counted its wheels: one, two, three, four, and then it counted them again to be sure.
"Good morning," said the crow on the fence. "Are you still counting?"
"I am," said the engine. "Yesterday there were four, and today there are four, but who knows about tomorrow?"
The crow thought about this for a while, and then she counted her feathers, which took until noon.

In the winter the snow came down so thickly that the rails could not be seen, and the engine waited in its shed.
It told itself stories about the summer: the smell of warm oil, the children waving from the bridge, the river
running under the bridge, and the long road that ran beside the river until both of them reached the sea.
"What is the sea?" asked the mouse who lived behind the coal.
"It is a valley that somebody has filled with water," said the engine. "I have not seen it, but I have heard it."

When spring came the doors were opened, the fire was lit, and the engine rolled out into the light.
There were 12 wagons to pull, 340 sacks of grain, 5 crates of apples, and one small dog that belonged to nobody.
The dog sat down on the last wagon and looked at everything that went past: houses, hedges, a man with a ladder,
two girls with a kite, a café, a field of naïve sheep, a sign that said Zürich, and another that said 東京.
"Where are we going?" asked the dog. "To the end of the line," said the engine. "And what is there?" "A wall."
"And behind the wall?" The engine had never thought of that, and it was quiet for the rest of the way.

At the end of the line there was a wall, and in the wall there was a door, and behind the door there was the sea.
The dog ran down to the water and back again, and told the engine everything: that it was wide, that it was cold,
that it was louder than the wind, and that nobody had filled it with anything, for it had always been there.
Then they went home, and the engine told the crow, and the crow told the mouse, and the mouse told the snow.
"""

TEXTS = [
    "", " ", "  ", "   ", " " * 17, "a", " a", "a ", " a ", "  a  b  ", "\n", "\n\n", "\n\n\n", "\n\n\n\n\n", " \n ",
    "\t", "\r\n", "a\tb", "a\nb", "a\n\nb", "a \n b", "Hello", "Hello world", "Hello, world!", "the", " the", "The engine",
    "there were four, and today", "Once upon a time there was", "ONCE", "12345", "3.14159", "1,000,000", "0", "00", "x = y;",
    "\x00", "a\x00b", "\x00\x00", "\x01", "\x07\x08", "\x1b[0m", "\x7f", "\u0080", "\u0085", "\u00a0", "a\u00a0b",
    "\u00ad", "\u200b", "a\u200bb", "\u200d", "\u200e", "\u2028", "\u2060", "\ufeff", "\ufffd", "\ufffe", "\ue000", "\U0010ffff",
    "\ud7ff", "\U000e0041", "é", "e\u0301", "e\u0301\u0301", "\u0301", "a\u0300\u0301", "Å", "A\u030a", "ﬁ", "ﬃ", "½", "²", "…",
    "Ǆ", "ẛ\u0323", "İ", "ß", "Ω", "ｱ", "ｶﾞ", "か\u3099", "Ａ１", "\u3000", "a\u3000b", "你好", "你好，世界。", "東京", "日本語テキスト",
    "한국어", "ᄒ\u1161\u11ab", "ไทย", "हिन्दी", "العربية", "עברית", "Ελλάδα", "Привет, мир", "ﷺ", "😀", "😀😀", "👍🏽",
    "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "🇩🇪", "1\ufe0f\u20e3", "a😀b", "▁", "▁▁", "a▁b", "▁a", " ▁ ", "a▁", "<s>", "</s>", "<unk>",
    "<pad>", "<0x41>", "<0x0A>", "<|endoftext|>", "[INST]", "<br>", "<br><br>", "< br>", "<b", "naïve café", "Zürich",
    "http://a.b/c?d=e&f", "aaaaaaaaaaaaaaaa", "----------", "....", "(((", "\u0f0b", "\U0001d54f", "Z\u0351\u036b\u0343a\u0321l",
]
BYTES = [
    b"\x80", b"\xbf", b"\xc0", b"\xc0\x80", b"\xc1\xbf", b"\xc3", b"a\xc3", b"\xc3a", b"\xc3\xc3", b"\xe2\x82", b"\xe2\x82a",
    b"\xe2\x96", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x9f\x98", b"\xf0\x9f\x98 ", b"\xf0\x80\x80\x80",
    b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xff", b"\xfe\xff", b"a\xffb", b"\xff\xff\xff", b"\xe2\x96\x81\xe2\x96", b" \x80 ",
]
RUNS = [(" ", 40000), ("a", 50000), ("\n", 20000), ("0", 30000), ("中", 30000), ("😀", 30000), ("ab", 30000), ("\xff", 1000)]


class Random:
    """Knuth's MMIX generator; the test has the same."""

    def __init__(self, seed):
        self.x = seed

    def below(self, n):
        self.x = (self.x * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.x >> 33) % n


class Hash:
    def __init__(self):
        self.h, self.n = xxhash.xxh3_128(), 0

    def ids(self, ids):
        self.n += len(ids)
        a = array.array("i", list(ids) + [-1])
        if sys.byteorder == "big":
            a.byteswap()
        self.h.update(a.tobytes())
        return self

    def bytes(self, text):
        self.n += len(text)
        self.h.update(text + b"\0")
        return self

    def __str__(self):
        return f"{self.n} {self.h.hexdigest()}"


def train(name, append=b"", **options):
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        if "rules" in options:
            rules.write("".join(f"{a}\t{b}\n" for a, b in options.pop("rules")))
            rules.flush()
            options["normalization_rule_tsv"] = rules.name
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(STORY.splitlines()), model_writer=model, num_threads=1, minloglevel=2, **options)
    data = model.getvalue()
    if b"/tmp" in data:  # where the rules lay is none of the model's business
        data = data.replace(rules.name.encode(), b"-" * len(rules.name))
    (OUT / f"{name}.model").write_bytes(data + append)


def train_all():
    # Like the tokenizer of the model that ships.
    train("tiny_bpe", model_type="bpe", vocab_size=700, byte_fallback=True, normalization_rule_name="identity",
          add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["\n", "\n\n"], eos_id=2,
          eos_piece="<|endoftext|>", character_coverage=0.999)
    # Rules that join, split, delete and make spaces; spaces collapse; unknown characters stay unknown.
    train("tiny_unigram", model_type="unigram", vocab_size=220, user_defined_symbols=["<br>", "e\u0301e"],
          control_symbols=["<pad>"], unk_surface="?", rules=[
              ("65 301", "E9"), ("FB01", "66 69"), ("2026", "2E 2E 2E"), ("A", "20"), ("9", "20"), ("3000", "20"),
              ("A0", "20 20"), ("200B", ""), ("41", "61"), ("61 300 301", "62 20"), ("BD", "20 31 2F 32")])
    # The space behind the word, pieces of several words, whitespace pieces.
    train("tiny_suffix", model_type="bpe", vocab_size=360, treat_whitespace_as_suffix=True, split_by_whitespace=False,
          allow_whitespace_only_pieces=True, normalization_rule_name="identity", remove_extra_whitespaces=True)
    # A dummy prefix, spaces kept, and unescaped: that the trainer refuses, so a second normalizer_spec says it.
    train("tiny_plain", model_type="unigram", vocab_size=200, normalization_rule_name="identity",
          remove_extra_whitespaces=False, split_by_whitespace=False, append=b"\x1a\x02\x28\x00")


def random_texts(texts):
    r = Random(1)
    for _ in range(N_RANDOM):
        yield b"".join(texts[r.below(len(texts))] for _ in range(r.below(24)))


def random_ids(size):
    r = Random(2)
    for _ in range(N_RANDOM):
        near = r.below(2)  # half of the sequences from the first 300 ids, where control and byte pieces are
        yield [r.below(min(size, 300) if near else size) for _ in range(r.below(24))]


def expect(path, texts, val):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    lines = [f"model {xxhash.xxh3_128(path.read_bytes()).hexdigest()}"]
    lines += [" ".join(["text"] + [str(i) for i in sp.encode(text)]) for text in texts]
    h = Hash()
    for text in random_texts(texts):
        h.ids(sp.encode(text))
    lines.append(f"random-encode {N_RANDOM} {h}")
    h = Hash()
    for ids in random_ids(sp.get_piece_size()):
        h.bytes(sp.decode(ids).encode())
    lines.append(f"random-decode {N_RANDOM} {h}")
    for text, times in RUNS:
        text = b"\xff" if text == "\xff" else text.encode()
        lines.append(f"run {text.hex()} {times} {Hash().ids(sp.encode(text * times))}")
    if val is not None:
        h = Hash()
        for line in val.split(b"\n"):
            h.ids(sp.encode(line))
        lines.append(f"val-lines {h}")
        if b"<0x00>" in path.read_bytes() or path.stem == "tiny_suffix":
            lines.append(f"val-whole {Hash().ids(sp.encode(val))}")
    (OUT / f"{path.stem}.ids").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=pathlib.Path)
    parser.add_argument("--corpus", type=pathlib.Path)
    args = parser.parse_args()
    if not sentencepiece.__version__.startswith("0.2."):
        sys.exit(f"sentencepiece is {sentencepiece.__version__}, expected 0.2")
    val = None
    if args.corpus:
        packed = args.corpus / "val.txt.xz"
        val = lzma.decompress(packed.read_bytes()) if packed.exists() else (args.corpus / "val.txt").read_bytes()
    OUT.mkdir(parents=True, exist_ok=True)
    texts = [t.encode() for t in TEXTS] + BYTES
    (OUT / "texts.hex").write_text("".join(t.hex() + "\n" for t in texts))
    train_all()
    for path in sorted(OUT.glob("*.model")) + sorted(args.models.glob("*.model") if args.models else []):
        expect(path, texts, val)


if __name__ == "__main__":
    main()
