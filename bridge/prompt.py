"""The prompt that a chat format makes of messages, without evaluating it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixkvq.core.errors import BridgeError, ContextError, SettingsError, check_text

from ._compat import Base
from .log import sentence


def prompt_tokens(llama: Base, messages: Sequence[Any], options: dict[str, Any]) -> list[int]:
    """The tokens that `create_chat_completion(messages, **options)` would evaluate.

    Raises SettingsError if a message is not Unicode text, or the chat template refuses the messages; ContextError if the format shows no prompt.
    """
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            check_text(content, f"The text of message {i + 1}")
    handler: Any = llama.chat_handler or llama._chat_handler_of(str(llama.chat_format))
    try:
        handler(llama=_PromptOnly(llama), messages=list(messages), **options)
    except _Prompt as p:
        return p.tokens
    except BridgeError:
        raise
    except Exception as e:  # a template is a program of the model's author and may refuse anything
        raise SettingsError(f"The model's chat template does not accept these messages: {sentence(str(e))}") from e
    raise ContextError(f"The chat format {llama.chat_format} does not show its prompt.")


class _Prompt(Exception):
    def __init__(self, tokens: list[int]):
        self.tokens = tokens


class _PromptOnly:
    """Given to a chat handler in place of a model: everything is the model's, but it stops where the prompt would be evaluated."""

    def __init__(self, llama: Base):
        self._llama = llama

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def create_completion(self, prompt: Any, **_: Any) -> Any:
        raise _Prompt(list(prompt) if not isinstance(prompt, str) else self._llama.tokenize(prompt.encode(), add_bos=False, special=True))
