"""A folder from anyone: what is no option of this program, or of another form, is one error with file and key."""

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from vidreason.answering.exported import ExportedClips, ExportInfo
from vidreason.datamodules.clips import time_limit
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.time_limit import ReadTimeoutError
from vidreason.datamodules.prompts import ReviewInput
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.export import card, clips
from vidreason.export.write import _check_difference
from vidreason.lightning_modules.functional.finite import NonFiniteError, check_weights
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.completion import CompletionForm

REVIEW = {"by": "review", "input": "video+trace", "temperature": 2, "samples": 4, "clips_per_forward": None, "seed": 0}
REVIEW |= {"sampling": asdict(Sampling()), "form": asdict(CompletionForm())}
VLM = {"model_type": "qwen2_vl", "max_pixels": None, "chat_template_kwargs": {}, "quantize": "none", "dtype": "auto"}
VLM |= {"attn_implementation": "sdpa", "route": "auto", "completion_chunk": None, "text_memory_gb": None}
ENTRY = {
    "version": 1,
    "run": {"name": "mine", "stage": "calibration", "task_sha": "a"},
    "vlm": VLM,
    "decide": REVIEW,
    "frames": asdict(FrameOptions()),
    "base": {"name": "org/base", "path": None},
    "merged": False,
    "precision": "32-true",
    "weights_sha": "b",
    "policy_sha": None,
    "threshold": None,
    "check": {},
}


@pytest.mark.parametrize("shown", get_args(ReviewInput))
def test_a_calibrator_of_every_input_can_be_read_again(shown: str, tmp_path: Path) -> None:
    assert read(tmp_path, {"export": {**ENTRY, "decide": {**REVIEW, "input": shown}}}).decide["input"] == shown


def read(folder: Path, content: object) -> ExportInfo:
    (folder / "vidreason.json").write_text(json.dumps(content))
    return ExportInfo.read(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vlm.attn_implementation", "owner/kernel", "'owner/kernel', and not one of eager, sdpa, flash_attention_2"),
        ("vlm.trust_remote_code", True, "unknown to this version; it takes max_pixels, "),
        ("vlm.scale", "3b", "unknown to this version"),
        ("vlm.model_type", 3, "3, and not a text"),
        ("vlm", [1], "[1], and not a mapping"),
        ("run", 5, "5, and not a mapping"),
        ("run.stage", ..., "missing"),
        ("decide.by", "dice", "'dice', and not one of likelihood, answer, review"),
        ("decide.temperature", "hot", "'hot', and not a number"),
        ("decide.seed", 1.5, "1.5, and not a whole number"),
        ("decide.samples", ..., "missing"),
        ("decide.sampling.top_k", None, "None, and not a whole number"),
        ("decide.form.mode", "shout", "'shout', and not one of think, no_think, answer_first"),
        ("frames.num_frames", "8", "'8', and not a whole number"),
        ("frames.colour", "grey", "unknown to this version"),
        ("base.path", 1, "1, and not a text or null"),
        ("merged", 1, "1, and not true or false"),
        ("threshold", {"confidence": 0.5}, None),
        ("check", ..., "missing"),
        ("extra", 1, "unknown to this version"),
    ],
)
def test_another_form_is_one_error_with_file_and_key(tmp_path: Path, key: str, value: object, message: str) -> None:
    assert read(tmp_path, {"export": ENTRY}).run["name"] == "mine"
    entry = deepcopy(ENTRY)
    *outer, last = key.split(".")
    place: dict = entry
    for name in outer:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ValueError, match=r"vidreason\.json: export\.") as refused:
        read(tmp_path, {"export": entry})
    said = str(refused.value)
    assert f"export.{key} is {message}" in said if message else "export.threshold.temperature is missing" in said
    assert "\n" not in said


@pytest.mark.parametrize("content", [[], [1], 5, "text", None, {"export": []}, {"export": 3}, {"export": None}])
def test_a_file_with_something_else_on_top(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match=r"vidreason\.json: (a \w+ and not a mapping|export version None)"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "content", [[], 5, {"a": 1}, {"a": {"id": 3, "fields": {}}}, {"a": {"id": "x", "fields": [1]}}]
)
def test_clips_of_another_form(tmp_path: Path, content: object) -> None:
    file = tmp_path / "clips.json"
    file.write_text(json.dumps({"a": {"id": "x", "fields": {"place": "garden"}}}))
    ExportedClips(file, None)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"clips\.json: damaged \(.*\); delete it, or export the run again"):
        ExportedClips(file, None)


def test_the_card_of_a_reviewer_without_traces_speaks_of_none() -> None:
    info = ExportInfo(**ENTRY)
    assert "averaged over 4 traces and divided by a temperature of 2." in card._decides(info)
    alone = ExportInfo(**{**ENTRY, "decide": {**REVIEW, "input": "video"}})
    facts = SimpleNamespace(
        task=Task.from_labels("falls", ("fall", "walk")),
        entry=alone,
        kinds=card.Kinds("adapter", "adapter"),
        script="script",
        clips=[Clip(Path("a.mp4"), "fall", "a")],
        data_sha="c",
        four_bit=False,
        info={},
    )
    alone = ExportInfo(**{**ENTRY, "decide": {**REVIEW, "input": "video"}, "check": CHECK})
    facts.entry = alone
    said = "".join(part(facts) for part in (card._what, card._how, card._data, card._limits))
    assert "trace" not in said
    assert "by the likelihoods of the class names behind the prompt, divided by a temperature of 2." in said
    facts.entry = ExportInfo(**{**ENTRY, "check": CHECK})
    assert all("trace" in part(facts) for part in (card._what, card._how, card._data, card._limits))


CHECK = {"difference": 1e-7, "values": 4, "clips": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_that_are_no_numbers_are_refused_in_every_dtype(dtype: str) -> None:
    opened = SimpleNamespace(module=SimpleNamespace(vlm=SimpleNamespace(dtype=dtype, quantize="none")))
    _check_difference(opened, False, 1e-6, Path("out"))
    for difference in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--out out: log-probabilities of the run or .* are not finite"):
            _check_difference(opened, False, difference, Path("out"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_are_refused_in_every_dtype(dtype: torch.dtype) -> None:
    weights = torch.tensor([1.0, 2.0]).to(dtype)
    check_weights({"w": weights}, "here", "train again")
    with pytest.raises(NonFiniteError, match="here: 1 of 1 weights are not finite, such as w: train again"):
        check_weights({"w": torch.tensor([1.0, torch.nan]).to(dtype)}, "here", "train again")


def test_clips_on_a_mount_that_went_away_cost_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sizes were still known, as of a mount that died a moment ago."""
    calls: list[str] = []
    paths = [tmp_path / place / f"{i}.mp4" for place in ("dead", "fine") for i in range(20)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.name.encode() * (1 + ("fine" in path.parts)))

    def reader(function, path, *args, timeout):
        if "dead" in path.parts and function.__name__ != "_call_each":
            calls.append(f"{function.__name__} {path.name}")
            raise ReadTimeoutError(f"{path}: still not read")
        return function(path, *args)

    monkeypatch.setattr(time_limit, "call_reader", reader)
    monkeypatch.setattr(clips, "call_reader", reader)
    monkeypatch.setattr("vidreason.datamodules.clips.mounts._MOUNTS", tmp_path / "none")
    opened = SimpleNamespace(
        clips=tuple(Clip(path, "a", path.name) for path in paths),
        data=SimpleNamespace(test_split_names=(), frames=FrameOptions(timeout=None)),
        task=SimpleNamespace(metadata_fields=()),
    )
    assert clips.write_clips(opened, tmp_path / "clips.json") == (20, 20)
    assert calls == ["_look_at 0.mp4"]
