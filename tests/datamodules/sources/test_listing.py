"""Clips are listed one after the other: in the order of their paths, and without being kept."""

import os
import tracemalloc
from pathlib import Path

import pytest

from vidreason.datamodules.clips import time_limit
from vidreason.datamodules.clips.mounts import Lookout, mount_of
from vidreason.datamodules.clips.time_limit import ReadTimeoutError, look_at
from vidreason.datamodules.key_set import KeySet, key_of
from vidreason.datamodules.sources.listing import ListedClip, Listing


def listed(*places: Path, **options) -> list[ListedClip]:
    return list(Listing(places, **options).clips())


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path: Path) -> None:
    names = ["b/2.mp4", "b.mp4", "a/z/1.MOV", "a/b.webm", "shots/2.png", "shots/deep/1.mkv", "mixed/1.png"]
    names.append("mixed/2.avi")
    for name in [*names, "a/notes.txt", "a/more.txt", "a/LICENSE", "_old/x.mp4", "a/.hidden/y.mp4", ".z.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "a" / "pipe.mp4")
    (tmp_path / "b" / "up").symlink_to("..")
    listing = Listing([tmp_path])
    found = [clip.path for clip in listing.clips()]
    wanted = [tmp_path / name for name in names if not name.endswith(".png")]
    assert found == sorted([*wanted, tmp_path / "shots"])
    assert listing.total is None
    assert listing.passed_over() == (
        "1 of .png, 2 of .txt, 1 files without a suffix, pipe.mp4 (not a regular file), folder .hidden, folder _old"
    )


def test_places_are_looked_at_before_the_first_clip(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no clip in this folder"):
        Listing([tmp_path / "a.mp4", tmp_path / "empty"]).clips()
    with pytest.raises(ValueError, match="no such manifest"):
        Listing([tmp_path / "a.mp4", tmp_path / "t.csv"]).clips()
    assert listed(tmp_path / "lost.mp4") == [ListedClip(tmp_path / "lost.mp4", str(tmp_path / "lost.mp4"))]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_a_manifest_have_parts_and_columns(tmp_path: Path, kind: str) -> None:
    text = {
        "csv": "path,start,end,place\na.mp4,,,\nsub/b.mp4,1,2.5,garden\n",
        "jsonl": '{"path": "a.mp4"}\n\n{"path": "sub/b.mp4", "start": 1, "end": 2.5, "place": "garden"}\n',
    }[kind]
    table = tmp_path / f"t.{kind}"
    table.write_text(text)
    listing = Listing([table])
    first, second = listing.clips()
    assert listing.total == 2
    assert (first.path, first.name, first.stretch, first.fields) == (tmp_path / "a.mp4", "a.mp4", None, {})
    assert (second.name, second.fields) == ("sub/b.mp4#t=1,2.5", {"place": "garden"})
    assert second.where == f"t.{kind}, row 3"
    assert listed(table, root=tmp_path / "other")[0].path == tmp_path / "other" / "a.mp4"
    table.write_text(text.replace("a.mp4", ""))
    with pytest.raises(ValueError, match=r"no path: row [12]"):
        Listing([table]).clips()
    table.write_text(text.replace("1", '"one"'))
    with pytest.raises(ValueError, match=r"row 3: start 'one': is no number of seconds"):
        Listing([table]).clips()


def test_rows_that_could_not_be_told_apart(tmp_path: Path) -> None:
    tables = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tables.append(tmp_path / name / "t.csv")
        tables[-1].write_text("path,place\n1.mp4,garden\n1.mp4,garden\n")
    assert {clip.name for clip in listed(tables[0])} == {"1.mp4"}, "the same row twice is one clip"
    found = listed(*tables)
    assert {clip.name: clip.path for clip in found} == {
        str(tmp_path / name / "1.mp4"): tmp_path / name / "1.mp4" for name in ("a", "b")
    }
    tables[0].write_text("path,place\n1.mp4,garden\n2.mp4,\n1.mp4,cellar\n")
    with pytest.raises(ValueError, match=r"t\.csv: row 4: 1\.mp4 stands in an earlier row with other columns"):
        Listing([tables[0]]).clips()


def test_a_link_that_leads_to_itself_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.mp4").write_bytes(b"x")
    listing = Listing([tmp_path])
    assert [clip.path for clip in listing.clips()] == [tmp_path / "a.mp4"]
    assert listing.passed_over() == "loop (not a regular file)"


def test_rows_are_not_kept(tmp_path: Path) -> None:
    """The names of listed clips in a set take a small part of what a list of the clips takes."""
    table = tmp_path / "t.csv"
    table.write_text("path,place\n" + "".join(f"clips/{number:08d}.mp4,garden\n" for number in range(6000)))
    done, peaks = KeySet(), []
    for use in (lambda clips: [done.add(key_of(clip.name)) for clip in clips].count(True), list):
        tracemalloc.start()
        use(Listing([table]).clips())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(done) == 6000
    assert peaks[0] < peaks[1] / 5


def test_a_set_of_names_is_exact_across_its_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidreason.datamodules.key_set._RECENT", 7)
    found = KeySet()
    assert [found.add(key_of(str(i % 50))) for i in range(100)] == [True] * 50 + [False] * 50
    assert len(found) == 50
    assert all(key_of(str(i)) in found for i in range(50))
    assert not any(key_of(str(i)) in found for i in range(50, 500))


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths below a folder ``dead…`` do not answer; returns those that were looked at."""
    asked, real = list[Path](), time_limit.call_reader

    def stuck(function, path, *args, timeout):
        if any(part.startswith("dead") for part in path.parts):
            asked.append(path)
            raise ReadTimeoutError("still not read")
        return real(function, path, *args, timeout=None)

    monkeypatch.setattr(time_limit, "call_reader", stuck)
    return asked


def test_a_thousand_clips_on_a_dead_mount_cost_one_time_limit(
    tmp_path: Path, dead: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fine.mp4").write_bytes(b"x")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 1 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path}/dead\\040mount rw - nfs x rw\n")
    monkeypatch.setattr("vidreason.datamodules.clips.mounts._MOUNTS", mounts)
    (tmp_path / "link").symlink_to("dead mount/inner")
    lookout = Lookout(timeout=20)
    with pytest.raises(ReadTimeoutError, match="1.mp4: no answer within 20 seconds"):
        lookout.look(tmp_path / "dead mount" / "a" / "1.mp4")
    for path in ("dead mount/b/2.mp4", "dead mount/3.mp4", "link/4.mp4"):
        with pytest.raises(ReadTimeoutError, match=r"not looked at, since .*1\.mp4 on the same mount gave no answer"):
            lookout.look(tmp_path / path)
    assert lookout.look(tmp_path / "fine.mp4") == "file"
    assert len(dead) == 1
    lookout = Lookout(again=0.0)
    for _ in range(2):
        with pytest.raises(ReadTimeoutError, match="no answer"):
            lookout.look(tmp_path / "dead mount" / "1.mp4")
    assert len(dead) == 3, "it is looked at again after some time"


def test_without_a_mount_it_is_the_folder(tmp_path: Path, dead: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidreason.datamodules.clips.mounts._MOUNTS", tmp_path / "none")
    assert mount_of(tmp_path / "dead" / "1.mp4") == tmp_path / "dead"
    places = [tmp_path / "dead" / f"{number}.mp4" for number in range(1000)]
    assert [clip.path for clip in listed(*places)] == places, "each is listed; reading says what is wrong"
    assert len(dead) == 1


def test_no_permission_is_not_told_as_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    assert look_at(tmp_path / "none.mp4", timeout=None) is None
    assert look_at(tmp_path / "none.mp4" / "below", timeout=None) is None
    assert look_at(tmp_path / ("x" * 300), timeout=None) is None
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(PermissionError, match="closed"):
        look_at(tmp_path / "closed", timeout=None)
