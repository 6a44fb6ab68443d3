"""Every message about commands and runs in docs/errors.md is produced here, as it stands there."""

import errno
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from vidreason.cli.main import main
from vidreason.datamodules import porch_render
from vidreason.lightning_modules.vlms import adapters
from vidreason.lightning_modules.vlms.tiny.vlm import embedded_folder

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
FIT = ("fit", "--config", "configs/sft_label.yaml", "--config", "small.yaml", "--data", "data.yaml")
LORA = ("--vlm.init_args.lora", "{r: 2, alpha: 4}")
SMALL = {
    "trainer": {
        "max_steps": 1,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "logger": False,
        "limit_val_batches": 1,
    }
}
DATA = {
    "class_path": "vidreason.datamodules.manifest.ManifestDataModule",
    "init_args": {"manifest": "t.csv", "batch_size": 2, "num_workers": 0, "frames": {"num_frames": 2}},
}
WRITES = "{samples: 1, sampling: {max_new_tokens: 4}}"


def documented(section: str) -> list[str]:
    """The messages of a section's tables."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE)


def rows_that_say(message: str, section: str) -> list[str]:
    return [
        row for row in documented(section) if re.fullmatch(".+?".join(map(re.escape, row.split("…"))), message.strip())
    ]


@pytest.fixture
def here(tmp_path, monkeypatch, write_clip):
    """Eight clips of two classes, a table, a data section and an overlay that makes every stage one step long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDREASON_TRACEBACK", raising=False)
    lines = ["path,label,split"]
    for i, split in enumerate(["train", "train", "val", "val", "cal", "cal", "test", "test"]):
        write_clip(Path("clips", "ab"[i % 2], f"{i}.mp4"), i + 2, size=(48, 32))
        lines.append(f"clips/{'ab'[i % 2]}/{i}.mp4,{'ab'[i % 2]},{split}")
    Path("t.csv").write_text("\n".join(lines) + "\n")
    Path("data.yaml").write_text(yaml.safe_dump(DATA))
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def stage(name: str, *options: str) -> list[str]:
    command = {"generate": "predict", "test": "test"}.get(name, "fit")
    return [command, "--config", f"configs/{name}.yaml", "--config", "small.yaml", "--data", "data.yaml", *options]


def trained(run_dir: str, *options: str) -> str:
    assert main([*FIT, "--run_dir", run_dir, *options]) == 0
    return run_dir


def prompt_too_long():
    return [*FIT, "--data.init_args.frames.num_frames", "400"]


def no_room_for_completions():
    return stage("generate", "--model.init_args.traces_sampled", "{samples: 1, sampling: {max_new_tokens: 3000}}")


def adapter_of_another_base():
    trained("a", *LORA)
    shutil.copytree(embedded_folder(), "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**config, "made": "anew"}))
    return [*FIT, *LORA, "--vlm.init_args.path", "other", "--model.init_args.adapter_path", "a/adapter"]


def adapter_of_another_size():
    trained("a", *LORA)
    return [*FIT, "--vlm.init_args.lora", "{r: 4, alpha: 4}", "--model.init_args.adapter_path", "a/adapter"]


def adapter_without_lora():
    trained("a", *LORA)
    return [*FIT, "--model.init_args.adapter_path", "a/adapter"]


def no_adapter():
    Path("empty").mkdir()
    return [*FIT, "--model.init_args.adapter_path", "empty"]


def calibrator_as_policy():
    assert main(stage("calibration", "--run_dir", "c", "--model.init_args.traces_sampled", WRITES)) == 0
    return [*FIT, *LORA, "--model.init_args.adapter_path", "c/adapter"]


def adapter_as_calibrator():
    trained("a", *LORA)
    return stage("calibration", "--model.init_args.calibrator_path", "a/adapter")


def checkpoint_of_another_stage():
    trained("a")
    return stage("calibration", "--ckpt_path", "a/checkpoints/last.ckpt")


def no_gpu():
    return [*FIT, "--trainer.accelerator", "gpu"]


def no_gpus():
    return [*FIT, "--trainer.accelerator", "auto", "--trainer.devices", "4"]


def typo_in_a_command():
    return ["piepline"]


def typo_in_a_section():
    return [*FIT, "--trainr.max_steps", "1"]


def typo_in_a_trainer_key():
    return [*FIT, "--trainer.max_stps", "1"]


def typo_in_an_argument():
    return [*FIT, "--model.init_args.targt", "label"]


def typo_in_an_argument_of_an_argument():
    return [*FIT, "--data.init_args.frames.num_frame", "1"]  # once taken for an abbreviation


def typo_in_the_optimizer():
    return [*FIT, "--model.init_args.optimizer.init_args.lrr", "0.1"]


def argument_like_no_other():
    return [*FIT, "--model.init_args.zzz", "1"]


def typo_in_yaml():
    Path("data.yaml").write_text(yaml.safe_dump({**DATA, "init_args": {**DATA["init_args"], "bach_size": 2}}))
    return list(FIT)


def typo_in_yaml_of_the_trainer():
    Path("small.yaml").write_text("trainer: {max_stpes: 1}\n")
    return list(FIT)


def typo_in_an_option():
    return ["init", "clips", "--outt", "task"]


def typo_in_an_option_of_classify():
    return ["classify", "clips", "--runn", "runs/mine"]


def typo_in_an_option_of_demo():
    return ["demo", "--quik"]


def typo_in_an_option_of_pipeline():
    return ["pipeline", "--config", "configs/pipelines/zero_shot.yaml", "--run_dirr", "x"]


def typo_in_a_stage():
    options = ["--run_dir", "x", "--tst.trainer.max_steps", "1"]
    return ["pipeline", "--config", "configs/pipelines/zero_shot.yaml", *options]


def typo_in_a_setting_of_pipeline():
    options = ["--run_dir", "x", "--data", "data.yaml", "--data.init_args.bach_size", "1"]
    return ["pipeline", "--config", "configs/pipelines/zero_shot.yaml", *options]


def missing_option():
    return ["init", "clips"]


def no_such_file():
    return ["fit", "--config", "configs/sft_lable.yaml"]


MISTAKES = (
    prompt_too_long,
    no_room_for_completions,
    adapter_of_another_base,
    adapter_of_another_size,
    adapter_without_lora,
    no_adapter,
    calibrator_as_policy,
    adapter_as_calibrator,
    checkpoint_of_another_stage,
    no_gpu,
    no_gpus,
    typo_in_a_command,
    typo_in_a_section,
    typo_in_a_trainer_key,
    typo_in_an_argument,
    typo_in_an_argument_of_an_argument,
    typo_in_the_optimizer,
    argument_like_no_other,
    typo_in_yaml,
    typo_in_yaml_of_the_trainer,
    typo_in_an_option,
    typo_in_an_option_of_classify,
    typo_in_an_option_of_demo,
    typo_in_an_option_of_pipeline,
    typo_in_a_stage,
    typo_in_a_setting_of_pipeline,
    missing_option,
    no_such_file,
)
PRODUCED: set[str] = set()


@pytest.fixture
def no_gpus_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("here", "no_gpus_here")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_with_status_2(capfd, mistake):
    argv = mistake()
    capfd.readouterr()
    assert main(argv) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    rows = rows_that_say(errors[0].removeprefix("error: "), "Commands and runs")
    assert len(rows) == 1, f"docs/errors.md has not exactly one row for: {errors[0]}"
    PRODUCED.update(rows)


@pytest.mark.parametrize(
    ("mistake", "nearest"),
    [
        (typo_in_a_command, "pipeline"),
        (typo_in_a_section, "trainer"),
        (typo_in_a_trainer_key, "max_steps"),
        (typo_in_an_argument, "target"),
        (typo_in_an_argument_of_an_argument, "num_frames"),
        (typo_in_the_optimizer, "lr"),
        (typo_in_yaml, "batch_size"),
        (typo_in_yaml_of_the_trainer, "max_steps"),
        (typo_in_an_option, "--out"),
        (typo_in_an_option_of_classify, "--run"),
        (typo_in_an_option_of_demo, "--quick"),
        (typo_in_an_option_of_pipeline, "--run_dir"),
        (typo_in_a_stage, "test"),
        (typo_in_a_setting_of_pipeline, "batch_size"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_typo_is_answered_with_the_nearest_name(capfd, mistake, nearest):
    assert main(mistake()) == 2
    assert re.search(rf"did you mean '?{nearest}'?\?", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("there", "accelerator", "devices", "refused"),
    [
        (0, "cpu", 4, False),
        (0, "auto", "auto", False),
        (0, "auto", 1, False),
        (0, "auto", 4, True),
        (0, "gpu", 1, True),
        (0, "cuda", "auto", True),
        (2, "gpu", 2, False),
        (2, "gpu", "0,1", False),
        (2, "gpu", "2,", True),
        (2, "auto", [2], True),
        (2, "auto", "3", True),
        (2, "gpu", -1, False),
    ],
)
def test_devices_are_compared_with_those_there_are(monkeypatch, there, accelerator, devices, refused):
    from vidreason.cli.devices import refuse_missing_gpus

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if not refused:
        refuse_missing_gpus(accelerator, devices)
        return
    with pytest.raises(ValueError, match=r"trainer\.(accelerator|devices) is .*, but this machine has") as caught:
        refuse_missing_gpus(accelerator, devices)
    if there:
        assert rows_that_say(str(caught.value), "Commands and runs")
        PRODUCED.update(rows_that_say(str(caught.value), "Commands and runs"))


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
        (stage("generate", "--model.init_args.traces_sampled", WRITES), "traces.jsonl", "runs/generate/traces.jsonl"),
        (stage("test"), "predictions.jsonl", "runs/test/predictions.jsonl"),
        ([*FIT], "last.ckpt", "runs/sft_label/checkpoints/last.ckpt"),
        ([*FIT, *LORA], "vidreason.json", "runs/sft_label/adapter"),
        ([*FIT], "vidreason.json", "runs/sft_label/weights"),
        ([*FIT], "command.txt", "runs/sft_label/command.txt"),
    ],
    ids=["traces", "predictions", "checkpoint", "adapter", "weights", "record"],
)
def test_a_full_disk_is_named_and_leaves_nothing_half_written(capfd, fill, argv, full, named):
    fill(full)
    assert main(list(argv)) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    rows = rows_that_say(errors[0].removeprefix("error: "), "Failures")
    assert len(rows) == 1, f"docs/errors.md has not exactly one row for: {errors[0]}"
    assert not [name for name in files() if full in name or ".part" in name]
    PRODUCED.update(rows)


@pytest.mark.usefixtures("here")
def test_a_full_disk_keeps_what_was_written_before(fill, monkeypatch):
    argv = stage("generate", "--model.init_args.traces_sampled", WRITES)
    assert main(argv) == 0
    assert main(stage("test")) == 0
    assert main(list(FIT)) == 0
    before = {name: Path(name).read_bytes() for name in files() if not name.endswith((".yaml", ".txt"))}
    store = Path("runs/generate/traces.jsonl")
    store.write_text(store.read_text().rpartition('{"video_id"')[0])  # one clip is left to write
    before[store.as_posix()] = store.read_bytes()
    for name, command in (("traces", argv), ("predictions", stage("test")), ("last.ckpt", list(FIT))):
        with monkeypatch.context():
            fill(name)
            assert main(command) == 1
    changed = [name for name, content in before.items() if Path(name).read_bytes() != content]
    assert [name for name in changed if "/weights/" not in name] == []


@pytest.mark.usefixtures("here")
def test_a_full_disk_while_an_adapter_is_written(capfd, monkeypatch):
    def save(tensors, path):
        Path(path).write_bytes(b"half")
        raise adapters.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )  # its words

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


def damaged_clip_in_training():
    Path("clips/a/0.mp4").write_text("no video")
    return list(FIT)


@pytest.mark.usefixtures("here")
def test_a_clip_that_broke_is_a_failure(capfd):
    assert main(damaged_clip_in_training()) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert rows_that_say(error.removeprefix("error: "), "Data")


def test_every_documented_message_is_produced_above():
    everything = {*documented("Commands and runs"), *documented("Failures")}
    assert everything
    if PRODUCED:  # with single tests picked, nothing can be said
        assert everything - PRODUCED == set() or len(PRODUCED) < len(everything) // 2
