"""One service of a small reviewer for all tests that do not change it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import served_model as world
import stage_world

from vidreason.answering.loaded import LoadedModel
from vidreason.datamodules.types import Clip

small_base, clip_folder = stage_world.small_base, stage_world.clip_folder


@pytest.fixture(scope="session")
def clips(clip_folder: Path) -> list[bytes]:
    """The content of three grey clips."""
    return [(clip_folder / f"{i}.mp4").read_bytes() for i in range(3)]


@pytest.fixture(scope="session")
def loaded(small_base: Path, clips: list[bytes]) -> LoadedModel:
    """A reviewer whose data set has the first clip."""
    return world.load_reviewer(small_base, {clips[0]: Clip(Path("known.mp4"), "dark", "known 0", "test")})


@pytest.fixture(scope="session")
def port(loaded: LoadedModel) -> Iterator[int]:
    """The port of a running service."""
    with world.running(world.make_service(loaded)) as port:
        yield port
