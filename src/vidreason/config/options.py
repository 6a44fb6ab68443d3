"""The option parser of the commands outside of Lightning's CLI: a mistake is reported in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vidreason import exit_codes
from vidreason.spelling import did_you_mean


class CommandParser(argparse.ArgumentParser):
    """A parser without abbreviations that reports errors in one line.

    Args:
        prog: The command, for example ``vidreason init``.
        description: One sentence for ``--help``.
        **options: Further arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def parse_options(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses options; an unknown one is reported before a missing one, because it may be its misspelling.

        An option of one value that is given twice is a mistake, too: argparse would take the last value.

        Raises:
            SystemExit: For ``--help`` (status 0) or a mistake (status 2).
        """
        given = set[str]()
        for word in argv:
            name = word.partition("=")[0]
            if name == "--":  # positional arguments follow
                break
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name!r}{did_you_mean(name, self._option_string_actions)}")
            action = self._option_string_actions.get(name)
            if isinstance(action, argparse._StoreAction) and action.dest in given:
                self.error(f"{name} is given twice; remove one of the two")
            given |= {action.dest} if action is not None else set()
        return self.parse_args(list(argv))

    def error(self, message: str) -> NoReturn:
        """Prints one line and raises ``SystemExit`` with status 2."""
        print(f"error: {message} (`{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(exit_codes.USAGE)
