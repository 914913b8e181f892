"""Held-out prose, and fresh problems whose whole reference derivation must be the arg-max."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from network import Network
from rows import IGNORED, Batch, Document, RowMaker

from mixkvq import tasks


class Validation:
    def __init__(
        self,
        model: Network,
        maker: RowMaker,
        to_device: Callable[[Batch], tuple],
        batch_tokens: int,
        row: int,
        long_row: int,
        n_problems: int,
    ) -> None:
        self._model, self._maker, self._to_device = model, maker, to_device
        self._batch_tokens, self._row, self._long_row = batch_tokens, row, long_row
        self._short = self._draw((0, 1, 2), n_problems)
        self._long = self._draw((3,), max(2, n_problems // 2))

    def _draw(self, levels: tuple[int, ...], count: int) -> list[tuple[str, Document]]:
        rng, drawn = random.Random(4242), []
        for task in tasks.TASKS:
            for level in levels:
                for _ in range(count):
                    document = self._maker.task(task, level, rng, with_prose=False)
                    if len(document.tokens) <= self._long_row:
                        drawn.append((f"{task}-{tasks.LEVELS[level]}", document))
        return drawn

    def _hidden(self, tokens, position, mask):
        with torch.enable_grad():  # the same compiled graph as in training
            return self._model.hidden(tokens, position, mask, 0 if mask is not None else self._row).detach()

    def prose_loss(self) -> float:
        """Nats per token on the held-out end of the novels."""
        held_out = np.asarray(self._maker.prose[self._maker.train_end :])
        size, total, count = self._batch_tokens, 0.0, 0
        index = np.arange(size)
        for start in range(0, len(held_out) - size - 1, size):
            text = held_out[start : start + size + 1].astype(np.int64)
            numbers = ((index // self._row).astype(np.int32), (index % self._row).astype(np.int32))
            tokens, targets, position, mask = self._to_device(Batch(text[:-1].copy(), text[1:].copy(), *numbers))
            with torch.no_grad():
                logits = self._model.logits(self._hidden(tokens, position, mask)).float()
                total += F.cross_entropy(logits, targets, reduction="sum").item()
            count += size
        return total / max(count, 1)

    def exact_share(self, long: bool) -> dict[str, float]:
        """Per cell: the share of problems without a wrong token."""
        chosen = [item for item in self._short if long or len(item[1].tokens) <= self._row * 1.2]
        exact: dict[str, list[bool]] = {}
        batch: list[tuple[str, Document]] = []
        used = 0
        for cell, document in chosen + (self._long if long else []):
            if len(document.tokens) > self._batch_tokens:
                continue
            if used + len(document.tokens) > self._batch_tokens:
                self._judge(batch, exact)
                batch, used = [], 0
            batch.append((cell, document))
            used += len(document.tokens)
        self._judge(batch, exact)
        return {cell: round(sum(found) / len(found), 3) for cell, found in exact.items()}

    def _judge(self, batch: list[tuple[str, Document]], exact: dict[str, list[bool]]) -> None:
        size = self._batch_tokens
        tokens, targets = np.zeros(size, np.int64), np.full(size, IGNORED, np.int64)
        numbers, position = np.full(size, len(batch), np.int32), np.zeros(size, np.int32)
        spans = []
        start = 0
        for i, (_, document) in enumerate(batch):
            end = start + len(document.tokens)
            tokens[start:end] = document.tokens
            targets[start : end - 1] = document.tokens[1:]
            numbers[start:end], position[start:end] = i, np.arange(end - start)
            spans.append(slice(start + document.prompt - 1, end - 1))
            start = end
        x, y, p, mask = self._to_device(Batch(tokens, targets, numbers, position))
        with torch.no_grad():
            right = (self._model.logits(self._hidden(x, p, mask)).argmax(-1) == y).cpu().numpy()
        for (cell, _), span in zip(batch, spans, strict=True):
            exact.setdefault(cell, []).append(bool(right[span].all()))
