"""The built-in problems, under the name that users' files import: see `mixkvq.study.tasks`."""

from __future__ import annotations

from .study.tasks import END_OF_TURN, LEVELS, TASKS, Problem, chat, check, completion, make

__all__ = ["END_OF_TURN", "LEVELS", "TASKS", "Problem", "chat", "check", "completion", "make"]
