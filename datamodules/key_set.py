"""A set of names in 8 bytes each, for lists that are too long to be kept."""

from __future__ import annotations

import hashlib

import numpy as np

_RECENT = 1 << 11
"""Names that wait in a Python set until they are merged into the sorted array."""


def key_of(name: str) -> int:
    """Returns a hash of a name, 64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


class KeySet:
    """A set of 64-bit hashes; two of a million names have the same one with a probability of 3e-8."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, key: int) -> bool:
        if key in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        return place < len(self._sorted) and int(self._sorted[place]) == key

    def add(self, key: int) -> bool:
        """Adds a hash; returns False if it was there."""
        if key in self:
            return False
        self._recent.add(key)
        if len(self._recent) >= _RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True
