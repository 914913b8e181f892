"""The chat window's side of the server: a page, the chats that it shows, and answers that are stored as they come."""

from .routes import Window, opened

__all__ = ["Window", "opened"]
