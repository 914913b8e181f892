"""From tokens to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .events import Chosen, Piece


class Writer:
    """Takes tokens and gives pieces of text, holding back what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = [word for word in stop if word]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._tokens: list[Chosen] = []
        self.word = ""  # the stop string that was found

    def add(self, chosen: Chosen) -> Piece | None:
        """What can be said after this token, if anything; once `word` is set, the last."""
        self._tokens.append(chosen)
        self._held += self._decoder.decode(chosen.text)
        found = min(((self._held.find(word), -len(word), word) for word in self._stop if word in self._held), default=None)
        if found is not None:
            self.word = found[2]
            return self._say(found[0])
        return self._say(len(self._held) - self._at_end())

    def end(self) -> Piece | None:
        """What was held back, at an end that no stop string made."""
        self._held += self._decoder.decode(b"", True)
        return self._say(len(self._held))

    def _at_end(self) -> int:
        """How many characters at the end may begin a stop string."""
        longest = max((len(word) for word in self._stop), default=0)
        for n in range(min(longest - 1, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-n:]) for word in self._stop):
                return n
        return 0

    def _say(self, n: int) -> Piece | None:
        if not n and not self.word:
            return None
        piece = Piece(self._held[:n], tuple(self._tokens))
        self._held, self._tokens = self._held[n:], []
        return piece
