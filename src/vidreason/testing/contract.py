"""The tests of a model family as one class, to be collected by pytest as a subclass.

Everything is compared with transformers' own classes on the same checkpoint, with forwards of whole texts that share
nothing, or with the naive route, in fp32 on the CPU.
"""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from vidreason.datamodules.types import Example
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions, save_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY
from vidreason.lightning_modules.vlms.loading.weight_folders import save_weights
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.testing import transformers_own
from vidreason.testing.samples import (
    FAN,
    PROMPTS,
    TREE,
    gradients,
    make_example,
    make_prompts,
    make_texts,
    norm_of,
    randomise_lora,
    relative_gap,
)

TOLERANCE = 1e-5
"""Largest difference of a log-prob in nats, and of the whole gradient relative to its norm."""
NAMES = ("open", "open, then shut", "opened")
"""Labels with a comma, and labels that other labels begin with."""
SIZES = ((56, 56), (40, 90), (112, 56), (64, 96))
LORA = LoRAOptions(r=4, alpha=8)
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "full": {"freeze_vision": False},
    "nf4": {"lora": LORA, "quantize": "nf4"},
}
ROWS = {"fan": FAN, "tree": TREE}


class Case(NamedTuple):
    """A way of scoring texts; ``str`` is the id of the test."""

    trained: str
    route: str
    checkpointing: bool
    chunk: int | None
    rows: str

    def __str__(self) -> str:
        """Returns for example ``lora-expand-checkpointing-chunks-tree``."""
        flags = ("checkpointing" if self.checkpointing else "", "chunks" if self.chunk else "")
        return "-".join(part for part in (self.trained, self.route, *flags, self.rows) if part)


def all_cases(routes: Sequence[str]) -> list[Case]:
    """Returns every combination of what is trained, route, gradient checkpointing, chunks and shape of the texts."""
    return [Case(*case) for case in itertools.product(TRAINED, routes, (False, True), (None, 2), ROWS)]


def pairwise_cases(routes: Sequence[str]) -> list[Case]:
    """Returns cases in which every two values of different options occur together."""

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    left = all_cases(routes)
    missing, chosen = set().union(*map(pairs, left)), list[Case]()
    while missing:
        best = max(left, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def frame_count(vlm: VLM, example: Example) -> int:
    """Returns how many frames of a clip the family's processor gets."""
    return vlm.frame_count(len(example.sample.frames))


class FamilyContract:
    """The tests that every model family passes; a subclass names the family and a small checkpoint.

    ::

        class TestMyFamily(FamilyContract):
            family = MyFamily
            path = "my_model"
    """

    family: type[VLM]
    """The class under test."""
    path: str
    """A checkpoint in the hub's format, with its processor. Two layers of random weights are enough, and quick."""
    routes: tuple[str, ...] = ("expand", "packed")
    """Routes that the family serves besides ``naive``. One that is left out has to be refused."""
    uniform_clips: bool = False
    """True if the clips of a batch need one number of frames."""
    passes_positions: bool = False
    """True if transformers computes other positions than the family, which are then passed to it."""
    trains_vision: bool = True
    """False if the vision tower cannot be trained exactly, because it normalises over a batch."""
    _naive: ClassVar[dict[tuple[str, str], dict[str, Tensor]]]

    def __init_subclass__(cls) -> None:
        """Gives each subclass results of its own to compare with."""
        cls._naive = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Makes a test of each case in ``cases``."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", metafunc.cls.cases(), ids=str)

    @classmethod
    def cases(cls) -> list[Case]:
        """Returns the cases of ``test_routes_equal_naive``; ``all_cases`` takes the tests four times longer."""
        return pairwise_cases(cls.routes)

    # -- what goes in ------------------------------------------------------------------------------------------------

    def test_processor_agrees_with_transformers(self) -> None:
        """Ids and pixels of a clip are those that the processor makes of the same frames in a conversation."""
        vlm, processor = self.vlm(), AutoProcessor.from_pretrained(self.path)
        for example in self.clips()[:4]:
            ours = vlm.encode([replace(example, texts=())]).prompts.inputs
            theirs = transformers_own.encoded(processor, example, frame_count(vlm, example))
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert ours[name].equal(value), name

    def test_the_video_matters(self) -> None:
        """Log-probs of nearly all tokens change with the video, by more than rounding."""
        vlm, model = self.built("lora")
        texts = make_texts(vlm)
        for vlm.route in (*self.routes, "naive"):  # type: ignore[assignment]
            one, other = (self.scored(vlm, model, make_prompts(vlm, seed), texts) for seed in (0, 50))
            assert ((one - other).abs() > TOLERANCE)[texts.loss_mask].float().mean() > 0.9

    def test_a_clip_depends_on_itself_alone(self) -> None:
        """A batch of one equals a batch of eight of unequal lengths: prompt, probabilities, log-probs and texts."""
        vlm = self.vlm()
        model, clips = vlm.build().eval(), self.clips()
        together = vlm.encode(clips)
        ids, mask = together.prompts.inputs["input_ids"], together.prompts.inputs["attention_mask"].bool()
        for vlm.route in self.routes:  # type: ignore[assignment]
            joint = self.scored(vlm, model, together.prompts, together.texts)
            written = vlm.generate(model, together.prompts, 1, Sampling(6, temperature=0)).texts
            for i, clip in enumerate(clips):
                alone = vlm.encode([clip])
                assert alone.prompts.inputs["input_ids"][0].equal(ids[i][mask[i]])
                scores = self.scored(vlm, model, alone.prompts, alone.texts)
                rows = joint[together.texts.owner == i][:, : scores.shape[1]]
                close(scores, rows)
                close(scores.sum(1).softmax(0), rows.sum(1).softmax(0))
                assert vlm.generate(model, alone.prompts, 1, Sampling(6, temperature=0)).texts == (written[i],)

    # -- routes ------------------------------------------------------------------------------------------------------

    def test_routes_equal_naive(self, case: Case) -> None:
        """Log-probs and entropies to 1e-5 nats, the whole gradient to 1e-5 of its norm."""
        vlm, model = self.built(case.trained, gradient_checkpointing=case.checkpointing)
        prompts, texts = make_prompts(vlm), make_texts(vlm, ROWS[case.rows])
        key = case.trained, case.rows
        if key not in self._naive:
            self._naive[key] = gradients(*self.built(case.trained), prompts, texts, "naive")
        vlm.completion_chunk = case.chunk
        expected, found = dict(self._naive[key]), gradients(vlm, model, prompts, texts, case.route)
        for name in ("logprobs", "entropy"):
            value, wanted = found.pop(name), expected.pop(name)
            close(value, wanted)
            assert (wanted[texts.loss_mask] != 0).all()
            assert (value[~texts.loss_mask] == 0).all()
        assert relative_gap(found, expected) < TOLERANCE
        floor = 1e-6 * norm_of(expected.values())
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm() + floor, name
        tower = any(name.startswith(vlm.vision_modules) for name in found)
        assert tower == (case.trained == "full" and self.trains_vision)

    def test_other_routes_are_refused(self) -> None:
        """A route that the family does not serve is an error, not a wrong number."""
        vlm, model = self.built("lora")
        prompts, texts = make_prompts(vlm), make_texts(vlm)
        for vlm.route in {"expand", "packed"} - set(self.routes):  # type: ignore[assignment]
            # The wheel can be imported where pytest is not installed.
            with unittest.TestCase().assertRaisesRegex(ValueError, r"vlm\.route"):  # noqa: PT027
                vlm.score(model, prompts, texts)

    def test_the_vision_cache_changes_nothing(self, tmp_path: Path) -> None:
        """Values and gradients with embeddings from the cache, which are computed once for a video."""
        plain, model = self.built("lora", vision_cache=None)
        clips = [make_example(prompt=p, seed=i, identity=f"video {i}") for i, p in enumerate(PROMPTS)]
        prompts, texts = plain.encode(clips).prompts, make_texts(plain)
        expected = gradients(plain, model, prompts, texts, "expand")
        vlm = self.vlm(lora=LORA)
        seen: list[int] = []
        unwrap(model).get_submodule(vlm.vision_modules[0]).register_forward_pre_hook(lambda *_: seen.append(1))
        for _ in range(2):
            found = gradients(vlm, model, prompts, texts, "expand")
            for name in ("logprobs", "entropy"):
                close(found.pop(name), expected[name])
            assert relative_gap(found, {name: expected[name] for name in found}) < TOLERANCE
            assert len(seen) == len(PROMPTS)
        assert vlm.vision_cache is not None
        assert vlm.vision_cache.take_statistics().hits == len(PROMPTS)

    # -- against transformers ----------------------------------------------------------------------------------------

    def test_label_scores_equal_transformers(self) -> None:
        """Label names with commas, or that begin like others, each scored alone in one forward of the whole text."""
        vlm = self.vlm()
        model, (clip, *_) = vlm.build().eval(), self.clips()
        encoded = vlm.encode([clip])
        close(self.scored(vlm, model, encoded.prompts, encoded.texts), self.of_transformers(vlm, self.stock(), clip))

    def test_greedy_equals_transformers(self) -> None:
        """Completions without sampling are those of ``generate``, or of whole forwards at the family's positions."""
        vlm, model = self.built("full")
        ours = vlm.generate(model, make_prompts(vlm), 2, Sampling(16, temperature=0))
        stock, processor = self.stock(), AutoProcessor.from_pretrained(self.path)
        for i, prompt in enumerate(PROMPTS):
            example = make_example(prompt=prompt, seed=i)
            inputs = transformers_own.encoded(processor, example, frame_count(vlm, example))
            wanted = transformers_own.greedy(stock, inputs, vlm, 16, self.passes_positions)
            for row in (2 * i, 2 * i + 1):
                assert ours.ids[row][ours.mask[row]].tolist() == wanted

    def test_a_saved_adapter_runs_in_transformers(self, tmp_path: Path) -> None:
        """PEFT on the stock model, and the stock processor, give the log-probs that training saw."""
        vlm, model = self.built("lora")
        save_adapter(model, tmp_path / "adapter", POLICY, {})
        clip = self.clips()[1]
        encoded = vlm.encode([clip])
        trained = self.scored(vlm, model.eval(), encoded.prompts, encoded.texts)
        base = self.of_transformers(vlm, self.stock(), clip)
        loaded = PeftModel.from_pretrained(self.stock(), str(tmp_path / "adapter"))
        close(self.of_transformers(vlm, loaded.eval(), clip), trained)
        assert (base - trained).abs().max() > 1e-3

    def test_saved_weights_run_in_transformers(self, tmp_path: Path) -> None:
        """A folder of trained weights is a model folder with its processor."""
        vlm, model = self.built("full")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1 if parameter.requires_grad else 1)
        save_weights(model, tmp_path / "weights", {}, vlm.processor)  # type: ignore[arg-type]
        clip = self.clips()[1]
        encoded = vlm.encode([clip])
        trained = self.scored(vlm, model.eval(), encoded.prompts, encoded.texts)
        close(self.of_transformers(vlm, self.stock(tmp_path / "weights"), clip, tmp_path / "weights"), trained)
        assert (self.of_transformers(vlm, self.stock(), clip) - trained).abs().max() > 1e-3

    # -- what the tests share ----------------------------------------------------------------------------------------

    def vlm(self, **options: Any) -> VLM:
        """Returns the family on its checkpoint, in fp32."""
        return self.family(str(self.path), **{"dtype": "float32", **options})

    def built(self, trained: str, **options: Any) -> tuple[VLM, nn.Module]:
        """Returns the family and a model of which ``lora``, ``full`` or ``nf4`` is trained, always the same."""
        chosen = TRAINED[trained]
        if not self.trains_vision:
            chosen = {**chosen, "freeze_vision": True}
        vlm = self.vlm(**chosen, **options)
        torch.manual_seed(0)  # LoRA's A
        model = vlm.build()
        randomise_lora(model)
        return vlm, model

    def clips(self) -> list[Example]:
        """Returns eight clips with labels behind them, of unequal size and, unless ``uniform_clips``, length."""
        words = (*PROMPTS, "what happens at the door?")
        return [
            make_example(
                NAMES, prompt=words[i % 4], seed=i, frames=8 if self.uniform_clips else frames, size=SIZES[i % 4]
            )
            for i, frames in enumerate((1, 9, 2, 5, 8, 3, 1, 16))
        ]

    def scored(self, vlm: VLM, model: nn.Module, prompts: Any, texts: Any) -> Tensor:
        """Returns log-probs [N, L] without gradients."""
        with torch.no_grad():
            return vlm.score(model, prompts, texts).logprobs

    def stock(self, path: str | Path | None = None) -> Any:
        """Returns the model as transformers alone loads it."""
        return AutoModelForImageTextToText.from_pretrained(path or self.path, dtype=torch.float32).eval()

    def of_transformers(self, vlm: VLM, model: Any, clip: Example, path: str | Path | None = None) -> Tensor:
        """Returns log-probs [N, L] of the clip's texts by ``model``, with the processor in ``path``."""
        processor, texts = AutoProcessor.from_pretrained(path or self.path), vlm.encode([clip]).texts
        inputs = transformers_own.encoded(processor, clip, frame_count(vlm, clip))
        return transformers_own.logprobs(model, inputs, texts, vlm, self.passes_positions)


def close(found: Tensor, wanted: Tensor) -> None:
    """Checks that no value is off by more than the tolerance."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
