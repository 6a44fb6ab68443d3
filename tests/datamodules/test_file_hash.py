"""Hashes of large files are remembered by size, modification time and inode, and never instead of another content."""

import hashlib
import os
from pathlib import Path

import pytest

from vidreason.datamodules import file_hash
from vidreason.datamodules.file_hash import content_sha, digest_folder, files_sha


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of files that were opened; files of 100 bytes are large, and the cache folder is empty."""
    monkeypatch.setattr(file_hash, "_REMEMBERED_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened: list[str] = []
    real = Path.open

    def watched(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode == "rb":
            opened.append(path.name)
        return real(path, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", watched)
    return opened


def write(path: Path, content: bytes, age: float = 60.0) -> Path:
    path.write_bytes(content)
    when = path.stat().st_mtime - age
    os.utime(path, (when, when))
    return path


def test_a_large_file_is_read_once(reads: list[str], tmp_path: Path) -> None:
    weights = [write(tmp_path / name, name.encode() * 100) for name in ("a.safetensors", "b.safetensors")]
    expected = hashlib.sha256(b"".join(p.name.encode() + p.name.encode() * 100 for p in weights)).hexdigest()
    assert [files_sha(weights), files_sha(weights)] == [expected] * 2
    assert reads == ["a.safetensors", "b.safetensors"]
    assert content_sha(weights[0]) == hashlib.sha256(weights[0].read_bytes()).hexdigest()[:16]
    assert files_sha(weights, "r 16") != expected, "the settings are part of the hash"
    assert files_sha(weights[:1]) != expected


@pytest.mark.parametrize("change", ["content", "inode", "size"])
def test_another_content_is_read_again(reads: list[str], tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "w", b"x" * 200)
    before = content_sha(path)
    stat = path.stat()
    other = tmp_path / "other"
    other.write_bytes(b"y" * (201 if change == "size" else 200))
    if change == "inode":
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times
        os.replace(other, path)
    else:
        path.write_bytes(other.read_bytes())  # the same inode
        if change == "size":
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_sha(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:16] != before


def test_small_and_young_files_are_not_remembered(reads: list[str], tmp_path: Path) -> None:
    small, young = write(tmp_path / "small", b"x" * 99), write(tmp_path / "young", b"x" * 200, age=0)
    for path in (small, small, young, young):
        content_sha(path)
    assert reads == ["small", "small", "young", "young"]
    assert not digest_folder().exists()


def test_a_damaged_or_unwritable_folder_only_costs_time(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "w", b"x" * 200)
    sha = content_sha(path)
    (entry,) = digest_folder().iterdir()
    for junk in ("", "[]", '{"state": 1}', "nonsense"):
        entry.write_text(junk)
        assert content_sha(path) == sha
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert content_sha(path) == sha
    assert reads == ["w"] * 6
