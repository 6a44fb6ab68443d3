"""Tests which metadata tells the label, against counts by hand."""

import logging
from pathlib import Path

import pytest

from vidreason.datamodules.leaks import find_leaks, value_accuracy
from vidreason.datamodules.types import Clip


def clips(*rows: tuple[str | None, str]) -> list[Clip]:
    return [Clip(Path(f"{i}.mp4"), label, str(i), fields={"note": note}) for i, (label, note) in enumerate(rows)]


def test_values_are_judged_by_the_other_clips() -> None:
    """Camera 1: fall, fall, walk; camera 2: walk, walk; one clip alone, one without a value."""
    data = clips(("fall", "1"), ("fall", "1"), ("walk", "1"), ("walk", "2"), ("walk", "2"), ("walk", "3"), ("fall", ""))
    # the others of camera 1 are {fall, walk} (a tie) for each fall and {fall, fall} for the walk; camera 2 is right
    assert value_accuracy(data, "note") == pytest.approx(4 / 5)
    assert value_accuracy(data, "speech") is None
    assert value_accuracy(clips(("fall", "a"), ("walk", "b")), "note") is None, "no two alike"


@pytest.mark.parametrize(
    ("note", "told"),
    [("a PASS-BY, surely", True), ("they pass by", True), ("passing", False), ("bypass", False), ("", False)],
)
def test_a_label_in_words(note: str, told: bool) -> None:
    data = clips(*[("pass_by", note)] * 2, *[("theft", "quiet")] * 8)
    assert any("names the label of 20 %" in line for line in find_leaks(data, ["note"])) == told


def test_harmless_metadata_is_not_reported() -> None:
    harmless = clips(*[(label, camera) for label in ("fall", "walk") for camera in ("1", "2", "3") for _ in range(4)])
    assert find_leaks(harmless, ["note"]) == []
    telling = clips(*[("fall", "1"), ("walk", "2")] * 6)
    assert ["alone tells the label of 100 %" in line for line in find_leaks(telling, ["note"])] == [True]
    assert find_leaks(telling, []) == [], "a field that no prompt may hold is nobody's business"
    assert find_leaks(clips((None, "1"), (None, "1")), ["note"]) == []


def test_a_data_set_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from vidreason.datamodules.manifest import ManifestDataModule

    rows = ["path,label,split,note"]
    for i in range(12):
        (tmp_path / f"{i}.mp4").write_bytes(b"x")
        rows.append(
            f"{i}.mp4,{('fall', 'walk')[i % 2]},{'train' if i < 8 else 'test'},seen to {('fall', 'walk')[i % 2]}"
        )
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    for fields, warned in (("[note]", True), ("[]", False)):
        (tmp_path / "t.yaml").write_text(
            f"name: t\nquestion: What?\nclasses: [fall, walk]\nmetadata_fields: {fields}\n"
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ManifestDataModule(tmp_path / "m.csv", tmp_path / "t.yaml", split_fractions={"val": 0.2}).setup("fit")
        assert ("'note' names the label" in caplog.text) == warned
