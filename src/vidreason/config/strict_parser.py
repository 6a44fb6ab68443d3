"""The parser of command lines and YAML files: no abbreviations, sections replaced as a whole, null at any depth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from vidreason.config.command_files import without_sections


class StrictParser(LightningArgumentParser):
    """A parser without abbreviations, also for the arguments of classes, whose parsers jsonargparse makes of this type.

    Attributes:
        stage_file: The file from which ``replaced`` is left out.
        replaced: Sections that the command line gives as a whole. jsonargparse would merge them into those of the stage
            file, so that a setting missing in the user's section would come from the stage file.
        trainer_keys: Keys of the stage file's section ``trainer`` that are read; None reads all.
    """

    stage_file: str | None = None
    replaced: tuple[str, ...] = ()
    trainer_keys: tuple[str, ...] | None = None

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)
        self._in_stage_file = False

    def leave_out_trainer(self) -> None:
        """Reads of the stage file only what counts where no trainer is built; callbacks change between versions."""
        self.replaced += ("checkpoint", "logger")
        self.trainer_keys = ("accelerator", "precision")

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parses options.

        jsonargparse has read the value of ``--data.init_args.frames.cache null`` when it hands the option on to the
        parser of the class, as ``--frames.cache=None``, which would be a text.
        """
        if args is not None and len(args) == 1 and args[0].endswith("=None"):
            args = [args[0].removesuffix("None") + "null"]
        parsed: Namespace = super().parse_args(args, *rest, **kwargs)
        return parsed

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Parses a YAML file; of the stage file, only what ``replaced`` and ``trainer_keys`` leave."""
        self._in_stage_file = str(path) == self.stage_file
        try:
            parsed: Namespace = super().parse_path(path, *args, **kwargs)
            return parsed
        finally:
            self._in_stage_file = False

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the text of a YAML file; ``parse_path`` calls it."""
        if self._in_stage_file:
            content = without_sections(content, self.replaced, self.trainer_keys)
        parsed: Namespace = super().parse_string(content, *args, **kwargs)
        return parsed
