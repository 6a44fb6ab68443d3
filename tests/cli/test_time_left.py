"""How long a pipeline will still take: told from an earlier run of the folder, and only as far as that tells."""

import json
import re
from pathlib import Path

import pytest

from vidreason.callbacks.progress import RunProgress
from vidreason.callbacks.time_left import BEHIND, Behind, pipeline_left
from vidreason.cli import pipeline_run
from vidreason.cli.demo import later_methods
from vidreason.cli.pipeline import main, run_pipeline
from vidreason.cli.pipeline_commands import Commands
from vidreason.cli.pipeline_state import NOTHING, RunState, StageRecord

PIPELINE = """
name: three
stages:
  - {name: generate, command: predict, config: a.yaml}
  - {name: train, command: fit, config: a.yaml, inputs: {model.init_args.traces: "{generate.traces}"}}
  - {name: again, command: predict, config: a.yaml, inputs: {model.init_args.adapter_path: "{train.adapter}"}}
"""
TOOK = {"generate": 30.0, "train": 600.0, "again": 90.0}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """``runs(*options)``: what was behind each stage that ran, by the stage's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline_run, "fingerprint_embedded_weights", lambda: "base")
    Path("p.yaml").write_text(PIPELINE)
    Path("a.yaml").write_text("trainer: {max_steps: 3}\n")
    seen: dict[str, Behind | None] = {}

    def run(argv: list[str]) -> int:
        folder = Path(argv[argv.index("--run_dir") + 1])
        seen[folder.name[3:]] = BEHIND.get()
        artefact = folder / ("adapter/weights" if argv[0] == "fit" else "traces.jsonl")
        artefact.parent.mkdir(parents=True, exist_ok=True)
        artefact.write_text(json.dumps(argv))
        return 0

    def call(*options: str, later: Behind = NOTHING) -> dict[str, Behind | None]:
        seen.clear()
        argv = ["--config", "p.yaml", "--run_dir", "runs/x", *options]
        assert run_pipeline(argv, Commands(run, lambda argv: None, lambda argv: None), later) == 0
        return dict(seen)

    return call


def record_times(took: dict[str, float]) -> None:
    path = Path("runs/x/state.json")
    state = json.loads(path.read_text())
    for name, seconds in took.items():
        state["stages"][name]["wall_seconds"] = seconds
    path.write_text(json.dumps(state))


def test_a_first_run_knows_only_that_it_knows_nothing(runs, capsys):
    assert runs() == {"generate": Behind(0, False), "train": Behind(0, False), "again": Behind(0, True)}
    assert "time left" not in capsys.readouterr().out
    assert BEHIND.get() is None


def test_a_run_that_is_repeated_adds_up_what_is_behind_each_stage(runs, capsys):
    runs()
    record_times(TOOK)
    capsys.readouterr()
    seen = runs("--seed", "1")
    assert seen == {"generate": Behind(690, True), "train": Behind(90, True), "again": Behind(0, True)}
    said = re.findall(r"time left for all: (.+?)\)", capsys.readouterr().out)
    assert said == ["about 12 min", "about 12 min", "about 2 min"]  # 720, 690 and 90 s


def test_it_ends_with_the_last_stage_asked_for_and_goes_on_with_what_is_later(runs):
    runs()
    record_times(TOOK)
    seen = runs("--seed", "1", "--until", "train", later=Behind(7, complete=False))
    assert seen == {"generate": Behind(607, False), "train": Behind(7, False)}


def test_stages_that_are_unknown_make_it_a_lower_bound(runs):
    runs("--until", "train")
    record_times({"generate": 30.0, "train": 600.0})
    assert runs("--seed", "1")["generate"] == Behind(600, False)


def test_the_demo_counts_the_methods_behind(tmp_path):
    for method, state in {
        "label_sft": {"sft_label": StageRecord("finished", "", {}, wall_seconds=60)},
        "rb_ft": {
            "generate": StageRecord("finished", "", {}, wall_seconds=5),
            "sft_rationale": StageRecord("interrupted", "", {}, wall_seconds=50),
        },
    }.items():
        RunState(method, stages=state).save(tmp_path / method)
    assert later_methods(tmp_path, ["label_sft"]) == Behind(60, complete=False)  # its test was never finished
    assert later_methods(tmp_path, ["label_sft", "rb_ft"]) == Behind(65, complete=False)
    assert later_methods(tmp_path, []) == Behind(0, complete=True)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "about 0 s"), (89, "about 89 s"), (90, "about 2 min"), (5399, "about 90 min"), (5400, "about 1.5 h")],
)
def test_units_follow_the_length(seconds, said):
    assert pipeline_left(seconds, Behind(0, complete=True)) == said


def test_the_bar_adds_the_rest_of_its_stage():
    class Bar:
        total, n, initial, disable = 10, 6, 2, False
        format_dict = {"elapsed": 40.0}  # four batches, ten seconds each: four more take 40

    bars = RunProgress()
    assert bars._pipeline(Bar()) == {}
    token = BEHIND.set(Behind(100, complete=True))
    try:
        assert bars._pipeline(Bar()) == {"pipeline": "about 2 min left"}
        Bar.n = 2
        assert bars._pipeline(Bar()) == {}
    finally:
        BEHIND.reset(token)


def test_a_finished_pipeline_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    calls: list[int] = [0, 0, 1]
    monkeypatch.setattr("vidreason.cli.pipeline.run_pipeline", lambda argv: calls.pop(0))
    whole = ["--config", "configs/pipelines/zero_shot.yaml", "--run_dir", "runs/my run"]
    said = "next: vidreason classify new_clip.mp4 --run 'runs/my run'"
    for options, expected in ((whole, True), ([*whole, "--until", "test"], False), (whole, False)):
        main(options)
        assert (said in capsys.readouterr().out) is expected
