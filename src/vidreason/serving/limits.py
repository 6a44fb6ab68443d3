"""Limits of the service, and budgets of bytes that requests share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vidreason.serving.errors import ApiError

MB = 2**20


@dataclass(frozen=True)
class ServingOptions:
    """Limits of the service.

    Args:
        batch_size: Clips that go through the model together.
        waiting: Requests that may be in the service at once; further ones get 429.
        deadline_s: Seconds from the end of the upload to the answer; later a request gets 503.
        upload_s: Seconds that the upload of a body may take.
        decoders: Clips that are decoded at once.
        max_body: Largest body in bytes, as sent and after its Content-Encoding.
        memory: Bytes of bodies and decoded frames in memory at once.
        uploads: Bytes of clips in the temporary folder at once.
        clip_memory: Address space in bytes of the process that decodes a clip.
        max_samples: Most traces per clip that a request may ask for.
        max_names: Most answers over all questions of a request.
        max_text: Most characters of the words of a request.

    Raises:
        ValueError: If a number is not positive.
    """

    batch_size: int = 8
    waiting: int = 64
    deadline_s: float = 120.0
    upload_s: float = 60.0
    decoders: int = 2
    max_body: int = 64 * MB
    memory: int = 1024 * MB
    uploads: int = 1024 * MB
    clip_memory: int = 4096 * MB
    max_samples: int = 32
    max_names: int = 4096
    max_text: int = 200_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


class Budget:
    """A number of bytes that all requests share.

    Args:
        size: The number.
        what: What the bytes are, for the message to a client.
    """

    def __init__(self, size: int, what: str) -> None:
        self.size, self.what = size, what
        self.used = 0
        self._lock = threading.Lock()

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Yields a lease, whose bytes are given back at the end of the block."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            lease.shrink(lease.taken)

    def add(self, size: int) -> None:
        """Takes ``size`` bytes, or gives them back if it is negative.

        Raises:
            ApiError: If so many are not left (503).
        """
        with self._lock:
            if size > 0 and self.used + size > self.size:
                raise ApiError(503, f"the service's {self.what} is full for the moment; try again", retry_after=2)
            self.used += size


class Lease:
    """The bytes of a budget that one request holds.

    Args:
        budget: The budget.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.taken = 0

    def grow(self, size: int) -> None:
        """Takes ``size`` bytes more.

        Raises:
            ApiError: If so many are not left (503).
        """
        self._budget.add(size)
        self.taken += size

    def shrink(self, size: int) -> None:
        """Gives ``size`` bytes back."""
        self._budget.add(-size)
        self.taken -= size
