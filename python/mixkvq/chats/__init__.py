"""Chats that are kept: a tree of messages each, in one SQLite file of the user's; what they are exported to and imported from.

from mixkvq.chats import Store, default_path

with Store(default_path()) as store:
    chat = store.create()
    question = store.add(chat, None, "user", "Hello")
"""

from .records import Chat, Hit, Message
from .store import Store, default_path

__all__ = ["Chat", "Hit", "Message", "Store", "default_path"]
