"""Every message about commands and runs in docs/errors.md is produced here, as it stands there."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from covering import sample
from errors_page import FIT, FULL_DISK, LORA, TOO_MANY_GPUS, WRITES, documented, rows_that_say, stage

from vidreason.cli.main import main
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.tiny.vlm import embedded_folder

TRAINED: dict[tuple[str, ...], Path] = {}
"""A copy of the run folder of each training, by the command's further options"""


def trained(run_dir: str, *options: str) -> str:
    """Trains once for each set of options; fixture ``here`` makes the same folder for every test."""
    if options not in TRAINED:
        assert main([*FIT, "--run_dir", run_dir, *options]) == 0
        TRAINED[options] = shutil.copytree(run_dir, Path.cwd().parent / f"trained_{len(TRAINED)}")
    else:
        shutil.copytree(TRAINED[options], run_dir)
    return run_dir


def prompt_too_long():
    return [*FIT, "--data.init_args.frames.num_frames", "400"]


def no_room_for_completions():
    return stage("generate", "--model.init_args.traces", "{samples: 1, sampling: {max_new_tokens: 3000}}")


def special_token_in_a_question():
    task = {"name": "t", "question": "who? <|end|>", "classes": ["a", "b"]}
    Path("task.yaml").write_text(yaml.safe_dump(task))
    return [*FIT, "--data.init_args.task", "task.yaml"]


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
    assert main(stage("calibration", "--run_dir", "c", "--model.init_args.traces", WRITES)) == 0
    return [*FIT, *LORA, "--model.init_args.adapter_path", "c/adapter"]


def adapter_as_calibrator():
    trained("a", *LORA)
    return stage("calibration", "--model.init_args.calibrator_path", "a/adapter")


def checkpoint_of_another_stage():
    trained("a")
    return stage("calibration", "--ckpt_path", "a/checkpoints/last.ckpt")


def checkpoint_of_an_earlier_version():
    path = Path(trained("a"), "checkpoints", "last.ckpt")
    saved = torch.load(path, weights_only=True)
    saved["vidreason"]["format"] = 1
    torch.save(saved, path)
    return [*FIT, "--ckpt_path", str(path)]


def checkpoint_of_another_batch_size():
    trained("a")
    return [*FIT, "--model.init_args.batch_size", "3", "--ckpt_path", "a/checkpoints/last.ckpt"]


def checkpoint_of_another_seed():
    trained("a")
    return [*FIT, "--seed_everything", "7", "--ckpt_path", "a/checkpoints/last.ckpt"]


def checkpoint_of_other_clips():
    trained("a")
    shutil.copy("clips/a/0.mp4", "clips/a/9.mp4")
    with Path("t.csv").open("a") as table:
        table.write("clips/a/9.mp4,a,train\n")
    return [*FIT, "--ckpt_path", "a/checkpoints/last.ckpt"]


def checkpoint_of_other_weights():
    begun = trained("a", *LORA)
    trained("b", *LORA, "--model.init_args.adapter_path", f"{begun}/adapter")
    return [*FIT, *LORA, "--ckpt_path", "b/checkpoints/last.ckpt"]


def checkpoint_of_more_texts():
    """The stage would write them again before it loads the checkpoint."""
    options = ("--run_dir", "a", "--model.init_args.traces", WRITES)
    assert main(stage("calibration", *options)) == 0
    lines = Path("a/traces.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("a/traces.jsonl").write_text("".join(lines[:-2]), encoding="utf-8")
    return stage("calibration", *options, "--ckpt_path", "a/checkpoints/last.ckpt", "--trainer.max_steps", "2")


def checkpoint_of_another_rate():
    begun = trained("a")
    rate = ("--model.init_args.optim.optimizer.init_args.lr", "0.5")
    return [*FIT, *rate, "--ckpt_path", f"{begun}/checkpoints/last.ckpt"]


def pickle_as_checkpoint():
    Path("p.ckpt").write_bytes(pickle.dumps({"path": Path("x")}))
    return [*FIT, "--ckpt_path", "p.ckpt"]


def folder_of_another_fit():
    return [*FIT, "--run_dir", trained("a"), "--model.init_args.batch_size", "1"]


def clipping_by_the_trainer():
    return [*FIT, "--trainer.gradient_clip_val", "1.0"]


def accumulation_by_the_trainer():
    return [*FIT, "--trainer.accumulate_grad_batches", "2"]


def precision_that_converts_weights():
    return [*FIT, "--trainer.precision", "bf16-true"]


def typo_in_a_part():
    return [*FIT, "--profile", "sft_lable"]


def missing_profile():
    return [*FIT, "--vlm.init_args.scale", "configs/scale/7b.yaml"]


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
    return [*FIT, "--model.init_args.targts", "{kind: label}"]


def typo_in_a_group():
    return [*FIT, "--model.init_args.targts.kind", "label"]


def typo_in_an_argument_of_an_argument():
    return [*FIT, "--data.init_args.frames.num_frame", "1"]  # once taken for an abbreviation


def typo_in_the_optimizer():
    return [*FIT, "--model.init_args.optim.optimizer.init_args.lrr", "0.1"]


def argument_like_no_other():
    return [*FIT, "--model.init_args.zzz", "1"]


def typo_in_yaml():
    data = yaml.safe_load(Path("data.yaml").read_text())
    Path("data.yaml").write_text(yaml.safe_dump({**data, "init_args": {**data["init_args"], "bach_size": 2}}))
    return list(FIT)


def typo_in_yaml_of_the_trainer():
    Path("small.yaml").write_text("trainer: {max_stpes: 1}\n")
    return list(FIT)


def typo_in_an_option():
    return ["init", "clips", "--outt", "task"]


def typo_in_an_option_of_classify():
    return ["classify", "clips", "--runn", "runs/mine"]


def an_option_given_twice():
    return ["classify", "clips", "--run", "runs/mine", "--run", "runs/other"]


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


MISTAKES = {
    prompt_too_long: "clip …: its prompt",
    no_room_for_completions: "clip …: its prompt",
    special_token_in_a_question: "…: '…' contains",
    adapter_of_another_base: "adapter_path: … was trained on another base",
    adapter_of_another_size: "the adapter in … has other options",
    adapter_without_lora: "adapter_path: … is a LoRA adapter",
    no_adapter: "adapter_path: … is neither",
    calibrator_as_policy: "adapter_path: … was written by stage",
    adapter_as_calibrator: "calibrator_path: … was written",
    checkpoint_of_another_stage: "this checkpoint was written by stage",
    checkpoint_of_an_earlier_version: "this checkpoint was written by …, not",
    checkpoint_of_another_batch_size: "this checkpoint was written at",
    checkpoint_of_another_seed: "this checkpoint was written with seed",
    checkpoint_of_another_rate: "model.init_args.optim",
    pickle_as_checkpoint: "--ckpt_path …: not a checkpoint",
    folder_of_another_fit: "… holds … fit",
    checkpoint_of_other_clips: "this checkpoint was written with … training",
    checkpoint_of_other_weights: "adapter_path: holds other weights",
    checkpoint_of_more_texts: "…: holds … texts",
    clipping_by_the_trainer: "trainer.gradient_clip_val",
    accumulation_by_the_trainer: "trainer.accumulate_grad_batches",
    precision_that_converts_weights: "trainer.precision is",
    typo_in_a_part: "profile: …",
    missing_profile: "vlm.scale: no file",
    no_gpu: "trainer.accelerator is",
    no_gpus: "trainer.devices is …, but this machine has no GPU",
    typo_in_a_command: "unknown command",
    typo_in_a_section: "unknown key",
    typo_in_a_trainer_key: "unknown key",
    typo_in_an_argument: "… takes no argument …: did",
    typo_in_a_group: "… takes no argument …: did",
    typo_in_an_argument_of_an_argument: "… takes no argument …: did",
    typo_in_the_optimizer: "… takes no argument …: did",
    argument_like_no_other: "… takes no argument …; there are",
    typo_in_yaml: "… takes no argument …: did",
    typo_in_yaml_of_the_trainer: "unknown key",
    typo_in_an_option: "unknown option",
    typo_in_an_option_of_classify: "unknown option",
    an_option_given_twice: "… is given twice",
    typo_in_an_option_of_demo: "unknown option",
    typo_in_an_option_of_pipeline: "unknown option",
    typo_in_a_stage: "--…: begins with neither",
    typo_in_a_setting_of_pipeline: "… takes no argument …: did",
    missing_option: "the following arguments",
    no_such_file: "no such file",
}
"""Each with the beginning of its row"""
TRAIN_TWICE = (
    checkpoint_of_more_texts,
    checkpoint_of_other_weights,
    calibrator_as_policy,
    adapter_of_another_base,
)
ALIKE = (
    checkpoint_of_another_seed,
    accumulation_by_the_trainer,
    typo_in_a_trainer_key,
    typo_in_an_argument,
    typo_in_the_optimizer,
    typo_in_an_option_of_classify,
    typo_in_an_option_of_demo,
)
"""Further cases of a row, of a check or of a parser that another mistake meets too"""
NEAREST = {
    typo_in_a_command: "pipeline",
    typo_in_a_section: "trainer",
    typo_in_a_trainer_key: "max_steps",
    typo_in_an_argument: "targets",
    typo_in_a_group: "targets",
    typo_in_an_argument_of_an_argument: "num_frames",
    typo_in_the_optimizer: "lr",
    typo_in_yaml: "batch_size",
    typo_in_yaml_of_the_trainer: "max_steps",
    typo_in_an_option: "--out",
    typo_in_an_option_of_classify: "--run",
    typo_in_an_option_of_demo: "--quick",
    typo_in_an_option_of_pipeline: "--run_dir",
    typo_in_a_stage: "test",
    typo_in_a_setting_of_pipeline: "batch_size",
}
"""The name that the answer to a typo suggests"""
TOO_MANY = "… of … training clips"
OUT_OF_MEMORY = "out of memory, …"
NOT_SUPPORTED = "training clips cannot be read"
LEFT_OUT = "… could not be read"
ELSEWHERE = ("--… …: a file …", "…: a pipe or", "…: no answer", "…: no class …", "…: … needs …: set it")
ELSEWHERE += ("…, line …, column", "…: not in UTF-8", "--… …: a section", "… needs a package", "--run …: …")
ELSEWHERE += ("adapter_path: … was trained on …; give", "--shard …: ", "…: not looked at")
ELSEWHERE += ("--out …: holds decisions", "--out …: holds something", "--out …: another process")
LOCKED = "…: … is writing there"
MOVED = "… has moved to … (in …)"


@pytest.fixture
def no_gpus_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("here", "no_gpus_here")
@pytest.mark.parametrize(
    "mistake", sample(list(MISTAKES), *(made for made in MISTAKES if made not in {*TRAIN_TWICE, *ALIKE}))
)
def test_mistakes_are_one_line_with_status_2(capfd, mistake):
    argv = mistake()
    capfd.readouterr()
    assert main(argv) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    rows = rows_that_say(errors[0].removeprefix("error: "), "Commands and runs")
    assert len(rows) == 1, f"docs/errors.md has not exactly one row for: {errors[0]}"
    assert rows[0].startswith(MISTAKES[mistake])
    if mistake in NEAREST:
        assert re.search(rf"did you mean '?{NEAREST[mistake]}'?\?", errors[0])


@pytest.mark.usefixtures("here")
def test_a_clip_that_broke_is_said_and_the_run_goes_on(capfd):
    Path("clips/a/0.mp4").write_text("no video")
    with pytest.warns(UserWarning, match=r"clips/a/0\.mp4: no weight in this step, the clip cannot be read") as caught:
        assert main(list(FIT)) == 0
    (line,) = (str(one.message) for one in caught if "failed reads" in str(one.message))
    assert rows_that_say(line, "Failures")


@pytest.mark.usefixtures("here")
def test_clips_that_are_all_gone_are_a_failure(capfd):
    for path in Path("clips").rglob("*.mp4"):
        path.write_text("no video")
    with pytest.warns(UserWarning, match="no weight in this step"):
        assert main(list(FIT)) == 1
    *_, resume, error = capfd.readouterr().err.splitlines()
    assert resume.startswith("interrupted before the first checkpoint; start again with: vidreason fit")
    (row,) = rows_that_say(error.removeprefix("error: "), "Failures")
    assert row.startswith(TOO_MANY)


@pytest.mark.usefixtures("here")
def test_a_stage_that_does_not_support_masked_samples_fails(capfd, monkeypatch):
    monkeypatch.setattr(RationaleSFTModule, "supports_masked_samples", False)
    Path("clips/a/0.mp4").write_text("no video")
    with pytest.warns(UserWarning, match="no weight in this step"):
        assert main(list(FIT)) == 1
    (row,) = rows_that_say(capfd.readouterr().err.splitlines()[-1].removeprefix("error: "), "Failures")
    assert row.startswith(NOT_SUPPORTED)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 24 GiB")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("raised", "method", "cut", "asked", "told"),
    [
        (
            CUDA,
            "training_step",
            None,
            "2.50 GiB",
            "updates.clips_per_forward is null (the whole batch), smaller values",
        ),
        (CPU, "training_step", "1", "4096 bytes", "updates.clips_per_forward is 1, which is the smallest; fewer data."),
        (
            CUDA,
            "validation_step",
            "1",
            "2.50 GiB",
            "eval.clips_per_forward is 2, smaller values take less: --model.init",
        ),
    ],
)
def test_out_of_memory_names_the_setting_and_the_plan(capfd, monkeypatch, raised, method, cut, asked, told):
    def fails(*_):
        raise type(raised)(*raised.args)  # a new one, since an exception keeps the traceback of an earlier test

    monkeypatch.setattr(RationaleSFTModule, method, fails)
    cuts = ["--model.init_args.eval.clips_per_forward=2", "--trainer.check_val_every_n_epoch=1"]
    cuts += [] if cut is None else ["--model.init_args.updates.clips_per_forward", cut]
    assert main([*FIT, *cuts]) == 1
    error = capfd.readouterr().err.splitlines()[-1].removeprefix("error: ")
    assert f"out of memory, {asked} more were asked for: model.init_args.{told}" in error
    plan = "`vidreason plan --config configs/sft_label.yaml --config small.yaml --data data.yaml"
    assert plan in error
    (row,) = rows_that_say(error, "Failures")
    assert row.startswith(OUT_OF_MEMORY)


@pytest.mark.usefixtures("here")
def test_other_errors_of_a_library_stay_as_they_are(monkeypatch):
    def fails(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(RationaleSFTModule, "training_step", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        main(list(FIT))


def test_every_documented_message_is_produced_above():
    everything = [*documented("Commands and runs"), *documented("Failures")]
    # tests of devices, disks, keys, folders, messages and classify
    elsewhere = {TOO_MANY_GPUS, FULL_DISK, MOVED, LOCKED, *ELSEWHERE}
    starts = {*MISTAKES.values(), *elsewhere, TOO_MANY, NOT_SUPPORTED, LEFT_OUT, OUT_OF_MEMORY}
    assert len(everything) == len(starts)
    assert all(sum(row.startswith(start) for start in starts) == 1 for row in everything)
