"""A disk that is full: the file is named as docs/errors.md has it, and nothing half-written is left."""

import errno
import io
import re
from pathlib import Path

import pytest
from errors_page import FIT, LORA, PAGE, WRITES, stage
from safetensors import SafetensorError

from vidreason.cli.main import main
from vidreason.datamodules.porch import render as porch_render
from vidreason.lightning_modules.vlms.loading import adapters


class Full:
    """A file on a disk that has room for ten more characters."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.file.write(content[:10])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    def writelines(self, lines):
        for line in lines:
            self.write(line)


@pytest.fixture
def fill(monkeypatch):
    """``fill(name)``: the disk is full for files whose path holds that name."""

    def make(name: str) -> None:
        real = io.open

        def opened(file, mode="r", *args, **kwargs):
            found = real(file, mode, *args, **kwargs)
            return Full(found) if name in str(file) and mode[0] in "wa" else found

        monkeypatch.setattr(io, "open", opened)

    return make


def files() -> set[str]:
    return {path.as_posix() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("argv", "full", "named"),
    [
        (stage("generate", "--model.init_args.traces", WRITES), "traces.jsonl", "runs/generate/traces.jsonl"),
        (stage("test"), "predictions.jsonl", "runs/test/predictions.jsonl"),
        ([*FIT], "last.ckpt", "runs/sft_label/checkpoints/last.ckpt"),
        ([*FIT, *LORA], "vidreason.json", "runs/sft_label/adapter"),
        pytest.param([*FIT], "vidreason.json", "runs/sft_label/weights", marks=pytest.mark.slow),
        pytest.param([*FIT], "command.txt", "runs/sft_label/command.txt", marks=pytest.mark.slow),
    ],
    ids=["traces", "predictions", "checkpoint", "adapter", "weights", "record"],
)
def test_a_full_disk_is_named_and_leaves_nothing_half_written(capfd, fill, argv, full, named):
    fill(full)
    assert main(list(argv)) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    documented = re.findall(r"^\| `…(: the disk is full.+?)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [errors[0].endswith(row) for row in documented] == [True]
    assert not [name for name in files() if full in name or ".part" in name]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_full_disk_keeps_what_was_written_before(fill, monkeypatch):
    argv, usable = stage("generate", "--model.init_args.traces", WRITES), io.open
    assert main(argv) == 0
    assert main(stage("test")) == 0
    assert main(list(FIT)) == 0
    before = {
        name: Path(name).read_bytes() for name in files() if not name.endswith((".yaml", ".txt", "finished.json"))
    }
    store = Path("runs/generate/traces.jsonl")
    store.write_text(store.read_text().rpartition('{"video_id"')[0])  # one clip is left to write
    before[store.as_posix()] = store.read_bytes()
    longer = [*FIT, "--ckpt_path", "runs/sft_label/checkpoints/last.ckpt", "--trainer.max_steps", "2"]
    for name, command in (("traces", argv), ("predictions", stage("test")), ("last.ckpt", longer)):
        with monkeypatch.context():
            fill(name)
            assert main(command) == 1
    changed = [name for name, content in before.items() if Path(name).read_bytes() != content]
    assert [name for name in changed if "/weights/" not in name] == []
    monkeypatch.setattr(io, "open", usable)
    assert main(longer) == 0, "the command that the message advises goes on"


@pytest.mark.usefixtures("here")
def test_a_full_disk_while_an_adapter_is_written(capfd, monkeypatch):
    def save(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # its words

    monkeypatch.setattr(adapters, "save_file", save)
    assert main([*FIT, *LORA]) == 1
    assert "error: runs/sft_label/adapter: the disk is full" in capfd.readouterr().err
    assert not [name for name in files() if "adapter" in name]


@pytest.mark.usefixtures("here")
def test_a_full_disk_while_clips_are_rendered(capfd, monkeypatch):
    real, frames = porch_render.av.VideoFrame.from_ndarray, []

    class Frame:
        @staticmethod
        def from_ndarray(picture, format):
            frames.append(picture)
            if len(frames) == 100:
                assert [path for path in Path("porch").parent.rglob("*.mp4") if "part" in str(path)]
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(picture, format=format)

    monkeypatch.setattr(porch_render.av, "VideoFrame", Frame)
    argv = ["fit", "--config", "configs/sft_label.yaml", "--config", "small.yaml"]
    assert main([*argv, "--data.init_args.data_dir", "porch"]) == 1
    assert re.search(r"error: porch\S*/clips/train/\d+\.mp4: the disk is full", capfd.readouterr().err)
    assert not list(Path("porch").parent.rglob("*porch*/*"))
