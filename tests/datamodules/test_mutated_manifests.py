"""Manifests that were damaged at random: each is refused by name, or all of its rows are read as they are."""

import csv
import io
import json
import random

import pytest

from vidreason.cli.main import raised_by_user_code
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.sources.source import SourceOptions, read_source

CLIPS = 12
HEADER = ("path", "label", "split", "group", "camera")
PIECES = ('"', ",", ";", "\t", "\n", "\r", "\r\n", "\0", "\x1b[2J", "\ufeff", "é", "\u202e", " ", "{", "}", "null")
FIFTY = 50


def rows():
    splits = ("train", "train", "val", "cal", "test", "train")
    return [(f"{i}.mp4", "ab"[i // 2 % 2], splits[i % 6], f"g{i}", f"door, {i}") for i in range(CLIPS)]


def as_csv():
    text = io.StringIO(newline="")
    csv.writer(text).writerows([HEADER, *rows()])
    return text.getvalue().encode()


def as_jsonl():
    return b"".join(json.dumps(dict(zip(HEADER, row, strict=True))).encode() + b"\n" for row in rows())


def mutate(rng, content):
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(content) + 1)
        kind = rng.choice(("flip", "cut", "piece", "twice", "swap", "end", "label"))
        lines = content.splitlines(keepends=True)
        if kind == "flip" and place < len(content):
            content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place] + content[place + rng.randint(1, 30) :]
        elif kind == "piece":
            content = content[:place] + rng.choice(PIECES).encode() + content[place:]
        elif kind == "twice" and lines:
            content += rng.choice(lines)
        elif kind == "swap":
            rng.shuffle(lines)
            content = b"".join(lines)
        elif kind == "end":
            content = content[: max(place, 1)]
        elif kind == "label":
            content = content.replace(b"door", rng.choice((b"gate", b"", b"'", b"NaN")), rng.randint(1, 5))
    return content


def rows_of(content, suffix):
    """The rows that a table holds, read independently of the package."""
    text = content.decode("utf-8-sig")
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    header, *lines = (line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line)
    names = [name.strip() for name in header]
    return [dict(zip(names, line, strict=True)) for line in lines]


@pytest.mark.parametrize(("suffix", "write"), [(".csv", as_csv), (".jsonl", as_jsonl)])
def test_fifty_damaged_manifests_lose_nothing(tmp_path, suffix, write):
    for row in rows():
        (tmp_path / row[0]).touch()
    manifest = tmp_path / f"m{suffix}"
    read = listed = with_traceback = 0
    refused: list[str] = []
    refused_source: list[str] = []
    for number in range(FIFTY):
        content = mutate(random.Random(f"{suffix}/{number}"), write())
        manifest.write_bytes(content)
        data = ManifestDataModule(manifest)
        try:
            data.setup("fit")
        except ValueError as error:
            refused.append(str(error))
            with_traceback += not raised_by_user_code(error)
        else:
            wanted = {row["path"].strip(): row["label"].strip() for row in rows_of(content, suffix)}
            found = [clip for split in data.splits() for clip in data.clips(split)]
            assert {clip.path.name: clip.label for clip in found} == wanted, number
            assert len(found) == len(rows_of(content, suffix)), number
            read += 1
        try:
            source = read_source(manifest, SourceOptions(as_listed=True))
        except ValueError as error:
            refused_source.append(str(error))
            with_traceback += not raised_by_user_code(error)
        else:
            if content.startswith(b",".join(name.encode() for name in HEADER)) or suffix == ".jsonl":
                assert len(source.clips) == number_of_rows(content, suffix), number
                listed += 1
    assert read + len(refused) == FIFTY
    assert with_traceback == 0, "on the command line"
    assert min(read, len(refused), listed) > 5
    assert [error for error in refused + refused_source if str(manifest) not in error or "\n" in error] == []


def number_of_rows(content, suffix):
    """Rows of a table, which is in the encoding of spreadsheets if it is not UTF-8."""
    try:
        return len(rows_of(content, suffix))
    except UnicodeDecodeError:
        return len(rows_of(content.decode("cp1252").encode(), suffix))
