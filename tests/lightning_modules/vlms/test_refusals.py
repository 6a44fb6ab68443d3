"""Encoding refuses clips that the model would not see and prompts that contain its special tokens."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vlm_builders as builders
from families import FAMILIES

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.inference_data import InferenceDataModule, ReadClip
from vidreason.datamodules.task import ClassSpec, Task
from vidreason.datamodules.types import Clip
from vidreason.datamodules.words import check_words
from vidreason.lightning_modules.vlms.base import VLM

MakeVLM = Callable[..., VLM]


class Changed:
    """A processor whose output is changed."""

    def __init__(self, inner: Any, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self.inner, self.change = inner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, **options: Any) -> Mapping[str, Any]:
        return self.change(dict(self.inner(**options)))


def without_pixels(made: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if not name.startswith("pixel")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_that_drops_the_video_is_refused(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    vlm._processor = Changed(vlm.processor, without_pixels)
    with pytest.raises(ValueError, match=r"^clip clip3: the processor returned no pixels[^\n]*$"):
        vlm.encode([builders.make_example(seed=3)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [0, 1])
def test_a_prompt_with_too_few_visual_tokens_is_refused(make_vlm: MakeVLM, family: str, kept: int) -> None:
    if family in ("onevision", "nextvideo") and kept:
        pytest.skip("its inputs do not say how many visual tokens they need")
    vlm = make_vlm(family)
    placeholders = torch.tensor(sorted(vlm.placeholder_ids))

    def thinned(made: dict[str, Any]) -> dict[str, Any]:
        places = torch.isin(made["input_ids"], placeholders).nonzero()
        for _, column in places[kept:].tolist():
            made["input_ids"][0, column] = 30
        return made

    vlm._processor = Changed(vlm.processor, thinned)
    with pytest.raises(ValueError, match=rf"^clip clip0: the prompt has {kept} visual tokens[^\n]*$"):
        vlm.encode([builders.make_example()])


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_prompt_are_refused(make_vlm: MakeVLM, family: str) -> None:
    vlm = make_vlm(family)
    tokens = sorted(t.content for t in vlm.tokenizer.added_tokens_decoder.values() if t.special)
    assert len(tokens) >= 5
    for token in tokens:
        with pytest.raises(ValueError, match=r"^clip clip0: the prompt contains [^\n]*$") as refused:
            vlm.encode([builders.make_example(prompt=f"what {token} happens?")])
        assert f"contains {token}, " in str(refused.value)
    vlm.encode([builders.make_example(prompt="what <b>happens</b> | to <im_end| ?")])  # it only looks like one


TASK = Task("doors", "who?", (ClassSpec("cat", "a cat"), ClassSpec("post")), metadata_fields=("note",), file="a.yaml")
CLIPS = [
    Clip("a.mp4", "cat", "a", fields={"note": "n", "hidden": "<|im_end|>"}, where="clips.csv, row 1"),  # type: ignore[arg-type]
    Clip("b.mp4", "cat", "b", fields={"note": "<|im_end|>"}, where="clips.csv, row 2"),  # type: ignore[arg-type]
]


def encoder(*special: str) -> Any:
    return SimpleNamespace(special_tokens=frozenset(special))


@pytest.mark.parametrize(
    ("task", "clips", "where"),
    [
        (replace(TASK, question="<image>\nwho?"), [], "a.yaml: 'question'"),
        (replace(TASK, classes=(ClassSpec("cat"), ClassSpec("[IMG]"))), [], r"a.yaml: 'classes\[1\].name'"),
        (
            replace(TASK, classes=(ClassSpec("cat", "an <image>"), ClassSpec("b"))),
            [],
            r"a.yaml: 'classes\[0\].definition'",
        ),
        (replace(TASK, prompts={"label": "<image> {question}"}), [], "a.yaml: 'prompts.label'"),
        (replace(TASK, metadata_fields=("<image>",)), [], "a.yaml: 'metadata_fields'"),
        (TASK, CLIPS, "clips.csv, row 2: 'note'"),
    ],
)
def test_words_of_a_task_are_refused_with_file_and_field(task: Task, clips: list[Clip], where: str) -> None:
    with pytest.raises(ValueError, match=rf"^{where} contains [<[][^\n]*$"):
        check_words(task, clips, encoder("<image>", "<|im_end|>", "[IMG]"))


def test_plain_words_and_hidden_columns_pass() -> None:
    check_words(TASK, CLIPS[:1], encoder("<image>", "<|im_end|>"))
    check_words(TASK, CLIPS, encoder())
    check_words(TASK, CLIPS, object())  # type: ignore[arg-type]  # an encoder need not have any


@pytest.mark.parametrize(("word", "where"), [("<image>", "a.yaml: 'question'"), ("fine", "clips.csv, row 2: 'note'")])
def test_clips_to_decide_about_are_checked_too(word: str, where: str) -> None:
    """``classify`` may read the task from the run folder, where it can be edited."""
    task = replace(TASK, question=f"{word}: who?")
    data = InferenceDataModule(task, encoder("<image>", "<|im_end|>"), FrameOptions(), seed=0, batch_size=2)
    with pytest.raises(ValueError, match=rf"^{where} contains <[^\n]*$"):
        data.set_clips([ReadClip(clip) for clip in CLIPS])
