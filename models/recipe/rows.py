"""Rows of training tokens: prose and code, or task problems packed with prose padding."""

from __future__ import annotations

import multiprocessing
import queue
import random
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixkvq import tasks

IGNORED = -100  # target of a token that is not trained on
HELD_OUT = 262_144  # last tokens of the novels, for the validation loss
PROSE_ROWS = 0.42
GSM8K_SHARE = 0.06
CODE_SHARE = 0.10

TASK_SHARE = {"recall": 0.15, "chain": 0.19, "add": 0.08, "mul": 0.13, "sort": 0.13, "vm": 0.20, "path": 0.12}
# Share of the task tokens per level (easy, medium, hard, xl), for the early, the main and the long-context stage.
EARLY, MAIN, LONG = range(3)
LEVEL_SHARE = ((0.55, 0.35, 0.10, 0), (0.22, 0.36, 0.42, 0), (0.12, 0.22, 0.34, 0.32))


class Document(NamedTuple):
    tokens: np.ndarray
    masked: int  # that many leading tokens are not trained on
    prompt: int  # length of the prompt


class Batch(NamedTuple):
    """Flat over rows: the model sees one long sequence and a document number per token."""

    tokens: np.ndarray
    targets: np.ndarray
    document: np.ndarray
    position: np.ndarray


class RowMaker:
    def __init__(self, data: Path, seed: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        self.end_of_turn = self.tokenizer.token_to_id(tasks.END_OF_TURN)
        self.prose = np.memmap(data / "novel.u16", dtype=np.uint16, mode="r")
        self.code = np.memmap(data / "code.u16", dtype=np.uint16, mode="r")
        self.train_end = len(self.prose) - min(HELD_OUT, len(self.prose) // 10)
        gsm8k = np.load(data / "gsm8k.npz")
        self.gsm8k = list(
            zip(
                np.split(gsm8k["prompts"], np.cumsum(gsm8k["prompt_lengths"])[:-1]),
                np.split(gsm8k["answers"], np.cumsum(gsm8k["answer_lengths"])[:-1]),
                strict=True,
            )
        )
        self.rng = random.Random(seed)
        self.waiting: list[Document] = []  # drawn, but too long for the row they were drawn for
        self._choices = self._document_weights()

    def _document_weights(self) -> list[tuple[list[tuple[str, int]], list[float]]]:
        """Per stage: cells and how often to draw them, so that the *token* shares come out as given."""
        rng = random.Random(5)
        cells = [(task, level) for task in tasks.TASKS for level in range(len(tasks.LEVELS))]
        length = {cell: sum(len(self.task(*cell, rng).tokens) for _ in range(3)) / 3 for cell in cells}
        choices = []
        for shares in LEVEL_SHARE:
            used = [cell for cell in cells if shares[cell[1]]]
            choices.append((used, [TASK_SHARE[task] * shares[level] / length[task, level] for task, level in used]))
        return choices

    def prose_text(self, rng: random.Random, n_chars: int) -> str:
        n_tokens = n_chars // 4 + 2
        start = rng.randrange(self.train_end - n_tokens)
        text = self.tokenizer.decode(self.prose[start : start + n_tokens].tolist())
        text = " ".join(text.replace("\ufffd", "").replace("<|endoftext|>", "").split())
        first_word = text.find(" ") + 1
        return text[first_word:] if first_word < len(text) - 5 else text

    def task(self, task: str, level: int, rng: random.Random, with_prose: bool = True) -> Document:
        problem = tasks.make(task, rng, level, self.prose_text if with_prose else None)
        prompt = self.tokenizer.encode(tasks.chat(problem.prompt)).ids
        answer = self.tokenizer.encode(tasks.completion(problem.reasoning, problem.answer)).ids + [self.end_of_turn]
        # The prompt of `recall` is mostly prose, so it is trained on as well.
        return Document(np.array(prompt + answer, dtype=np.uint16), 0 if task == "recall" else len(prompt), len(prompt))

    def document(self, stage: int) -> Document:
        if self.rng.random() < GSM8K_SHARE:
            prompt, answer = self.rng.choice(self.gsm8k)
            return Document(np.concatenate([prompt, answer, [self.end_of_turn]]).astype(np.uint16), 0, len(prompt))
        cells, weights = self._choices[stage]
        return self.task(*self.rng.choices(cells, weights)[0], self.rng)

    def natural(self, n_tokens: int) -> np.ndarray:
        text, end = (self.code, len(self.code)) if self.rng.random() < CODE_SHARE else (self.prose, self.train_end)
        start = self.rng.randrange(end - n_tokens)
        return np.asarray(text[start : start + n_tokens])

    def row(self, stage: int, length: int) -> Batch:
        """`length` tokens and their targets."""
        row = _Row(length + 1)
        if self.rng.random() < PROSE_ROWS:
            while row.free:
                whole = self.rng.random() < 0.5 or row.free < 600
                row.append(self.natural(row.free if whole else self.rng.randint(300, row.free)))
            return row.batch()
        misses = 0
        while row.free:
            fitting = next((i for i, document in enumerate(self.waiting) if len(document.tokens) <= row.free), None)
            document = self.document(stage) if fitting is None else self.waiting.pop(fitting)
            if len(document.tokens) > length:
                continue
            if len(document.tokens) <= row.free:
                row.append(document.tokens, document.masked)
                continue
            misses += 1
            if len(self.waiting) < 8:
                self.waiting.append(document)
            if misses >= 3 or row.free < 60:
                row.append(self.natural(row.free))
        return row.batch()


class _Row:
    def __init__(self, size: int) -> None:
        self.free = size
        self.tokens = np.zeros(size, np.uint16)
        self.trained = np.ones(size, bool)
        self.document = np.zeros(size, np.int16)
        self.position = np.zeros(size, np.int32)
        self.n_documents = 0

    def append(self, tokens: np.ndarray, masked: int = 0) -> None:
        start = len(self.tokens) - self.free
        end = start + len(tokens)
        self.tokens[start:end] = tokens
        self.trained[start : start + masked] = False
        self.document[start:end] = self.n_documents
        self.position[start:end] = np.arange(len(tokens))
        self.n_documents += 1
        self.free -= len(tokens)

    def batch(self) -> Batch:
        targets = self.tokens[1:].astype(np.int16)
        targets[~(self.trained[1:] & (self.document[1:] == self.document[:-1]))] = IGNORED
        return Batch(self.tokens[:-1].astype(np.int16), targets, self.document[:-1], self.position[:-1].astype(np.int16))


class Loader:
    """Worker processes that make rows, and a thread that joins them into flat batches."""

    def __init__(self, data: Path, seed: int, workers: int, short: int, long: int, batch_tokens: int) -> None:
        context = multiprocessing.get_context("fork")
        self._stage = context.Value("i", EARLY)
        self._rows = context.Queue(maxsize=400)
        self._batches: queue.Queue[Batch] = queue.Queue(maxsize=6)
        self._batch_tokens = batch_tokens
        self._stopped = threading.Event()
        for i in range(workers):
            arguments = (data, seed * 1000 + i, self._stage, self._rows, short, long)
            context.Process(target=_make_rows, args=arguments, daemon=True).start()
        threading.Thread(target=self._collect, daemon=True).start()

    @property
    def stage(self) -> int:
        return self._stage.value

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage.value = stage

    def next(self) -> Batch:
        return self._batches.get()

    def stop(self) -> None:
        self._stopped.set()
        self._rows.cancel_join_thread()

    def _collect(self) -> None:
        while not self._stopped.is_set():
            batch = self._join_rows()
            if batch is not None:
                self._batches.put(batch)

    def _join_rows(self) -> Batch | None:
        """Enough rows of one length for a batch; starts over when the stage changes the length."""
        rows: list[Batch] = []
        n_tokens, next_document, long = 0, 0, self.stage == LONG
        while n_tokens < self._batch_tokens:
            try:
                stage, row = self._rows.get(timeout=1)
            except queue.Empty:
                if self._stopped.is_set():
                    return None
                continue
            if (self.stage == LONG) != long:
                rows, n_tokens, next_document, long = [], 0, 0, self.stage == LONG
            if (stage == LONG) != long:
                continue
            row = row._replace(document=row.document.astype(np.int32) + next_document)
            next_document = int(row.document[-1]) + 1
            rows.append(row)
            n_tokens += len(row.tokens)
        kinds = Batch(np.int64, np.int64, np.int32, np.int32)
        return Batch(*(np.concatenate(parts).astype(kind) for parts, kind in zip(zip(*rows, strict=True), kinds, strict=True)))


def _make_rows(data: Path, seed: int, stage, rows, short: int, long: int) -> None:
    maker = RowMaker(data, seed)
    while True:
        now = stage.value
        rows.put((now, maker.row(now, long if now == LONG else short)))
