"""vidreason: teach a vision-language model to reason about videos, then to decide.

The public names are imported on first use, so that ``import vidreason`` does not import torch:

    >>> import vidreason
    >>> sorted(vidreason.__all__)[:3]
    ['ManifestDataModule', 'RewardFn', 'Task']
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name to the module that defines it.
_HOMES = {
    "ManifestDataModule": "vidreason.datamodules.manifest",
    "RewardFn": "vidreason.rewards.base",
    "Task": "vidreason.datamodules.task",
    "VLM": "vidreason.lightning_modules.vlms.base",
    "VLMModule": "vidreason.lightning_modules.base",
    "VideoClassifier": "vidreason.inference",
    "VideoDataModule": "vidreason.datamodules.base",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vidreason' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Lists all names, including the public names that are not imported yet."""
    return sorted([*globals(), *_HOMES])
