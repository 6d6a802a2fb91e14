"""Rename the keys and roles of messages to those that ``sft.data.messages`` knows."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import Any

from sft.data.values import is_filled

# Columns that may hold a list of messages, by their names after renaming.
COLUMNS = ("messages", "conversations", "prompt", "completion", "history")
# The fields of dataset.columns that are keys of messages where a row has messages with such keys.
KEYS = ("role", "content", "reasoning_content", "tool_calls")


class MessageNames:
    """The names that a source has for keys and roles of messages.

    Attributes:
        keys: The source's key for each of KEYS.
        roles: The known role for each of the source's names.
        found: Keys that a message had.
        counts: How many messages had each of the names in ``roles``.
    """

    def __init__(self, columns: dict[str, str], roles: dict[str, list[str]]) -> None:
        self.keys = {name: key for name, key in columns.items() if name in KEYS}
        self.roles = {name: role for role, names in roles.items() for name in names}
        self.found: set[str] = set()
        self.counts = Counter(dict.fromkeys(self.roles, 0))

    def renamed(self, row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return a row with its messages renamed, and whether one had one of the keys."""
        result, any_key = row, False
        for column in COLUMNS:
            items = row.get(column)
            if isinstance(items, str) and items.lstrip().startswith("["):
                with contextlib.suppress(ValueError):  # a table holds messages as JSON text
                    items = json.loads(items)
            if not isinstance(items, list) or not any(isinstance(item, dict) for item in items):
                continue
            messages = []
            for item in items:
                message, had_key = self._message(item) if isinstance(item, dict) else (item, False)
                messages.append(message)
                any_key |= had_key
            result = {**result, column: messages}
        return result, any_key

    def _message(self, item: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Rename the keys and the role of a message."""
        present = {name: key for name, key in self.keys.items() if key in item}
        message = {key: value for key, value in item.items() if key not in present.values()}
        for name, key in present.items():
            if is_filled(item[key]) or not is_filled(message.get(name)):
                if is_filled(message.get(name)):  # the audit lists it
                    message[f"{name}, replaced by {key}"] = message[name]
                message[name] = item[key]
        self.found |= set(present.values())
        for key in ("role", "from"):
            said = message.get(key)
            if is_filled(said):
                if str(said) in self.roles:  # a number names a speaker too
                    self.counts[str(said)] += 1
                    message[key] = self.roles[str(said)]
                break
        return message, bool(present)
