"""Names in messages: which one may have been meant, and how to print it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name that is most like another one, whatever their case; None where none is.

    >>> nearest("Lable", ["label", "path"]), nearest("zzz", ["label", "path"])
    ('label', None)
    """
    by_case = {other.casefold(): other for other in known}
    close = get_close_matches(name.casefold(), by_case, n=1, cutoff=cutoff)
    return by_case[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str], before: str = ": ") -> str:
    """Returns the end of a message about an unknown name; nothing where no known name is like it.

    Args:
        name: What was given.
        known: What could have been given.
        before: What stands between the message and this.

    >>> did_you_mean("--outt", ["--out", "--force"])
    ": did you mean '--out'?"
    """
    near = nearest(name, known)
    return f"{before}did you mean {near!r}?" if near is not None and near != name else ""


def printable(text: str) -> str:
    r"""Returns a text without control characters, which could rewrite a terminal; line breaks stay.

    >>> print(printable("run\x1b[2J\u202e"))
    run\x1b[2J\u202e
    """
    shown = (c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)
