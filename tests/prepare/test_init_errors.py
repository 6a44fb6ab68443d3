"""Every message about data in docs/errors.md is produced here, as it stands there."""

import re
import shutil
from pathlib import Path

import errors_page
import pytest

from vidreason.cli.main import main
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.manifest import ManifestDataModule


def documented() -> list[str]:
    """The messages of the section on data: tables and the remark on short clips."""
    remark = re.search(r"`(… clip….*?repeated)`", errors_page.section("Data"), flags=re.DOTALL)
    assert remark is not None
    return [*errors_page.documented("Data"), " ".join(remark[1].split())]


def pattern(message: str) -> str:
    return ".+?".join(map(re.escape, re.split("…", message))).replace(re.escape("clip") + ".+?", "clip.*?")


@pytest.fixture
def source(tmp_path, monkeypatch, write_clip):
    """Two classes of three clips and a table of them; the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDREASON_TRACEBACK", raising=False)
    for i in range(6):
        write_clip(Path("clips", "ab"[i % 2], f"{i}.mp4"), i + 2, size=(48, 32))
    write_table("path,label")
    return tmp_path


def write_table(header: str, change=lambda line: line) -> None:
    lines = [f"clips/{'ab'[i % 2]}/{i}.mp4,{'ab'[i % 2]}" for i in range(6)]
    Path("t.csv").write_text("\n".join([header, *map(change, lines)]) + "\n")


def wrong_label_column():
    return ["t.csv", "--label-column", "lable"]


def no_label_column():
    write_table("path,this,that", lambda line: f"{line},{line[-1]}")
    return ["t.csv"]


def no_header():
    write_table("clips/a/0.mp4,a")
    return ["t.csv"]


def path_not_found():
    write_table("path,label", lambda line: f"else/{line}")
    return ["t.csv"]


def two_labels():
    write_table("path,label\nclips/a/0.mp4,b")
    return ["t.csv"]


def one_class():
    shutil.rmtree("clips/b")
    return ["clips"]


def no_readable_clip():
    for path in Path("clips/b").iterdir():
        path.write_text("no video")
    return ["clips"]


def same_clip_in_two_splits():
    for split in ("train", "test"):
        shutil.copytree("clips/a", f"split/{split}/a")
        shutil.copytree("clips/b", f"split/{split}/b")
    return ["split"]


def too_few_groups():
    for i in (2, 3, 4, 5):
        Path("clips", "ab"[i % 2], f"{i}.mp4").unlink()
    return ["clips"]


def out_in_source():
    return ["clips", "--out", "clips/task"]


def out_exists():
    Path("task").mkdir()
    Path("task/task.yaml").touch()
    return ["clips"]


MISTAKES = (
    wrong_label_column,
    no_label_column,
    no_header,
    path_not_found,
    two_labels,
    one_class,
    no_readable_clip,
    same_clip_in_two_splits,
    too_few_groups,
    out_in_source,
    out_exists,
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_init_are_one_line_with_status_2(source, capsys, mistake):
    argv = mistake()
    out = [] if "--out" in argv else ["--out", "task"]
    assert main(["init", *argv, *out, "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    matching = [message for message in documented() if re.fullmatch(f"error: {pattern(message)}\n", error)]
    assert len(matching) == 1, f"docs/errors.md has not exactly one row for: {error}"
    assert not Path("task/manifest.csv").exists()


def test_short_clips_are_said(source, capsys):
    assert main(["init", "clips", "--out", "task", "--workers", "1"]) == 0
    assert re.search(pattern(documented()[-1]), capsys.readouterr().out)


def no_column():
    write_table("path,class")


def unknown_label():
    write_table("path,label")
    Path("task.yaml").write_text("name: x\nquestion: What?\nclasses: [a, bb]\n")


def missing_file():
    write_table("path,label", lambda line: line.replace("clips/a/0", "clips/a/9"))


MANIFEST_MISTAKES = (no_column, unknown_label, missing_file)


@pytest.mark.parametrize("mistake", MANIFEST_MISTAKES)
def test_mistakes_of_a_manifest_are_as_documented(source, mistake):
    mistake()
    task = "task.yaml" if Path("task.yaml").exists() else None
    with pytest.raises(ValueError, match=r"\w") as caught:
        ManifestDataModule("t.csv", task, frames=FrameOptions(num_frames=2)).setup("fit")
    matching = [message for message in documented() if re.fullmatch(pattern(message), str(caught.value))]
    assert len(matching) == 1, f"docs/errors.md has not exactly one row for: {caught.value}"


def test_every_documented_message_is_produced_above():
    assert len(documented()) == len(MISTAKES) + len(MANIFEST_MISTAKES) + 1
