"""The callbacks that a stage brings along."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from vidreason.lightning_modules.fit.context_check import CheckContext
from vidreason.lightning_modules.fit.cuda_settings import CudaSettings
from vidreason.lightning_modules.fit.non_finite import StopOnNonFinite
from vidreason.lightning_modules.fit.resume import ResumeFit
from vidreason.lightning_modules.fit.skip_unreadable import SkipUnreadable


def fit_callbacks() -> list[Callback]:
    """Returns new callbacks of a stage; one of the same class in the trainer replaces its own."""
    return [ResumeFit(), SkipUnreadable(), StopOnNonFinite(), CheckContext(), CudaSettings()]
