"""Parts of a list of clips for several processes: which clips are whose follows from their names alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vidreason.datamodules.key_set import key_of


@dataclass(frozen=True)
class Shard:
    """One of several disjoint parts, which together are the whole, whatever is added to the list in the meantime."""

    number: int
    """Number of this part, counted from 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads ``2/4``.

        Raises:
            ValueError: If the text is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--shard {text}: must be a part of a whole such as 1/4, from 1/4 to 4/4")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """Returns the part of this process under ``torchrun``, else the whole."""
        return cls(int(environment.get("RANK") or 0) + 1, int(environment.get("WORLD_SIZE") or 1))

    def owns(self, name: str) -> bool:
        """Returns whether a clip with this name is in the part."""
        return self.of == 1 or key_of(name) % self.of == self.number - 1

    def file(self, path: Path) -> Path:
        """Returns the file of the part: ``results-2-of-4.jsonl`` for ``results.jsonl``."""
        return path if self.of == 1 else path.with_name(f"{path.stem}-{self.number}-of-{self.of}{path.suffix}")
