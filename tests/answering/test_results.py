"""A file of decisions: a killed command goes on, other settings are refused, and shards are disjoint and complete."""

import json
from pathlib import Path

import pytest

from vidreason.answering.results import open_results
from vidreason.answering.shard import Shard

SETTINGS = {"weights": "a" * 64, "task.name": "falls", "traces.samples": 4, "threshold": None}


def row(name: str, error: str | None = None) -> dict[str, object]:
    return {"path": name, "label": None, "error": error}


def test_it_goes_on_after_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    with open_results(path, SETTINGS) as results:
        results.add([row("a.mp4"), row("b\u2028é.mp4", "broken")])
        assert (len(results), results.failed) == (2, 1)
    whole = path.read_bytes()
    assert len(whole.splitlines()) == 2
    for torn in (b'{"path": "c.mp', b'{"path": "c.mp4", "error": null}', b"\0\0\0"):
        path.write_bytes(whole + torn)
        with open_results(path, SETTINGS) as results:
            assert path.read_bytes() == whole
            assert ("a.mp4" in results, "b\u2028é.mp4" in results, "c.mp4" in results) == (True, True, False)
            assert results.failed == 1
            results.add([row("c.mp4")])
        assert path.read_bytes() == whole + b'{"path": "c.mp4", "label": null, "error": null}\n'


def test_what_is_something_else_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match=r"r\.jsonl: holds something, and no r\.jsonl\.settings\.json beside it"):
        open_results(path, SETTINGS).__enter__()
    assert path.read_text() == "my notes\n"
    path.unlink()
    with open_results(path, SETTINGS) as results:
        results.add([row("a.mp4")])
        with pytest.raises(ValueError, match="another process is writing there"):
            open_results(path, SETTINGS).__enter__()
    kept = path.read_bytes()
    others = {
        "traces.samples was 4, is 8": {**SETTINGS, "traces.samples": 8},
        'task.name was "falls", is "gait"': {**SETTINGS, "task.name": "gait"},
        'weights was "aaaaaaaaaaaaaaa…aaa"': {**SETTINGS, "weights": "b" * 64},
        'frames.probe was absent, is "black"': {**SETTINGS, "frames.probe": "black"},
        "threshold was null, is absent": {name: value for name, value in SETTINGS.items() if name != "threshold"},
    }
    for message, settings in others.items():
        with pytest.raises(ValueError, match="holds decisions of other settings: ") as refused:
            open_results(path, settings).__enter__()
        assert message in str(refused.value)
        assert path.read_bytes() == kept
    path.write_bytes(kept + b"[1]\n" + kept)
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2: no row of vidreason classify"):
        open_results(path, SETTINGS).__enter__()
    assert path.read_bytes() == kept + b"[1]\n" + kept
    (tmp_path / "r.jsonl.settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"r\.jsonl\.settings\.json: damaged"):
        open_results(path, SETTINGS).__enter__()
    with pytest.raises(ValueError, match="a folder"):
        open_results(tmp_path, SETTINGS).__enter__()


def test_shards_are_disjoint_complete_and_stay_as_clips_are_added() -> None:
    names = [f"clips/{number}.mp4" for number in range(2000)]
    shards = [Shard(number, 7) for number in range(1, 8)]
    parts = [[name for name in names if shard.owns(name)] for shard in shards]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(abs(len(part) - 2000 / 7) < 80 for part in parts)
    more = ["new.mp4", *names[::-1]]
    assert [name for name in more if shards[2].owns(name) and name != "new.mp4"] == parts[2][::-1]
    assert Shard(1, 1).owns("x")


def test_each_shard_has_a_file_and_a_rank_its_shard() -> None:
    assert Shard.parse("2/4").file(Path("out/r.jsonl")) == Path("out/r-2-of-4.jsonl")
    assert Shard.parse("1/1").file(Path("r.jsonl")) == Path("r.jsonl")
    assert Shard.of_environment({"RANK": "3", "WORLD_SIZE": "4"}) == Shard(4, 4)
    assert Shard.of_environment({}) == Shard(1, 1)
    for wrong in ("0/4", "5/4", "2", "a/b", "1/0"):
        with pytest.raises(ValueError, match=f"--shard {wrong}: must be a part of a whole"):
            Shard.parse(wrong)


def test_rows_are_one_json_object_a_line(tmp_path: Path) -> None:
    with open_results(tmp_path / "r.jsonl", SETTINGS) as results:
        results.add([row("a\nb.mp4")])
    assert [json.loads(line)["path"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == ["a\nb.mp4"]
