"""Log-probabilities of completions behind videos against vLLM, an independent implementation of every family.

``make parity`` runs these tests; ``make_environment.sh`` makes the environment that they need.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import vlm_builders as builders
from asking_vllm import NEEDS_VLLM, ask_vllm
from figures import write_json
from torch import Tensor
from vllm_families import FAMILIES, SIZES, Clip, Family

from vidreason.datamodules.types import Example, FrameTiming
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions, save_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.text import chat

pytestmark = NEEDS_VLLM
TOLERANCE = 1e-4
RANK = 8


class Case(NamedTuple):
    """One completion behind one clip, and how vLLM is asked for it."""

    clip: Clip
    adapter: bool
    embedded: bool

    def __str__(self) -> str:
        height, width = self.clip.size
        clip = f"{self.clip.frames} frames of {height} x {width} at {self.clip.rate / self.clip.every:.3g} fps"
        return f"{clip}, {'LoRA' if self.adapter else 'base'}, {'embeddings' if self.embedded else 'pixels'}"


def example_of(clip: Clip, seed: int) -> Example:
    made = builders.make_example(prompt=builders.PROMPTS[1], frames=clip.frames, size=clip.size, seed=seed)
    timing = FrameTiming(fps=clip.rate, total_frames=clip.frames * clip.every, indices=clip.indices)
    return replace(made, sample=replace(made.sample, timing=timing))


def request_of(vlm: VLM, example: Example, completion: list[int]) -> dict[str, Any]:
    """The request of one example with pixels and without an adapter."""
    timing = example.sample.timing
    return {
        "prompt": chat.tokens(vlm.processor, chat.prompt_text(vlm.processor, example.prompt, {})),
        "completion": completion,
        "frames": example.sample.frames.permute(0, 2, 3, 1).contiguous(),
        "metadata": {
            "fps": timing.fps,
            "total_num_frames": timing.total_frames,
            "duration": timing.duration,
            "frames_indices": list(timing.indices),
            "video_backend": "opencv",
        },
        "options": vlm.video_options(len(example.sample.frames)),
        "embedded": None,
        "adapter": None,
    }


def image_prompt(vlm: VLM, ids: list[int]) -> list[int]:
    """The prompt ``ids`` with one placeholder of an image for each run of visual tokens and the marks around it."""
    names = ("image_token", "video_token", "start_image_token", "end_image_token")
    tokens = [getattr(vlm.processor, name) for name in names if hasattr(vlm.processor, name)]
    image, *others = vlm.tokenizer.convert_tokens_to_ids(tokens)
    runs = groupby(ids, {image, *others}.__contains__)
    return [i for visual, run in runs for i in ([image] if visual else run)]


class Compared:
    """A tiny model of a family, with and without an adapter, and what vLLM says about it."""

    def __init__(self, family: Family, folder: Path) -> None:
        path = str(family.write(folder / "model", **{**SIZES, **family.sizes}))
        lora, adapter_folder = LoRAOptions(r=RANK, alpha=16), folder / "adapter"
        self.vlms = {
            False: family.vlm(path, dtype=family.dtype),
            True: family.vlm(path, lora=lora, dtype=family.dtype),
        }
        self.models: dict[bool, Any] = {adapter: vlm.build().eval() for adapter, vlm in self.vlms.items()}
        builders.randomise_lora(self.models[True])
        save_adapter(self.models[True], adapter_folder, POLICY, {})
        self.exact: dict[bool, Any] = {}
        if family.dtype != "float32":
            self.exact[False] = family.vlm(path, dtype="float32").build().eval()
            self.exact[True] = family.vlm(path, lora=lora, dtype="float32").build(str(adapter_folder)).eval()
        vlm = self.vlms[False]
        self.examples = {clip: example_of(clip, seed) for seed, clip in enumerate(family.clips)}
        self.encoded = {clip: vlm.encode([example]).prompts for clip, example in self.examples.items()}
        self.texts = {clip: builders.make_texts(vlm, [(0, -1, 12)], seed) for seed, clip in enumerate(family.clips)}
        for clip, texts in self.texts.items():
            self.texts[clip] = replace(texts, loss_mask=texts.mask)
        kinds = (False, True) if family.embeddings else (False,)
        adapters = (False, True) if family.adapter else (False,)
        self.cases = [Case(clip, adapter, kind) for adapter in adapters for kind in kinds for clip in family.clips]
        requests = []
        for case in self.cases:
            request = request_of(vlm, self.examples[case.clip], self.texts[case.clip].ids[0].tolist())
            if case.adapter:
                request["adapter"] = str(adapter_folder)
            if case.embedded:
                assert family.embeddings is not None
                with torch.no_grad():
                    inputs = self.encoded[case.clip].inputs
                    request["embedded"] = family.embeddings(unwrap(self.models[False]), inputs, case.clip)
                if "image" in request["embedded"]:
                    request["prompt"] = image_prompt(vlm, inputs["input_ids"][0].tolist())
            requests.append(request)
        job = {"model": path, "dtype": family.dtype, "rank": RANK, "requests": requests}
        told = ask_vllm(folder / "job", job)
        self.versions = {
            "vidreason": {"transformers": transformers.__version__, "torch": torch.__version__},
            "vLLM": told["versions"],
        }
        self.answers: list[dict[str, Any]] = told["answers"]

    def ours(self, case: Case, exact: bool = False) -> Tensor:
        """Log-probabilities of vidreason, [L]; ``exact`` computes in float32 if the comparison does not."""
        vlm, texts = self.vlms[case.adapter], self.texts[case.clip]
        model = (self.exact if exact else self.models)[case.adapter]
        with torch.no_grad():
            return vlm.score(model, self.encoded[case.clip], texts).logprobs[0].double()

    @property
    def tolerance(self) -> float:
        """The largest difference that passes: below float32, twice what the precision itself changes."""
        if not self.exact:
            return TOLERANCE
        pixels = [case for case in self.cases if not case.embedded]
        return 2 * max(float((self.ours(case) - self.ours(case, exact=True)).abs().max()) for case in pixels)

    def theirs(self, case: Case) -> Tensor:
        """Log-probabilities of vLLM, [L], renormalised without the placeholders that vidreason never scores."""
        table: Tensor = self.answers[self.cases.index(case)]["logprobs"].clone()
        table[:, sorted(self.vlms[False].suppressed_ids)] = -torch.inf
        return table.log_softmax(-1).gather(-1, self.texts[case.clip].ids[0, :, None])[:, 0]

    def prompt_ids(self, case: Case) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and its completion after the placeholders were repeated, of vidreason and of vLLM.

        The placeholders of images and of videos count as one token: InternVL's processor repeats that of images in
        videos, and vLLM that of videos.
        """
        vlm, texts = self.vlms[False], self.texts[case.clip]
        mine = self.encoded[case.clip].inputs["input_ids"][0].tolist() + texts.ids[0].tolist()
        names = [vlm.processor.image_token, vlm.processor.video_token]
        image, video = vlm.tokenizer.convert_tokens_to_ids(names)
        told = self.answers[self.cases.index(case)]["ids"]
        return [video if i == image else i for i in mine], [video if i == image else i for i in told]

    def differences(self) -> dict[Case, float]:
        """The largest absolute difference of each case, in nats."""
        return {case: float((self.ours(case) - self.theirs(case)).abs().max()) for case in self.cases}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compared]:
    """Starts vLLM once for each family."""
    made: dict[str, Compared] = {}

    def compare(name: str) -> Compared:
        if name not in made:
            made[name] = Compared(FAMILIES[name], tmp_path_factory.mktemp("family"))
        return made[name]

    return compare


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """Figures by family; printed at the end (``-s`` shows them), and written to VIDREASON_PARITY_JSON if it is set."""
    found: dict[str, Any] = {}
    yield found
    for family, of_family in found.items():
        print(f"\n{family}: {of_family['versions']}, tolerance {of_family['tolerance']:.1e}")
        for case, difference in of_family["differences"].items():
            print(f"  {case:<54} {difference:.1e}")
    path = os.environ.get("VIDREASON_PARITY_JSON")
    write_json(Path(path) if path else None, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_equal_those_of_vllm(compared: Callable[[str], Compared], figures: dict[str, Any], name: str) -> None:
    pair = compared(name)
    for case in pair.cases:
        mine, theirs = pair.prompt_ids(case)
        assert mine == theirs, f"{case}: the prompts differ"
    found, tolerance = pair.differences(), pair.tolerance
    figures[name] = {
        "versions": pair.versions,
        "tolerance": tolerance,
        "differences": {str(case): difference for case, difference in found.items()},
    }
    base, tuned = (pair.ours(Case(FAMILIES[name].clips[0], adapter, embedded=False)) for adapter in (False, True))
    assert (base - tuned).abs().max() > 0.01, "the adapter changes nothing"
    assert max(found.values()) < tolerance, found


def test_positions_of_transformers_break_parity(
    compared: Callable[[str], Compared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the comparison can fail: transformers lets text start before the last time of a video."""
    pair = compared("Qwen2.5-VL")

    def stock(self: VLM, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        positions: Tensor = model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
        return positions

    monkeypatch.setattr(QwenVL, "position_ids", stock)
    found = pair.differences()
    beyond = [found[case] for case in pair.cases if case.clip.frames == 16 and case.clip.rate <= 4]
    assert min(beyond) > 100 * TOLERANCE, found
