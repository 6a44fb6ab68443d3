"""Log-probabilities of completions behind videos against vLLM, an independent implementation of every family.

``make parity`` runs these tests; ``make_environment.sh`` makes the environment that they need.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import family_builders as others
import hybrid_builders as hybrids
import pytest
import torch
import transformers
import vlm_builders as builders
from torch import Tensor

from vidreason.datamodules.types import Example, FrameTiming
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.gemma4 import Gemma4
from vidreason.lightning_modules.vlms.internvl import InternVL
from vidreason.lightning_modules.vlms.llava_onevision import LlavaOnevision
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions, save_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY
from vidreason.lightning_modules.vlms.prefix.layout import unwrap
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.qwen3 import GLM4V, Qwen3VL
from vidreason.lightning_modules.vlms.text import chat

PYTHON = os.environ.get("VIDREASON_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="VIDREASON_VLLM_PYTHON is not set: it names the Python of an environment with vLLM, which "
        "tests/parity/make_environment.sh makes",
    ),
]
WORKER = Path(__file__).with_name("vllm_worker.py")
TOLERANCE = 1e-4
RANK = 8
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 64, the smallest that vLLM's attention on the CPU takes."""


class Clip(NamedTuple):
    """A clip of noise, of which every frame is taken."""

    frames: int
    size: tuple[int, int]
    rate: float


CLIPS = (
    Clip(16, (56, 56), 8.0),
    Clip(16, (56, 56), 4.0),
    Clip(16, (56, 56), 1.0),
    Clip(2, (112, 56), 4.0),
    Clip(8, (28, 84), 1.0),
)
"""At 4 and 1 frames per second, the times of 16 frames reach beyond a spatial grid of 2 x 2."""
SLOW = tuple(clip._replace(rate=clip.rate / 4) for clip in CLIPS)
"""Pairs of frames begin at whole seconds. GLM-4.6V's processor writes tenths, which vLLM rounds down."""


def qwen_embeddings(model: Any, inputs: Mapping[str, Tensor], clip: Clip) -> dict[str, Any]:
    """Embeddings of a video of Qwen2-VL or Qwen2.5-VL as vLLM takes them."""
    grids = inputs["video_grid_thw"]
    features = model.model.get_video_features(inputs["pixel_values_videos"], grids)
    times = {name: inputs[name] for name in ("second_per_grid_ts",) if name in inputs}
    return {"video_embeds": torch.cat(list(features.pooler_output)), "video_grid_thw": grids, **times}


def qwen3_embeddings(model: Any, inputs: Mapping[str, Tensor], clip: Clip) -> dict[str, Any]:
    """Embeddings of a video of Qwen3-VL or Qwen3.5 as vLLM takes them: those of DeepStack side by side, with times."""
    grids = inputs["video_grid_thw"]
    features = model.model.get_video_features(inputs["pixel_values_videos"], grids)
    layers = getattr(features, "deepstack_features", None) or ()
    parts = [part if isinstance(part, Tensor) else torch.cat(list(part)) for part in (features.pooler_output, *layers)]
    times = [(first + 0.5) / clip.rate for first in range(0, clip.frames, 2)]  # of the middle of two frames
    return {"video_embeds": torch.cat(parts, dim=-1), "video_grid_thw": grids, "timestamps": [times]}


class Family(NamedTuple):
    """A model family with what differs between families in these tests."""

    vlm: type[VLM]
    write: Callable[..., Path]
    sizes: Mapping[str, Any]
    embeddings: Callable[[Any, Mapping[str, Tensor], Clip], dict[str, Any]] | None = None
    """Returns the embeddings of a video as vLLM takes them; None if it takes pixels only."""
    dtype: str = "float32"
    adapter: bool = True
    """Whether vLLM takes LoRA adapters of this family."""
    clips: tuple[Clip, ...] = CLIPS


MROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
INTERLEAVED = {**MROPE, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
WHOLE = {**MROPE, "partial_rotary_factor": 1.0}
HALF = {**INTERLEAVED, "mrope_section": [6, 5, 5], "partial_rotary_factor": 0.5}
SMALL_GEMMA = {"head_dim": 64, "global_head_dim": 128, "use_bidirectional_attention": None}
"""As in E2B and E4B. In larger models visual tokens see each other, which vLLM's attention on the CPU leaves out."""
FAMILIES = {
    "Qwen2.5-VL": Family(QwenVL, builders.write_qwen, {"rope_parameters": MROPE}, qwen_embeddings),
    "Qwen2-VL": Family(QwenVL, builders.write_qwen, {"rope_parameters": MROPE, "two": True}, qwen_embeddings),
    "Qwen3-VL": Family(Qwen3VL, others.write_qwen3, {"head_dim": 64, "rope_parameters": INTERLEAVED}, qwen3_embeddings),
    "GLM-4.1V": Family(GLM4V, others.write_glm, {"rope_parameters": WHOLE}),
    "GLM-4.6V": Family(GLM4V, others.write_glm, {"rope_parameters": WHOLE, "newer": True, "flash": True}, clips=SLOW),
    "InternVL3": Family(InternVL, others.write_internvl, {}),
    "LLaVA-OneVision": Family(LlavaOnevision, others.write_llava_onevision, {}, adapter=False),
    "LLaVA-NeXT-Video": Family(LlavaOnevision, others.write_llava_next_video, {"image": 32, "patch": 4}),
    "Gemma 4": Family(Gemma4, hybrids.write_gemma4, SMALL_GEMMA),
    "Qwen3.5": Family(
        Qwen3VL,
        hybrids.write_qwen3_5,
        {"head_dim": 64, "rope_parameters": HALF, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        qwen3_embeddings,
        "bfloat16",
    ),
}


class Case(NamedTuple):
    """One completion behind one clip, and how vLLM is asked for it."""

    clip: Clip
    adapter: bool
    embedded: bool


def example_of(clip: Clip, seed: int) -> Example:
    made = builders.make_example(prompt=builders.PROMPTS[1], frames=clip.frames, size=clip.size, seed=seed)
    timing = FrameTiming(fps=clip.rate, total_frames=clip.frames, indices=tuple(range(clip.frames)))
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
        "embeddings": None,
        "adapter": None,
    }


def ask_vllm(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the worker on a job."""
    assert PYTHON is not None
    folder.mkdir()
    torch.save(job, folder / "requests.pt")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([PYTHON, str(WORKER), str(folder)], env=environment, capture_output=True, text=True)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"vLLM failed:\n{(done.stdout + done.stderr)[-6000:]}"
    answers: dict[str, Any] = torch.load(folder / "answers.pt")
    return answers


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
                    request["embeddings"] = family.embeddings(unwrap(self.models[False]), inputs, case.clip)
            requests.append(request)
        job = {"model": path, "dtype": family.dtype, "rank": RANK, "requests": requests}
        told = ask_vllm(folder / "job", job)
        self.versions: dict[str, str] = told["versions"]
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
def table() -> Iterator[list[tuple[str, str, Case, float]]]:
    """Rows of family, versions, case and difference; printed at the end (``-s`` shows them)."""
    rows: list[tuple[str, str, Case, float]] = []
    yield rows
    for (family, versions), of_family in groupby(rows, key=lambda row: row[:2]):
        print(f"\n{family}: vidreason with transformers {transformers.__version__}; {versions}")
        for _, _, case, difference in of_family:
            adapter, kind = "LoRA" if case.adapter else "base", "embeddings" if case.embedded else "pixels"
            height, width = case.clip.size
            clip = f"{case.clip.frames} frames of {height} x {width} at {case.clip.rate:g} fps"
            print(f"  {clip:<36} {adapter:<5} {kind:<11} {difference:.1e}")


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_equal_those_of_vllm(
    compared: Callable[[str], Compared], table: list[tuple[str, str, Case, float]], name: str
) -> None:
    pair = compared(name)
    for case in pair.cases:
        mine, theirs = pair.prompt_ids(case)
        assert mine == theirs, f"{case}: the prompts differ"
    found = pair.differences()
    versions = ", ".join(f"{library} {version}" for library, version in pair.versions.items())
    table += [(name, versions, case, difference) for case, difference in found.items()]
    base, tuned = (pair.ours(Case(FAMILIES[name].clips[0], adapter, embedded=False)) for adapter in (False, True))
    assert (base - tuned).abs().max() > 0.01, "the adapter changes nothing"
    assert max(found.values()) < pair.tolerance, found


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
