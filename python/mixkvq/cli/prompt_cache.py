"""`--prompt-cache`: what was read of a prompt, kept in a file for the next run, as llama.cpp's own tools have it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.errors import SettingsError
from ..core.files import check_target

if TYPE_CHECKING:
    from bridge.llama import Llama


@dataclass
class PromptCache:
    """A file that a context begins from, if there is one, and that is written once the first prompt has been read.

    everything: it is written at the end as well, with the answers. read_only: it is never written.
    """

    path: str
    everything: bool = False
    read_only: bool = False
    _done: bool = field(default=False, init=False)

    def check(self, model: str) -> None:
        """Raises SettingsError, before anything is loaded, if what lies there is something else, or the file cannot be written."""
        if self.read_only and self.everything:
            raise SettingsError("--prompt-cache-ro never writes the file, so it does not go together with --prompt-cache-all.")
        if not self.read_only:
            check_target(self.path, force=True, what="state", inputs=[model])

    def begin(self, llama: Llama) -> None:
        """Go on from the file. Raises StateError if it is damaged, or of another model or other settings."""
        try:
            if os.path.getsize(self.path) == 0:
                return
        except FileNotFoundError:
            return
        except OSError:
            pass  # load_file says what is wrong
        llama.load_file(self.path)

    def has_read(self, llama: Llama) -> None:
        """A prompt is in the context, of which more than its last token was new."""
        if not self._done and not self.read_only:
            llama.save_file(self.path)
        self._done = True

    def end(self, llama: Llama) -> None:
        """Nothing more will be read."""
        if self.everything and llama.n_tokens:
            llama.save_file(self.path)
