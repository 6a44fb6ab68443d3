"""The tests that every model family passes, for a family of your own: subclass :class:`FamilyContract`.

The tests need pytest, which the package itself does not.
"""

from vidreason.testing.contract import FamilyContract

__all__ = ["FamilyContract"]
