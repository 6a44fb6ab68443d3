"""Tests what a report gathers, says first and chooses, and that texts of users and models stay texts."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from evaluated_run import CLIPS, LABELS, QUESTION, RIGHT, TRACE, clip_name, write_run
from torch.utils.tensorboard import SummaryWriter

from vidreason.cli.report import main
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.report import build, gallery
from vidreason.report.build import Report, gather, render, write_report
from vidreason.report.curves import read_curves
from vidreason.report.gallery import Gallery
from vidreason.report.rows import read_evaluation


@pytest.fixture(autouse=True, scope="module")
def no_clips() -> Iterator[None]:
    with patch.object(gallery, "_clips_of", lambda run: ({}, "The clips are elsewhere.")):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests only read."""
    return write_run(tmp_path_factory.mktemp("runs") / "x")


@pytest.fixture(scope="module")
def report(finished: Path) -> Report:
    return gather([finished])


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "x"))


def variants(report: Report, title: str) -> list[str]:
    found = [chart for section in report.sections for chart in section.charts if chart.title == title]
    return [name for chart in found for name, _ in chart.variants]


class Page(HTMLParser):
    """Collects the elements and the texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_first_sentence_has_the_paired_difference_and_its_interval(report: Report) -> None:
    better = RIGHT["calibration 2 traces"] - RIGHT["zero_shot likelihood"]
    values = np.array([1.0] * better + [0.0] * (CLIPS - better))
    half = 1.96 * math.sqrt(((values - values.mean()) ** 2).sum()) / CLIPS
    assert report.sentence == (
        "Reasoning (deepintuit: calibration 2 traces) is better than the untrained base on your clips: "
        f"{100 * better / CLIPS:+.1f} ± {100 * half:.1f} points on test."
    )
    assert report.gains[0].sure == f"p {2 / 2**better:.3f}"
    # Without the video it is right as often and as sure; the run's own remark is there, too.
    told = "\n".join(report.warnings)
    assert "calibration 2 traces is not shown to lose accuracy without the video on test: +0.0 points (p 1.000)" in told
    assert "calibration 2 traces is as sure without the video on test, as far as 24 clips can tell" in told
    assert "A single training run of deepintuit: the differences hold for its weights" in told
    assert "cold wrote no language about these clips" in told
    assert "chance" not in told


def test_of_several_calibrators_the_sentence_is_about_the_one_that_the_run_answers_with(tmp_path: Path) -> None:
    names = ("cold", "calibration_trace", "calibration", "calibration_cross_fitted")
    run = write_run(tmp_path / "x", pipeline="ablation", trainings=names)
    assert gather([run]).headline.name == "ablation: calibration_cross_fitted 2 traces"  # the last training
    folder = run / "stages" / "05_test"
    folder.mkdir()
    init = {"calibrator_path": str(run / "stages" / "03_calibration" / "adapter")}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": init}}))
    (folder / "command.txt").write_text("vidreason test")
    shutil.copy(run / "stages" / "01_cold" / "task.yaml", folder)
    state = json.loads((run / "state.json").read_text())
    state["stages"]["test"] = state["stages"]["cold"] | {"folder": "stages/05_test", "command": ["test"]}
    (run / "state.json").write_text(json.dumps(state))
    assert gather([run]).headline.name == "ablation: calibration 2 traces"


def test_a_run_that_has_not_finished_has_a_report_of_what_was_evaluated(run: Path) -> None:
    open_ = ("cold", "fit"), ("calibration", "fit"), ("later", "fit"), ("last", "test")
    stages = "".join(f"- name: {name}\n  command: {command}\n" for name, command in open_)
    (run / "pipeline.yaml").write_text(f"seed: 0\nstages:\n{stages}")
    told = gather([run]).warnings
    assert "deepintuit, seed 0: training has not finished (later), and what had finished was evaluated" in told


def test_label_sft_of_the_baselines_is_what_others_are_compared_with(finished: Path, tmp_path: Path) -> None:
    baselines = write_run(tmp_path / "b", RIGHT, "baselines", trainings=("sft_label",))
    alone, both = gather([baselines]), gather([finished, baselines])
    assert alone.headline.reference == "baselines: zero_shot likelihood"
    assert both.sentence.startswith("Reasoning (deepintuit: calibration 2 traces) is better than label SFT")


def test_a_method_at_chance_says_so_and_is_not_called_better(tmp_path: Path) -> None:
    report = gather([write_run(tmp_path / "y", {"zero_shot likelihood": 12, "calibration 2 traces": 13})])
    assert "is not shown to be better than the untrained base" in report.sentence
    assert "At chance on test: 54.2 % right" in report.warnings[0]
    worse = gather([write_run(tmp_path / "z", {"zero_shot likelihood": 22, "calibration 2 traces": 10})])
    assert "is worse than the untrained base on your clips: -50.0" in worse.sentence


def test_several_seeds_give_an_interval_over_seeds(tmp_path: Path, finished: Path) -> None:
    right = RIGHT | {"calibration 2 traces": 18}
    report = gather([finished, write_run(tmp_path / "other", right, seed=1)])
    first, second = 10 / CLIPS, 6 / CLIPS
    half = 12.7062 * abs(first - second) / 2  # Student t with one degree of freedom
    assert f"+{100 * (first + second) / 2:.1f} ± {100 * half:.1f} points" in report.sentence
    assert "is not shown to be better" in report.sentence
    assert "A single training run" not in "\n".join(report.warnings)
    with pytest.raises(ValueError, match="is deepintuit with seed 0, like .*; leave one of them out"):
        gather([finished, finished])


def test_texts_stay_texts_and_nothing_is_loaded(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert {tag for tag, _ in page.tags} & {"img", "b", "i", "iframe", "object"} <= {"b"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    joined = "".join(page.texts)
    assert QUESTION in joined
    assert TRACE.replace("{}", LABELS[0]) in joined
    assert clip_name("test", 3) in joined
    assert "'<i>.yaml'" in joined
    # Labels in charts are escaped once more, because plotly reads HTML in them.
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert json.dumps('fall &lt;2 m &amp; "x"')[1:-1] in json.dumps(figures)
    assert "fall <2" not in json.dumps(figures)
    loaded = [attrs.get("src") or attrs.get("href") or "" for _, attrs in page.tags]
    assert {link.partition(":")[0] for link in loaded if link and not link.startswith("#")} <= {"data"}
    assert len(text) < 20_000_000


def test_clips_are_wrong_and_sure_first_with_rewards_and_probabilities(report: Report) -> None:
    clips = report.gallery.clips
    assert [clip.name for clip in clips[:2]] == [clip_name("test", 23), clip_name("test", 22)]
    assert not any(clip.right for clip in clips[:2])
    assert all(clip.right for clip in clips[2:])
    assert len({clip.name for clip in clips}) == len(clips) == report.gallery.of == CLIPS
    # The stage that trained on rewards gives a right answer 2, and the parts are unweighted.
    assert clips[0].traces[0].rewards == {"total": 0.0, "accuracy": 0.0}
    assert clips[5].traces[0].rewards == {"total": 2.0, "accuracy": 1.0}
    assert clips[5].reward == 2.0
    assert sum(share for _, share in clips[0].probs) == pytest.approx(1)
    assert clips[0].probs[0] == (clips[0].decision, clips[0].confidence)
    assert clips[0].other == LABELS[0]  # the untrained base is wrong about the last 12 clips, too


def test_the_whole_file_stays_below_its_limit(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, bare = (len(render(replace(report, gallery=g))) for g in (report.gallery, Gallery((), CLIPS, "")))
    monkeypatch.setattr(build, "LIMIT", (whole + bare) // 2)
    path = tmp_path / "report.html"
    write_report(report, path)
    assert path.stat().st_size <= (whole + bare) // 2
    page = Page(path.read_text(encoding="utf-8"))
    shown = [attrs["data-name"] for _, attrs in page.tags if "data-name" in attrs]
    assert 0 < len(shown) < CLIPS
    assert shown == [clip.name for clip in report.gallery.clips[: len(shown)]]
    told = " ".join(page.texts)
    assert f"{len(shown)} of {CLIPS} clips" in told
    assert f"{CLIPS - len(shown)} clips are left out to keep the file small." in told
    monkeypatch.setattr(build, "LIMIT", bare // 2)
    with pytest.raises(ValueError, match="charts and tables alone are larger .* fewer runs"):
        write_report(report, path)


def test_rewards_that_cannot_be_imported_are_said_and_left_out(run: Path) -> None:
    config = run / "stages" / "01_cold" / "config.yaml"
    config.write_text(config.read_text().replace("vidreason.rewards.accuracy.", "gone_elsewhere."))
    found = gather([run]).gallery
    assert "Traces have no rewards: those of stage cold (gone_elsewhere.AccuracyReward) cannot be loaded" in found.note
    assert found.clips[0].traces[0].rewards == {}
    assert found.clips[0].reward is None


def test_a_loss_without_the_video_must_be_shown_by_the_sign_flip_test(tmp_path: Path) -> None:
    probe = "calibration 2 traces, no video"
    name = "calibration 2 traces is not shown to lose accuracy without the video on test"
    # 3 of 24 clips less: p = 2 / 2**3; 8 less: p = 2 / 2**8
    few = "\n".join(gather([write_run(tmp_path / "few", RIGHT | {probe: 19})]).warnings)
    assert f"{name}: -12.5 points (p 0.250)" in few
    many = "\n".join(gather([write_run(tmp_path / "many", RIGHT | {probe: 14})]).warnings)
    assert name not in many
    assert "calibration 2 traces is as sure" in many  # its probabilities are the same


def test_a_run_that_was_not_probed_says_so_with_the_command(run: Path) -> None:
    path = run / "evaluation" / "evaluation.json"
    content = json.loads(path.read_text())
    content["rows"] = [row for row in content["rows"] if row["who"]["probe_of"] is None]
    path.write_text(json.dumps(content))
    told = "\n".join(gather([run]).warnings)
    assert "No probes were run" in told
    assert f"vidreason evaluate --run {run} --splits test --probes" in told


def test_a_picture_of_a_clip(write_clip, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    assert gallery.picture_url(Clip(path, None, "a")).startswith("data:image/webp;base64,")
    assert gallery.picture_url(Clip(tmp_path / "missing.mp4", None, "b")) == ""


def test_what_is_there_is_shown_and_the_rest_is_left_out(run: Path, report: Report) -> None:
    titles = [section.title for section in report.sections]
    assert "Training" not in titles
    assert "Accuracy by split and group" not in titles
    assert variants(report, "What is taken for what")[0] == "calibration 2 traces, test"
    Threshold(0.7, 1.0, 0.1, 0.09, 20, 0, 0.8, "", 2).save(run / "stages" / "02_calibration")
    with SummaryWriter(str(run / "stages" / "01_cold" / "tb")) as writer:
        for step in range(3):
            writer.add_scalar("train/reward", 0.5 * step, step)
            writer.add_scalar("train/rewards/format/mean", math.nan if step == 1 else 1.0, step)
            writer.add_scalar("memory/resident", 1.0, step)
        writer.add_scalar("train/kl", 1.0, 0)
    panels = read_curves(run / "stages" / "01_cold")
    assert [(panel.title, [curve.name for curve in panel.curves]) for panel in panels] == [
        ("reward", ["reward"]),
        ("parts of the reward", ["format"]),
    ]
    assert panels[0].curves[0].values == (0.0, 0.5, 1.0)
    report = gather([run])
    assert variants(report, "Training curves") == ["cold"]
    risk = next(c for s in report.sections for c in s.charts if c.title == "Error among the surest clips")
    star = [t for t in risk.variants[0][1][0]["data"] if "threshold" in t["name"]]
    # Above 0.7: the clips from number 10 on, or by scaling twice as far from even; both wrong ones are among them.
    confidence = [(0.6 + 0.01 * n) ** 2 / ((0.6 + 0.01 * n) ** 2 + (0.4 - 0.01 * n) ** 2) for n in range(CLIPS)]
    accepted = [n for n in range(CLIPS) if confidence[n] >= 0.7]
    assert star[0]["x"] == [len(accepted) / CLIPS]
    assert star[0]["y"] == [pytest.approx(2 / len(accepted))]


def test_rows_are_read_and_damage_is_named(tmp_path: Path) -> None:
    who = {"run": "r", "pipeline": "p", "seed": 1, "method": "m", "mode": "answer", "probe_of": None}
    cost = {"tokens_per_clip": 3.0, "seconds_per_clip": None}
    row = {"split": "test", "group": None, "clips": 2, "groups": 2, "scores": {"acc": 0.5, "confidence": 0.9}}
    row |= {"intervals": None, "temperature": 2.0, "scaled": {"confidence": 0.6}, "classes": {"a": {}, "b": {}}}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"rows": [{**row, "who": who, "cost": cost}]}))
    found = read_evaluation(path)
    assert (found.label_names, found.rows[0].name, found.rows[0].confidence) == (("a", "b"), "p: m", 0.6)
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="evaluation.json: not an evaluation .*; run vidreason evaluate again"):
        read_evaluation(path)


def test_mistakes_are_one_line_with_a_remedy(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        main([str(run), "--out", str(tmp_path)])
    (run / "evaluation" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=f"has not been evaluated; run: vidreason evaluate --run {run} --probes"):
        main([str(run), "--out", str(tmp_path / "r.html")])
    with pytest.raises(ValueError, match="^/no/run: no finished run there"):
        main(["/no/run"])
