"""Runs what a newcomer copies out of README.md."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from evidence_report import LINES
from scipy import stats

from vidreason.cli.main import COMMANDS, main
from vidreason.datamodules.task import Task

README = Path(__file__).parents[1] / "README.md"


def own_clips_block() -> list[list[str]]:
    """The commands of "Your own clips in five minutes", without the program's name."""
    section = README.read_text(encoding="utf-8").partition("## Your own clips in five minutes\n")[2]
    block = section.partition("```bash\n")[2].partition("```")[0]
    lines = [shlex.split(line) for line in block.strip().splitlines()]
    assert {line[0] for line in lines} == {"vidreason"}
    return [line[1:] for line in lines]


def moving_bar(seed: int, to_the_right: bool) -> list[np.ndarray]:
    """Twelve frames [64, 96, 3] of a bar that crosses the picture, on a background of its own grey."""
    frames = []
    for t in range(12):
        frame = np.full((64, 96, 3), 40 + 8 * seed, dtype=np.uint8)
        left = 6 + 7 * (t if to_the_right else 11 - t)
        frame[20:44, left : left + 8] = (220, 60, 60)
        frames.append(frame)
    return frames


@pytest.fixture
def _ten_clips(tmp_path, monkeypatch, write_clip):
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        write_clip(Path("clips", ("left", "right")[i % 2], f"{i}.mp4"), moving_bar(i, bool(i % 2)))
    write_clip(Path("new_clip.mp4"), moving_bar(11, to_the_right=True))


@pytest.fixture
def _real_clips(tmp_path, monkeypatch, test_data):
    monkeypatch.chdir(tmp_path)
    source = test_data / "real_clips" / "weizmann_silhouettes"
    Path("clips").symlink_to(source)
    Path("new_clip.mp4").symlink_to(next(source.glob("walk/*.mp4")))


def run_block() -> None:
    """Runs the commands on the embedded base, which needs no download: without ``--vlm`` and its value."""
    for argv in own_clips_block():
        if "--vlm" in argv:
            at = argv.index("--vlm")
            del argv[at : at + 2]
        if argv[0] in COMMANDS:
            assert main(argv) == 0, argv


def test_the_block_is_the_three_commands():
    assert [argv[0] for argv in own_clips_block()] == ["init", "pipeline", "classify"]
    init, pipeline, classify = own_clips_block()
    assert pipeline[pipeline.index("--data") + 1] == f"{init[init.index('--out') + 1]}/data.yaml"
    assert classify[classify.index("--run") + 1] == pipeline[pipeline.index("--run_dir") + 1]
    assert init[init.index("--vlm") + 1] == pipeline[pipeline.index("--vlm") + 1]


@pytest.mark.slow
@pytest.mark.usefixtures("_ten_clips")
def test_the_block_runs_as_printed_on_ten_clips():
    run_block()
    assert len(Path("my_task/manifest.csv").read_text().splitlines()) == 11
    assert Path("runs/mine/summary.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("_real_clips")
def test_the_block_runs_as_printed_on_real_clips():
    run_block()
    assert len(Path("my_task/manifest.csv").read_text().splitlines()) == 94
    assert Path("runs/mine/summary.json").is_file()


def test_the_task_file_in_the_readme_loads_as_written(tmp_path):
    blocks = re.findall(r"```yaml\n(# my_task\.yaml\n.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    path = tmp_path / "my_task.yaml"
    path.write_text(blocks[0], encoding="utf-8")
    task = Task.from_yaml(path)
    assert task.label_names == ("safe", "danger")
    assert task.classes[0].definition == "people wait, board or leave"


def test_the_tables_figures_are_those_of_the_committed_result():
    """Means over seeds and Student-t intervals, computed here from the accuracies of the single runs."""
    section = README.read_text(encoding="utf-8").partition("<!-- demo:begin -->")[2].partition("<!-- demo:end -->")[0]
    (name,) = re.findall(r"`(benchmarks/results/\S+_evidence\.json)`", section)
    content = json.loads((README.parent / name).read_text(encoding="utf-8"))
    tables = re.findall(r"(?m)^```\n(\d+ labelled clips .*?)^```", section, flags=re.DOTALL)
    assert len(tables) == len({row["labels"] for row in content["rows"]})
    for table in tables:
        header, *lines = table.strip().splitlines()
        labels, levels = int(header.split()[0]), header.split()[3:]
        assert levels == sorted({row["split"].removeprefix("test_") for row in content["rows"]})
        for line in lines:
            title, *cells = re.split(r"\s{2,}", line.strip())
            for level, cell in zip(levels, cells, strict=True):
                accs = [row["acc"] for row in content["rows"] if _is(row, LINES[title], labels, f"test_{level}")]
                assert len(accs) == len({row["seed"] for row in content["rows"]})
                mean, half = np.mean(accs), stats.t.ppf(0.975, len(accs) - 1) * stats.sem(accs)
                assert cell == f"{100 * mean:.1f} ({100 * (mean - half):.0f}-{100 * (mean + half):.0f})", (title, level)
    told = re.findall(r"(?m)^- (.+?) against (.+?): (.+)$", section)
    assert told
    for first, second, differences in told:
        figures = re.findall(r"(\S+) points \((\S+) to (\S+)\) with (\d+)", differences)
        assert len(figures) == len(tables)
        for *shown, labels in figures:
            rights = {
                key: {
                    row["seed"]: row["acc"] for row in content["rows"] if _is(row, LINES[key], int(labels), "test_L1")
                }
                for key in (first, second)
            }
            each = [rights[first][seed] - rights[second][seed] for seed in sorted(rights[first])]
            mean, half = np.mean(each), stats.t.ppf(0.975, len(each) - 1) * stats.sem(each)
            assert shown == [f"{100 * value:+.1f}" for value in (mean, mean - half, mean + half)], first


def _is(row, key, labels, split):
    """Returns whether a row is that of a method, given as pipeline and method."""
    return (f"{row['pipeline']}: {row['method']}", row["labels"], row["split"]) == (key, labels, split)
