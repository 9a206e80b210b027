"""The key-value cache of a language model, by the name that the installed transformers has for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def cache_name(forward: Callable[..., Any]) -> str:
    """What a network's `forward` calls its cache, in its arguments and its outputs: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
