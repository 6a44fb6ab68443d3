"""The tests that every model family passes, for a family of your own: subclass :class:`FamilyContract`.

It imports pytest, which is not installed with the package.
"""

from vidreason.testing.contract import FamilyContract

__all__ = ["FamilyContract"]
