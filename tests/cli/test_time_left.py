"""How long a pipeline will still take: from an earlier run of the folder, else from what its stages have to do."""

import json
import re
import time
from dataclasses import astuple
from pathlib import Path

import pytest

from vidreason.callbacks.progress import RunProgress
from vidreason.callbacks.time_left import Behind, announced, pipeline_left, speeds, what_is_behind
from vidreason.cli import stage_inputs
from vidreason.cli.demo import METHODS, other_methods
from vidreason.cli.pipeline import main, open_pipeline
from vidreason.cli.pipeline_commands import Commands, StageSize
from vidreason.cli.pipeline_state import RunState, StageRecord
from vidreason.cli.timetable import Timetable
from vidreason.lightning_modules.work import Work

PIPELINE = """
name: three
stages:
  - {name: generate, command: predict, config: a.yaml}
  - {name: train, command: fit, config: a.yaml, inputs: {model.init_args.traces: "{generate.traces}"}}
  - {name: again, command: predict, config: a.yaml, inputs: {model.init_args.adapter_path: "{train.adapter}"}}
"""
WORKS = {"generate": Work(clips_read=30), "train": Work(clips_learnt=600), "again": Work(clips_read=90)}
TOOK = {"generate": 30.0, "train": 600.0, "again": 90.0}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """``runs(*options)``: what was behind each stage that ran, by the stage's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage_inputs, "fingerprint_embedded_weights", lambda: "base")
    Path("p.yaml").write_text(PIPELINE)
    Path("a.yaml").write_text("trainer: {max_steps: 3}\n")
    seen: dict[str, Behind | None] = {}

    def run(argv: list[str]) -> int:
        folder = Path(argv[argv.index("--run_dir") + 1])
        seen[folder.name[3:]] = what_is_behind()
        artefact = folder / ("adapter/weights" if argv[0] == "fit" else "traces.jsonl")
        artefact.parent.mkdir(parents=True, exist_ok=True)
        artefact.write_text(json.dumps(argv))
        return 0

    def call(
        *options: str, later: Behind | None = None, works: dict[str, Work] | None = None
    ) -> dict[str, Behind | None]:
        seen.clear()

        def size(argv: list[str]) -> StageSize:
            return StageSize(None, (works or {}).get(Path(argv[argv.index("--run_dir") + 1]).name[3:]))

        argv = ["--config", "p.yaml", "--run_dir", "runs/x", *options]
        pipeline = open_pipeline(argv, Commands(run, lambda argv: None, size))
        pipeline.later = later or Behind()
        assert pipeline.run() == 0
        return dict(seen)

    return call


def record_times(took: dict[str, float]) -> None:
    path = Path("runs/x/state.json")
    state = json.loads(path.read_text())
    for name, seconds in took.items():
        state["stages"][name]["wall_seconds"] = seconds
    path.write_text(json.dumps(state))


def test_a_first_run_of_stages_that_say_nothing_knows_nothing(runs, capsys):
    assert runs() == {"generate": Behind(0, False), "train": Behind(0, False), "again": Behind(0, True)}
    assert "time left" not in capsys.readouterr().out
    assert what_is_behind() is None


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


def test_a_first_run_knows_what_is_to_be_done(runs, capsys):
    seen = runs(works=WORKS)
    assert seen["generate"].untimed == (WORKS["train"], WORKS["again"])
    assert seen["generate"].running == WORKS["generate"]
    assert seen["train"].untimed == (WORKS["again"],)
    assert [work for work, _ in seen["again"].timed] == [WORKS["generate"], WORKS["train"]]
    assert all(behind.complete for behind in seen.values())
    said = re.findall(r"\] (\w+)  \(time left for all: (\w+)", capsys.readouterr().out)
    assert said == [("train", "roughly"), ("again", "roughly")], "the first stage cannot tell how fast this machine is"


def test_stages_of_which_one_says_nothing_make_it_a_lower_bound(runs):
    works = {name: work for name, work in WORKS.items() if name != "again"}
    assert not runs(works=works)["generate"].complete


def test_the_demo_counts_the_methods_behind(tmp_path):
    def of(method: str, state: dict[str, StageRecord]) -> object:
        RunState(method, stages=state).save(tmp_path / method)
        argv = ["--config", f"configs/pipelines/{method}.yaml", "--run_dir", str(tmp_path / method)]
        return open_pipeline(argv, Commands(lambda argv: 0, lambda argv: None, lambda argv: StageSize(None, None)))

    runs = [
        of("zero_shot", {}),
        of("label_sft", {"sft_label": StageRecord("finished", "", {}, wall_seconds=60)}),
        of(
            "rb_ft",
            {
                "generate": StageRecord("finished", "", {}, wall_seconds=5),
                "sft_rationale": StageRecord("interrupted", "", {}, wall_seconds=50),
            },
        ),
    ]
    assert [run.spec.name for run in runs] == list(METHODS[:3])
    assert other_methods(runs[:2], 1) == Behind(60, complete=False)  # its test was never finished
    assert other_methods(runs, 1) == Behind(65, complete=False)
    assert other_methods(runs, 3) == Behind()
    runs[0].times.works["test"] = Work(clips_read=7)
    runs[0].times.finished("test", 14.0)
    assert other_methods(runs, 2).timed == ((Work(clips_read=7), 14.0),)
    assert other_methods(runs, 1).timed == ()


def test_one_stage_gives_the_speed_of_all_kinds_of_work():
    shape = astuple(speeds([(Work(clips_read=1), 1.0)]))
    found = astuple(speeds([(Work(clips_read=100), 50.0)]))
    assert found == pytest.approx([0.5 * value for value in shape])


def test_stages_that_differ_give_each_kind_its_own_speed():
    true = Work(clips_read=0.1, clips_learnt=0.3, texts_scored=0.01, texts_learnt=0.04, texts_written=0.08)
    works = [
        Work(clips_read=900, texts_scored=900),
        Work(clips_learnt=800, texts_learnt=1600),
        Work(clips_read=100, texts_written=700),
        Work(clips_learnt=200, texts_learnt=3000, texts_written=10),
    ]

    def seconds(costs: Work, work: Work) -> float:
        return sum(a * b for a, b in zip(astuple(costs), astuple(work), strict=True))

    found = speeds([(work, seconds(true, work)) for work in works])
    asked = Work(clips_read=10, clips_learnt=100, texts_scored=30, texts_learnt=100, texts_written=100)
    one = speeds([(works[0], seconds(true, works[0]))])
    assert seconds(found, asked) == pytest.approx(seconds(true, asked), rel=0.15)
    assert seconds(one, asked) != pytest.approx(seconds(true, asked), rel=0.15), "the other stages told nothing"


def test_a_speed_is_never_negative():
    timed = [(Work(clips_read=100), 100.0), (Work(clips_read=100, texts_written=100), 90.0)]
    assert min(astuple(speeds(timed))) > 0


def test_seconds_follow_from_the_work_and_the_speed():
    behind = Behind(100, untimed=(Work(clips_read=20), Work(clips_read=30)), running=Work(clips_read=10))
    assert pipeline_left(behind, 5, 20) == "roughly 3 min"  # 100 known, 5 left here, 50 clips of 2 s each
    assert pipeline_left(behind, 5) == "at least 2 min", "nothing tells the speed"
    faster = Behind(untimed=(Work(clips_read=50),), timed=((Work(clips_read=10), 5.0),))
    assert pipeline_left(faster) == "roughly 25 s"


def test_what_is_behind_reaches_another_process():
    behind = Behind(3.5, False, (Work(clips_read=2),), ((Work(texts_written=4), 1.5),), Work(texts_learnt=3))
    with announced(behind):
        assert what_is_behind() == behind
    with announced(Behind(1)):
        assert what_is_behind() == Behind(1)
        assert what_is_behind().began == pytest.approx(time.time(), abs=60)
    assert what_is_behind() is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "about 0 s"), (89, "about 89 s"), (90, "about 2 min"), (5399, "about 90 min"), (5400, "about 1.5 h")],
)
def test_units_follow_the_length(seconds, said):
    assert pipeline_left(Behind(), seconds) == said


def test_the_bar_adds_the_rest_of_its_stage():
    class Bar:
        total, n, initial, disable = 10, 6, 2, False
        format_dict = {"elapsed": 40.0}  # four batches, ten seconds each: four more take 40

    bars = RunProgress()
    assert bars._pipeline(Bar()) == {}
    bars._behind = Behind(100)
    assert bars._pipeline(Bar()) == {"pipeline": "about 2 min left"}
    # begun 20 s before its bar, done in 40 s more: 20 clips take 100 s, 80 take 400
    began = time.time() - 60
    bars._behind = Behind(100, untimed=(Work(clips_read=80),), running=Work(clips_read=20), began=began)
    assert bars._pipeline(Bar()) == {"pipeline": "roughly 9 min left"}
    Bar.n = 2
    assert bars._pipeline(Bar()) == {}


def test_a_bar_asks_what_is_behind_when_it_opens():
    bars = RunProgress()
    with announced(Behind(7)):
        bars._open(object(), "training", 3, 0, "step")
    assert bars._behind == Behind(7)
    bars._close()


def test_a_stage_taken_from_elsewhere_says_nothing_of_this_machine():
    times = Timetable({"a": 0.0})
    times.works["b"] = Work(clips_read=1)
    assert times.behind(["a", "b"]) == Behind(0, untimed=(Work(clips_read=1),))


def test_a_finished_pipeline_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    calls: list[int] = [0, 0, 1]
    monkeypatch.setattr("vidreason.cli.pipeline.run_pipeline", lambda argv: calls.pop(0))
    whole = ["--config", "configs/pipelines/zero_shot.yaml", "--run_dir", "runs/my run"]
    said = "next: vidreason classify new_clip.mp4 --run 'runs/my run'"
    for options, expected in ((whole, True), ([*whole, "--until", "test"], False), (whole, False)):
        main(options)
        assert (said in capsys.readouterr().out) is expected
