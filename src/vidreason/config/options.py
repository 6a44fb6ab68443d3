"""Options of the commands that are no Lightning ones: a mistake is one line that names the nearest option."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vidreason import exit_codes
from vidreason.spelling import did_you_mean


class CommandParser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are one line.

    Args:
        prog: The command, ``vidreason init``.
        description: What it does.
        **options: As ``argparse.ArgumentParser`` takes them.
    """

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def parse_options(self, argv: Sequence[str]) -> argparse.Namespace:
        """Reads options; an unknown one is named before one that is missing, since it may be that one, misspelt.

        Raises:
            SystemExit: ``--help`` (status 0), or a mistake (2).
        """
        for word in argv:
            name = word.partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name!r}{did_you_mean(name, self._option_string_actions)}")
        return self.parse_args(list(argv))

    def error(self, message: str) -> NoReturn:
        """Prints one line and ends with status 2."""
        print(f"error: {message} (`{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(exit_codes.USAGE)
