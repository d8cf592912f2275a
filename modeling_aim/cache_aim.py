"""An LRU cache bounded in bytes, for what a model keeps between calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class LRUCache:
    """Values by key, bounded in bytes; the least recently used value is evicted. Thread-safe.

    Args:
        max_bytes: the bound, which can be changed; 0 keeps nothing.

    Raises:
        ValueError: the bound is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()
        self._nbytes = self._max_bytes = 0
        self.max_bytes = max_bytes

    @property
    def max_bytes(self) -> int:
        """The bound; a smaller one evicts values at once."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"max_bytes={value}: expected 0 or more bytes.")
        with self._lock:
            self._max_bytes = value
            self._trim()

    def __reduce__(self) -> Any:  # a copy of a model starts with an empty one
        return type(self), (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return self._nbytes

    def get(self, key: Hashable) -> Any:
        """The value, now the most recently used; `None` where there is none."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: object, size: int) -> None:
        """Keep a value of `size` bytes, unless it is larger than the bound by itself."""
        with self._lock:
            self._nbytes -= self._values.pop(key, (None, 0))[1]
            if size <= self.max_bytes:
                self._values[key] = (value, size)
                self._nbytes += size
            self._trim()

    def _trim(self) -> None:
        while self._nbytes > self.max_bytes:
            self._nbytes -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._values.clear()
            self._nbytes = 0
