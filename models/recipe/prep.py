"""Texts -> tokenizer.json and token files for train.py.

    python prep.py --novels DIR [--novels DIR ...] --gsm8k train.jsonl --held-out TEXT ... --out DATA

Novels are plain UTF-8 files; those named *_YEAR.txt with a year from --until on are left out, as are near-duplicates of one another
and of the held-out evaluation texts.  The Python sources are those of the running interpreter's standard library.
Needs numpy, tokenizers, and this repository's mixkvq package.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from command_line import add_force, claim, number

VOCABULARY = 8192
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's pre-tokenizer (`tokenizer.ggml.pre = qwen2`): every digit is a token of its own.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SKIPPED_SOURCES = ("site-packages", "/test", "idlelib", "lib2to3", "ensurepip")


def clean(text: str) -> str:
    for old, new in (
        ("\ufeff", ""), ("\r\n", "\n"), ("\r", "\n"), ("\u00a0", " "), ("\u2018", "'"), ("\u2019", "'"),
        ("\u201c", '"'), ("\u201d", '"'), ("\u2014\u2014", "--"), ("\u2014", "--"), ("\u2013", "-"),
    ):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def fingerprint(text: str) -> set[str]:
    """A sample of eight-word runs, chosen by their first three words."""
    words = re.findall(r"[a-z]+", text.lower())
    return {" ".join(words[i : i + 8]) for i in range(len(words) - 12) if zlib.crc32(" ".join(words[i : i + 3]).encode()) % 64 == 0}


def read_novels(folders: list[Path], held_out: list[Path], until: int) -> tuple[list[str], list[str]]:
    """Names and texts, without late ones, duplicates and what overlaps the held-out texts."""
    evaluation = [fingerprint(clean(path.read_text(encoding="utf-8"))) for path in held_out]
    names, texts, prints = [], [], []
    for path in (path for folder in folders for path in sorted(folder.glob("*.txt"))):
        year = re.search(r"_(\d{4})\.txt$", path.name)
        if year and int(year[1]) >= until:
            print("late:", path.name)
            continue
        text = clean(path.read_text(encoding="utf-8", errors="replace"))
        own = fingerprint(text)
        if any(len(own & other) > 0.05 * min(len(own), len(other)) for other in evaluation):
            print("overlaps a held-out text:", path.name)
        elif any(len(own & other) > 0.3 * min(len(own), len(other)) for other in prints):
            print("duplicate:", path.name)
        else:
            names.append(path.name)
            texts.append(text)
            prints.append(own)
    return names, texts


def read_python_sources() -> list[str]:
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if any(part in str(path) for part in SKIPPED_SOURCES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 500 < len(text) < 400_000:
            texts.append(text)
    return texts


def read_gsm8k(path: Path) -> list[tuple[str, str]]:
    """Questions and answers of the training split, without the calculator marks."""
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(p["question"].strip(), re.sub(r"<<[^>]*>>", "", p["answer"]).strip()) for p in problems]


def tokenizer_texts(novels: list[str], sources: list[str], gsm8k: list[tuple[str, str]], rng: random.Random) -> Iterator[str]:
    from mixkvq import tasks

    for text in novels:
        for i in range(0, len(text), 400_000):
            yield text[i : i + 100_000]  # a quarter of the prose
    yield from (text[:20_000] for text in sources)
    yield from (f"{question}\n{answer}" for question, answer in gsm8k[:4000])
    for task in tasks.TASKS:
        for i in range(60):
            problem = tasks.make(task, rng, i % 3)
            yield problem.prompt + "\n"
            yield tasks.completion(problem.reasoning, problem.answer)


def train_tokenizer(texts: Iterator[str]):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--novels", type=Path, action="append", required=True, metavar="DIR", help="folder of *.txt (may be repeated)")
    parser.add_argument("--gsm8k", type=Path, required=True, help="the training split, JSON lines")
    parser.add_argument("--held-out", type=Path, action="append", default=[], metavar="FILE", help="evaluation text to keep out")
    parser.add_argument("--until", type=number(int, 0, 9999), default=1930, help="leave out novels named *_YEAR.txt from that year on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_force(parser)
    args = parser.parse_args()
    claim(args.out, ["sources.json", "tokenizer.json", "novel.u16", "code.u16", "gsm8k.npz"], args.force)

    import numpy as np

    from mixkvq import tasks

    names, novels = read_novels(args.novels, args.held_out, args.until)
    sources, gsm8k = read_python_sources(), read_gsm8k(args.gsm8k)
    print(f"{len(novels)} novels, {len(sources)} Python files, {len(gsm8k)} GSM8K problems")
    (args.out / "sources.json").write_text(json.dumps({"novels": names}, indent=1))

    rng = random.Random(0)
    tokenizer = train_tokenizer(tokenizer_texts(novels, sources, gsm8k, rng))
    tokenizer.save(str(args.out / "tokenizer.json"))

    def encode(texts: list[str]) -> list[np.ndarray]:
        batches = (tokenizer.encode_batch(texts[i : i + 8]) for i in range(0, len(texts), 8))
        return [np.array(encoding.ids, dtype=np.uint16) for batch in batches for encoding in batch]

    def join(documents: list[np.ndarray]) -> np.ndarray:
        end = np.array([tokenizer.token_to_id("<|endoftext|>")], dtype=np.uint16)
        return np.concatenate([part for document in documents for part in (document, end)])

    order = list(range(len(novels)))
    rng.shuffle(order)
    prose, code = join(encode([novels[i] for i in order])), join(encode(sources))
    prose.tofile(args.out / "novel.u16")
    code.tofile(args.out / "code.u16")
    prompts, answers = encode([tasks.chat(question) for question, _ in gsm8k]), encode([answer for _, answer in gsm8k])
    np.savez(
        args.out / "gsm8k.npz",
        prompts=np.concatenate(prompts),
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        answers=np.concatenate(answers),
        answer_lengths=np.array([len(answer) for answer in answers]),
    )
    print(f"tokens: {len(prose)} prose, {len(code)} code, {sum(map(len, prompts)) + sum(map(len, answers))} GSM8K")


if __name__ == "__main__":
    main()
