"""Judges texts about clips before a model learns from them: are they language, and do they depend on their clip?

Neither measure needs a label:

1. the mean log-probability per token of a text behind its own clip minus behind another clip of the same length. It is
   around 0 for a writer that ignores the clips;
2. the size of all texts after compression (DEFLATE) relative to that of the same characters in random order. It is near
   1 for random letters, lower for language, whose words recur, and near 0 for a text that repeats itself.

Letter soup of the embedded base depends on the clip too, so that the first measure alone would pass it;
``benchmarks/text_quality.py`` has the figures that the bounds come from.

Shape letters: B clips, N texts, L tokens.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vidreason.datamodules.atomic_files import write_text
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import DescribeView, ReasonView
from vidreason.datamodules.types import TextBatch, VideoBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import take_prompts
from vidreason.lightning_modules.vlms.generation import evaluating

LEAST_COMPRESSED, MOST_COMPRESSED = 0.05, 0.80
"""Relative compressed sizes between which texts count as language.

Measured: 0.02 for one sentence 200 times, 0.15 to 0.16 for the embedded base about its own clips, 0.79 for 3000
characters of unrelated paragraphs of English (less for more), 0.86 to 0.92 for its letter soup about other clips.
"""
FEWEST_BYTES = 3000
"""Shorter texts, all together, cannot be told from random letters."""
FEWEST_PAIRS = 4
"""Pairs of clips below which the log-probabilities say nothing."""
_MOST_CLIPS, _CLIPS_AT_ONCE = 64, 16
_MOST_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class TextQuality:
    """Holds the figures by which the texts of a base about a set of clips are judged."""

    texts: int
    pairs: int
    """Pairs of clips that were compared; the interval is over pairs, which are independent."""
    difference: float | None
    """Mean difference of log-probabilities per token, own minus other clip, in nats; None without enough pairs."""
    low: float | None
    high: float | None
    """Its 95 % interval (Student's t)."""
    compressed: float | None
    """Compressed size relative to that of the same characters in random order; None if there is too little text."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Reasons why the texts teach nothing; empty if they may be learnt from."""
        found = []
        if self.compressed is None:
            found.append(f"all {self.texts} texts together are too short to be told from random letters")
        elif self.compressed > MOST_COMPRESSED:
            found.append(f"their compressed size is {self.compressed:.2f} of that of random letters")
        elif self.compressed < LEAST_COMPRESSED:
            found.append(f"they repeat one text (compressed size {self.compressed:.2f} of that of random letters)")
        if self.difference is not None and self.low is not None and self.high is not None and self.low <= 0:
            found.append(
                f"they are no likelier behind their own clip than behind another one ({self.difference:+.3f} nats per "
                f"token, 95 % interval {self.low:+.3f} to {self.high:+.3f}, {self.pairs} pairs)"
            )
        return tuple(found)

    def save(self, path: Path) -> None:
        """Writes the measures and ``faults`` as JSON."""
        write_text(path, json.dumps({**asdict(self), "faults": self.faults}, indent=1) + "\n")


def compressed_share(texts: Sequence[str], fewest: int = FEWEST_BYTES) -> float | None:
    """Returns the compressed size of texts relative to that of their characters in random order.

    Texts of less than ``fewest`` bytes in all give None; of long texts the beginning counts.

    >>> compressed_share(["A man walks to the door."])
    >>> round(compressed_share(["A man walks to the door."] * 200), 2)
    0.02
    """
    content = "\n".join(texts)[:_MOST_CHARACTERS]
    if len(content.encode()) < fewest:
        return None
    characters = list(content)
    random.Random(0).shuffle(characters)
    ordered, disordered = (len(zlib.compress(text.encode(), 9)) for text in (content, "".join(characters)))
    return ordered / disordered


def summarise(pair_differences: Sequence[float], texts: Sequence[str]) -> TextQuality:
    """Returns the record of the differences of independent pairs and of all texts."""
    n = len(pair_differences)
    share = compressed_share(texts)
    if n < FEWEST_PAIRS:
        return TextQuality(len(texts), n, None, None, None, share)
    mean = statistics.fmean(pair_differences)
    half = t_quantile(n - 1) * statistics.stdev(pair_differences) / math.sqrt(n)
    return TextQuality(len(texts), n, mean, mean - half, mean + half, share)


def t_quantile(degrees: int) -> float:
    """Returns the 97.5 % point of Student's t distribution, to 0.02 from 3 degrees of freedom on.

    Expansion around the normal distribution: Abramowitz and Stegun, 26.7.5.

    >>> round(t_quantile(9), 3)  # 2.262 in tables
    2.262
    """
    z, v = statistics.NormalDist().inv_cdf(0.975), degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(v) ** power for power, term in enumerate(terms, 1))


def pair_differences(vlm: VLM, model: nn.Module, batch: VideoBatch) -> list[float]:
    """Returns how much likelier texts are behind their own clip than behind their partner's, one value per pair.

    One clip at a time goes through the model, with its own texts and its partner's behind it.

    Args:
        vlm: The model family.
        model: The model that wrote the texts.
        batch: Clips with the texts that were written about them.

    Returns:
        Nats per token: the mean over the texts of a clip, then over the two clips of a pair.
    """
    found: list[float] = []
    texts = batch.texts
    with evaluating(model), torch.no_grad():
        for pair in pairs_of_equal_length(batch):
            rows = torch.cat([(texts.owner == clip).nonzero().flatten() for clip in pair])
            both = TextBatch(
                ids=texts.ids[rows],
                mask=texts.mask[rows],
                loss_mask=texts.loss_mask[rows],
                answer_mask=texts.answer_mask[rows],
                owner=torch.zeros_like(rows),
                parent=texts.parent[rows],
            )
            behind = [_mean_logprobs(vlm, model, batch, clip, both) for clip in pair]
            first = texts.owner[rows] == pair[0]
            gains = behind[0] - behind[1]  # of the second clip's texts with the opposite sign
            found.append(float(gains[first].mean() - gains[~first].mean()) / 2)
    return found


def _mean_logprobs(vlm: VLM, model: nn.Module, batch: VideoBatch, clip: int, texts: TextBatch) -> Tensor:
    """Returns the mean log-probability per token of texts [N] behind one clip of a batch."""
    index = torch.tensor([clip], device=texts.ids.device)
    scores = vlm.score(model, take_prompts(vlm, batch.prompts, index), texts)
    return scores.logprobs.sum(1) / texts.loss_mask.sum(1)


def pairs_of_equal_length(batch: VideoBatch) -> list[tuple[int, int]]:
    """Returns pairs of the clips that have texts and prompts of equal length; no clip is in two pairs."""
    lengths = batch.prompts.inputs["attention_mask"].sum(1).tolist()
    alike: dict[int, list[int]] = defaultdict(list)
    for clip in sorted(set(batch.texts.owner.tolist())):
        alike[lengths[clip]].append(clip)
    return [pair for clips in alike.values() for pair in zip(clips[::2], clips[1::2], strict=False)]


def judge_texts(
    vlm: VLM,
    model: nn.Module,
    data: VideoDataModule,
    view: DescribeView | ReasonView,
    splits: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    device: torch.device,
) -> TextQuality:
    """Judges the texts that a model wrote about the clips of some splits, at most 64 of them.

    Args:
        vlm: The model family.
        model: The model that wrote them.
        data: The data module of the clips.
        view: The prompt that they answer.
        splits: Names of the splits.
        texts: Texts by video id.
        device: Device of the model.
    """
    told = {name: tuple(text for text in group if text.strip()) for name, group in texts.items()}
    differences: list[float] = []
    for split in splits:
        loader = data.loader(split, view.with_texts(told))
        known = [place for place, clip in enumerate(data.clips(split)) if told.get(clip.video_id)]
        # Neighbours in a manifest are often of one class or one recording.
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [known[place] for place in order[: _MOST_CLIPS // len(splits)]]
        for start in range(0, len(chosen), _CLIPS_AT_ONCE):
            collate = loader.collate_fn
            batch = collate([loader.dataset[place] for place in chosen[start : start + _CLIPS_AT_ONCE]])
            if len(batch):
                differences += pair_differences(vlm, model, batch.to(device))
    return summarise(differences, [text for group in told.values() for text in group])
