"""``classify --out``: what is decided is in the file, the same command goes on, and no clip stops the others."""

import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from vidreason.cli import classify
from vidreason.cli.main import main
from vidreason.inference import Decision

DOCS = Path(__file__).parents[2] / "docs"


class Decider:
    """A classifier that decides without a model: names that contain ``broken`` cannot be read."""

    answers, threshold = "nobody", None

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.interrupt_at = ""
        self.weights = "a"

    def settings(self, traces: int | None) -> dict[str, object]:
        return {"weights": self.weights, "traces.samples": traces or 2}

    def decide(self, clips: Iterator, traces: int | None) -> Iterator[Decision]:
        for clip in clips:
            self.asked.append(clip.name)
            if clip.name == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGTERM)
            broken, dead = "broken" in clip.name, "dead" in clip.name
            error = f"{clip.name}: no answer" if broken or dead else None
            yield Decision(clip.name, None if error else "a", {}, (), 0.1, error, unanswered=dead)


@pytest.fixture
def decider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decider:
    """The classifier of every command, in a folder with a manifest ``t.csv`` of ten clips and a file ``run``."""
    found = Decider()
    monkeypatch.setattr(classify, "_load", lambda options: found)
    monkeypatch.setattr(classify, "run_notes", lambda run: [])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("path\n" + "".join(f"{number}.mp4\n" for number in range(10)))
    return found


ASK = ["classify", "t.csv", "--run", "run", "--out", "r.jsonl"]


def names(file: str = "r.jsonl") -> list[str]:
    return [json.loads(line)["path"] for line in Path(file).read_text().splitlines()]


def test_an_interrupted_command_goes_on_where_it_was(decider: Decider, capsys: pytest.CaptureFixture[str]) -> None:
    decider.interrupt_at = "4.mp4"
    assert main(ASK) == 130
    assert names() == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert "r.jsonl: 4 clips are in it; the same command goes on\ninterrupted" in capsys.readouterr().err
    with Path("r.jsonl").open("a") as file:
        file.write('{"path": "4.mp4", "lab')  # as a kill in the middle of a write leaves it
    decider.interrupt_at, decider.asked = "", []
    assert main(ASK) == 0
    assert decider.asked == [f"{number}.mp4" for number in range(4, 10)]
    assert names() == [f"{number}.mp4" for number in range(10)]
    assert "r.jsonl: 10 clips, 6 of them new, 0 not read" in capsys.readouterr().out
    assert main(ASK) == 0
    assert len(names()) == 10


def test_other_weights_or_settings_are_refused_by_name(decider: Decider, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASK) == 0
    assert main([*ASK, "--traces", "2"]) == 0, "which is the number of the run"
    kept = Path("r.jsonl").read_bytes()
    assert main([*ASK, "--traces", "8"]) == 2
    assert "--out r.jsonl: holds decisions of other settings: traces.samples was 2, is 8" in capsys.readouterr().err
    decider.weights = "b"
    assert main(ASK) == 2
    assert 'weights was "a", is "b"; give another --out' in capsys.readouterr().err
    assert Path("r.jsonl").read_bytes() == kept


def test_a_clip_that_cannot_be_read_is_a_row_and_one_that_does_not_answer_is_asked_again(
    decider: Decider, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("t.csv").write_text("path\n0.mp4\nbroken.mp4\ndead.mp4\n1.mp4\n0.mp4\n")
    assert main(ASK) == 1
    assert names() == ["0.mp4", "broken.mp4", "1.mp4"], "a clip that is listed twice is one row"
    said = capsys.readouterr()
    assert "r.jsonl: 3 clips, 3 of them new, 1 not read" in said.out
    assert "1 clips are not in it, and the same command asks about them again: dead.mp4: no answer" in said.err
    row = json.loads(Path("r.jsonl").read_text().splitlines()[1])
    assert set(row) == {"path", "label", "probs", "traces", "seconds", "error", "abstained"}
    assert row["error"] == "broken.mp4: no answer"
    decider.asked = []
    assert main(ASK) == 1, "a row that says why it was not read stays"
    assert decider.asked == ["dead.mp4"]


def test_shards_and_ranks_write_their_own_files(decider: Decider, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        assert main([*ASK, "--shard", f"{number}/3"]) == 0
    parts = [names(f"r-{number}-of-3.jsonl") for number in (1, 2, 3)]
    assert sorted(sum(parts, [])) == [f"{number}.mp4" for number in range(10)]
    assert not Path("r.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    decider.asked = []
    assert main(ASK) == 0
    assert decider.asked == [], "rank 1 of 3 is shard 2/3, which is done"
    Path("t.csv").write_text("path\n" + "".join(f"broken{number}.mp4\n" for number in range(9)))
    assert main(ASK) == 0, "another status would make torchrun end the other ranks"


def test_options_that_do_not_fit_are_named(decider: Decider, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    for more, message in {
        ("--shard", "3/2"): "--shard 3/2: must be a part of a whole such as 1/4",
        ("--batch_size", "0"): "--batch_size 0: must be at least 1",
        ("--base", "x"): "--base: belongs to --export; leave it out",
    }.items():
        assert main([*ASK, *more]) == 2
        assert message in capsys.readouterr().err
    for out in ("pipe", "folder"):
        assert main([*ASK[:-1], out]) == 2
        assert f"--out {out}: a" in capsys.readouterr().err
    assert main(["classify", "t.csv", "--run", "x", "--export", "y"]) == 2
    assert "not allowed with argument --run" in capsys.readouterr().err
    assert main(["classify", "t.csv"]) == 2
    assert "one of the arguments --run --export is required" in capsys.readouterr().err


def test_torchrun_takes_its_command_lines_in_the_documentation() -> None:
    """It completes options: without the double dash it takes ``--run`` for one of its own."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        lines = page.read_text().replace("\\\n", " ").splitlines()
        found += [shlex.split(re.sub(r"\$\w+", "0", line)) for line in lines if line.strip().startswith("torchrun ")]
    told = [parse_args(words[1:]) for words in found]
    assert {(args.training_script, args.training_script_args[0]) for args in told} == {
        ("vidreason", "classify"),
        ("vidreason", "fit"),
    }
