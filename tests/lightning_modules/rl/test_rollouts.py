"""Completions with their rewards."""

from pathlib import Path

import pytest
import torch

from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.rl.rollouts import RolloutGroup, reward_tensor, score_completions
from vidreason.lightning_modules.vlms.completions import Completion, CompletionBatch
from vidreason.rewards.accuracy import AccuracyReward
from vidreason.rewards.completion import parse_completion, render_completion
from vidreason.rewards.format import FormatReward


def completion(text: str) -> Completion:
    return Completion(text, parse_completion(text), torch.zeros(1, dtype=torch.long), torch.zeros(1), "stop")


def test_scores_are_those_of_the_clips_own_label():
    clips = (Clip(Path("a"), "walk", "a"), Clip(Path("b"), "run", "b"))
    texts = [completion(render_completion("r", "walk")), completion("nothing")]
    batch = CompletionBatch(clips, None, None, None, (tuple(texts), tuple(texts)))
    groups = score_completions(batch, [AccuracyReward(), FormatReward(weight=0.5)], ["walk", "run"])
    assert isinstance(groups[0], RolloutGroup)
    assert reward_tensor(groups).tolist() == [[1.5, 0.0], [0.5, 0.0]]
    assert groups[1].rollouts[0].score.parts == {"accuracy": 0.0, "format": 1.0}
    unlabelled = CompletionBatch((Clip(Path("a"), None, "a", where="m.csv, row 3"),), None, None, None, (tuple(texts),))
    with pytest.raises(ValueError, match=r"m.csv, row 3: rewards need a label"):
        score_completions(unlabelled, [AccuracyReward()], ["walk"])
