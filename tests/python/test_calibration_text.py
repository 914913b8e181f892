"""The default text of calibration: what its readers rely on."""

import re
from collections import Counter
from pathlib import Path

import pytest

import mixkvq

MARK = "%%%%"
HELD_OUT = "\n%%%% held out\n"


@pytest.fixture(scope="module")
def text() -> str:
    raw = (Path(mixkvq.__file__).parent / "study" / "calibration.txt").read_bytes()
    assert b"\r" not in raw
    return raw.decode("utf-8", errors="strict")


def test_two_halves_of_like_size(text):
    halves = text.split(HELD_OUT)
    assert len(halves) == 2
    for half in halves:
        assert 25_000 <= len(half.encode()) <= 45_000
        assert len(half.split(f"\n\n{MARK}\n")) >= 20


def test_marks_stand_alone(text):
    marks = Counter(line for line in text.splitlines() if line.startswith(MARK))
    assert set(marks) == {MARK, f"{MARK} held out"}
    assert marks[f"{MARK} held out"] == 1


def test_no_line_is_long(text):
    assert max(map(len, text.splitlines())) <= 2000


def test_no_paragraph_occurs_twice(text):
    lines = (line.rstrip() for line in text.splitlines() if not line.startswith(MARK))
    paragraphs = Counter(p.strip() for p in "\n".join(lines).split("\n\n"))
    assert [p for p, times in paragraphs.items() if p and times > 1] == []


@pytest.mark.parametrize(
    "half, near, far",
    [(0, ["881190", "minus 21.5 degrees", "2K-9053-ECHO"], ["heron-under-copper-rain", "7Q-4418-LIMA", "04:35"]),
     (1, ["24.907", "3-8-8-1", "short saw"], ["25.488", "JUNIPER NINE", "left boot"])],
)  # fmt: skip
def test_facts_are_asked_for_far_from_where_they_stand(text, half, near, far):
    """The first piece of a half states what one piece within 4096 tokens, and the last, repeat."""
    half = text.split(HELD_OUT)[half]
    for facts, least, most in ((near, 4_000, 10_000), (far, 25_000, 45_000)):
        for fact in facts:
            places = [match.start() for match in re.finditer(re.escape(fact), half, re.IGNORECASE)]
            distances = [len(half[places[0] : place].encode()) for place in places[1:]]
            assert any(least <= distance <= most for distance in distances), fact
