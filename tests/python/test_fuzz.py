"""Damaged profiles, JSON, settings and states: the corpora of tests/fuzz and some thousand mutations of them, the same in every run.

`make fuzz` is the long form.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

import targets

MUTATIONS = 1500
_TEXTS = (b"null", b"true", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b"[" * 5000, b"9" * 5000, b'"\\ud800"')
_PIECES = (*_TEXTS, b"\xff", b"\x00" * 8, b"\xff\xff\xff\x7f", b"\xff" * 4)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: a byte, a piece put in, a piece left out or doubled, the end."""
    for _ in range(draw.randint(1, 4)):
        if not data:
            break
        at = draw.randrange(len(data))
        end = min(len(data), at + draw.randint(1, 30))
        data = draw.choice(
            (
                lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],  # noqa: B023
                lambda: data[:at] + draw.choice(_PIECES) + data[draw.choice((at, end)) :],  # noqa: B023
                lambda: data[:at] + data[end:],  # noqa: B023
                lambda: data[:end] + data[at:],  # noqa: B023
                lambda: data[:at],  # noqa: B023
            )
        )()
    return data


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_files_are_refused_with_a_sentence(name):
    target, draw = targets.TARGETS[name], random.Random(1)
    corpus = [path.read_bytes() for path in sorted((targets.CORPUS / name).iterdir())]
    assert any(targets.accepts(target, data) for data in corpus)
    for data in corpus:
        for _ in range(MUTATIONS // len(corpus)):
            targets.accepts(target, mutated(data, draw))
