"""Nothing but labels and the base's own texts is a training target of the four methods; ``teacher`` is the fifth.

The shipped pipelines run with their shipped configs, only fewer clips, steps and tokens. Every target is taken down
where the stage hands it to the training loop, and the world's facts are gone before the first stage starts.
"""

import json

import pytest

from vidreason.datamodules.porch.data import PorchDataModule
from vidreason.datamodules.porch.texts import RULES
from vidreason.datamodules.traces import TraceStore
from vidreason.demo.run import METHODS
from vidreason.lightning_modules.base import VLMModule
from vidreason.pipelines.call import run_pipeline
from vidreason.pipelines.spec import read_pipeline
from vidreason.rewards.completion import render_completion, render_reasoning

SMALL = {"train_clips": 8, "val_clips": 2, "cal_clips": 2, "test_clips": 2, "levels": [0]}
EVERYWHERE = {
    **{f"data.init_args.{name}": value for name, value in SMALL.items()},
    "data.init_args.num_workers": 0,
    "trainer.limit_val_batches": 0,
}
GENERATE = {"model.init_args.traces.samples": 1, "model.init_args.traces.judge": False}  # too few clips for a verdict
STAGES = {
    "label_sft": {"sft_label": {"trainer.max_steps": 1}},
    "rb_ft": {"generate": GENERATE, "sft_rationale": {"trainer.max_steps": 1}, "sft_label": {"trainer.max_steps": 1}},
    "deepintuit": {
        "generate": GENERATE,
        "sft_cold_start": {"trainer.max_steps": 1},
        "grpo": {
            "trainer.max_steps": 1,
            "trainer.val_check_interval": 1,
            "model.init_args.batch_size": 2,
            "model.init_args.rollouts.group_size": 2,
            "model.init_args.rollouts.sampling.max_new_tokens": 8,
        },
        "traces": {
            "model.init_args.traces.samples": 1,
            "model.init_args.traces.sampling.max_new_tokens": 16,
        },
        "calibration": {
            "trainer.max_steps": 1,
            "model.init_args.traces.samples": 1,
            "model.init_args.traces.sampling.max_new_tokens": 16,
        },
    },
}
TRAINED = {"label_sft": "sft_label", "rb_ft": "sft_label", "deepintuit": "calibration", "teacher": "sft_cold_start"}


@pytest.fixture
def taught(monkeypatch):
    """``{stage name: {video id: texts}}`` of every stage that has begun to train, as its training loop gets them."""
    found = {}
    original = VLMModule.on_train_start

    def on_train_start(self):
        view = self.data.view
        found[self.stage_name] = {clip.video_id: view.texts(clip) for clip in self.data.clips("train")}
        original(self)

    monkeypatch.setattr(VLMModule, "on_train_start", on_train_start)
    return found


def run(method, stages, *more):
    line = ["--config", f"configs/pipelines/{method}.yaml", "--run_dir", f"runs/{method}", "--until", TRAINED[method]]
    for prefix, settings in [("", EVERYWHERE), *((f"{name}.", values) for name, values in stages.items())]:
        for key, value in settings.items():
            line += [f"--{prefix}{key}", json.dumps(value)]
    assert run_pipeline([*line, *more]) == 0


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The rendered world without its facts; returns it and the facts that were written about it."""
    monkeypatch.chdir(tmp_path)
    data = PorchDataModule(**SMALL)
    data.prepare_data()
    rows = [json.loads(line) for line in (data.folder / "facts.jsonl").read_text().splitlines()]
    (data.folder / "facts.jsonl").unlink()
    return data, rows


def own_texts(folder):
    return {name: [r.text.strip() for r in group] for name, group in TraceStore.open(folder).by_video(False).items()}


@pytest.mark.slow
def test_targets_are_labels_and_the_bases_own_texts(world, taught, tmp_path):
    data, rows = world
    assert all(any(rule in row["rationale"] for rule in RULES.values()) for row in rows), (
        "the search can find something"
    )
    labels = {clip.video_id: clip.label for clip in data.clips("train")}
    assert set(METHODS) == {"zero_shot", *STAGES}
    assert {stage.command for stage in read_pipeline("configs/pipelines/zero_shot.yaml").stages} == {"test"}
    seen = {}
    for method, stages in STAGES.items():
        run(method, stages, *(["--use", "generate=runs/rb_ft"] if method == "deepintuit" else []))
        seen[method] = dict(taught)
        taught.clear()
    assert {method: set(stages) for method, stages in seen.items()} == {
        "label_sft": {"sft_label"},
        "rb_ft": {"sft_rationale", "sft_label"},
        "deepintuit": {"sft_trace", "grpo", "calibration"},
    }

    described = own_texts(tmp_path / "runs/rb_ft/stages/01_generate/traces.jsonl")
    reasoned = own_texts(tmp_path / "runs/deepintuit/stages/04_traces/traces.jsonl")

    def swapped(name):
        """Traces about other clips, each with that clip's own label, of which only the answer is learnt."""
        others = {text.text for text in seen["deepintuit"]["sft_trace"][name] if text.learnt == "answer"}
        assert others <= {render_completion(t, labels[o]) for o in labels if o != name for t in described[o]}
        return others

    allowed = {
        "sft_label": lambda name: {labels[name]},
        "sft_rationale": lambda name: set(described[name]),
        "sft_trace": lambda name: {render_completion(text, labels[name]) for text in described[name]} | swapped(name),
        "grpo": lambda name: set(),
        "calibration": lambda name: {f"<answer>{labels[name]}</answer>", *map(render_reasoning, reasoned[name])},
    }
    for stages in seen.values():
        for stage, targets in stages.items():
            assert set(targets) == set(labels)
            assert any(targets.values()) == (stage != "grpo")
            for name, texts in targets.items():
                assert {text.text for text in texts} <= allowed[stage](name), (stage, name)
                found = [rule for rule in RULES.values() for text in texts if rule.lower() in text.text.lower()]
                assert not found, (stage, name)
    assert not list((tmp_path / "runs").rglob("facts.jsonl")), "no stage asked for the facts"


@pytest.mark.slow
def test_the_teacher_is_an_option_of_its_own(world, taught, tmp_path):
    data, rows = world
    assert "teacher" not in METHODS
    run("teacher", {"sft_cold_start": {"trainer.max_steps": 1}})
    store = TraceStore.open(tmp_path / "runs/porch_teacher.traces")
    assert store.header.external
    written = {row["video_id"]: row["rationale"] for row in rows}
    for clip in data.clips("train"):
        assert [t.text for t in taught["sft_trace"][clip.video_id] if t.learnt == "all"] == [
            render_completion(written[clip.video_id], clip.label)
        ]
