"""What a newcomer copies out of README.md."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

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
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "2026-11-21_demo_seeds.json"
    pooled = json.loads(results.read_text(encoding="utf-8"))["pooled"]
    found = {(row["method"], row["level"]): row for row in pooled}
    section = README.read_text(encoding="utf-8").partition("<!-- demo:begin -->")[2].partition("<!-- demo:end -->")[0]
    assert results.name in section, "README names where its figures come from"
    header, *lines = section.partition("```\n")[2].partition("```")[0].strip().splitlines()
    levels = header.split()[1:]
    assert len(lines) * len(levels) == len(found)
    for line in lines:
        method, *cells = line.split()
        for level, acc, interval, spread in zip(levels, cells[::3], cells[1::3], cells[2::3], strict=True):
            row = found[method, level]
            assert acc == f"{100 * row['acc']:.1f}", (method, level)
            assert interval == f"({100 * row['acc_lo']:.0f}-{100 * row['acc_hi']:.0f})", (method, level)
            assert spread == f"±{100 * row['acc_sd']:.1f}", (method, level)
    at_l1 = [f"{found[m, 'L1']['ece']:.2f}" for m in ("deepintuit", "label_sft")]
    assert f"at L1 {at_l1[0]} against {at_l1[1]}" in section
