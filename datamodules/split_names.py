"""Names of splits: the standard ones, and other names for them."""

from __future__ import annotations

STANDARD_SPLITS = ("train", "val", "cal", "test")
"""A split of any other name is a further test set."""
CALIBRATION_SPLIT = "cal"
"""The split that temperatures and thresholds are fitted on."""

ALMOST_SPLITS = {
    "training": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "calib": "cal",
    "calibration": "cal",
    "testing": "test",
}
"""Other names for the standard splits, in lower case."""


def standard_split(name: str) -> str:
    """Returns the standard name of a split; an unknown name is returned unchanged.

    Example:
        >>> standard_split("Validation"), standard_split("TRAIN"), standard_split("Robustness")
        ('val', 'train', 'Robustness')
    """
    plain = name.strip()
    lower = plain.casefold()
    return ALMOST_SPLITS.get(lower, lower if lower in STANDARD_SPLITS else plain)


def is_split_name(name: str) -> bool:
    """Returns whether a folder or value of this name must be a split.

    Example:
        >>> is_split_name("Training"), is_split_name("test_night"), is_split_name("tennis")
        (True, True, False)
    """
    return standard_split(name) in STANDARD_SPLITS or name.strip().casefold().startswith(("test_", "test-"))
