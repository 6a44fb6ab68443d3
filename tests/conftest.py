"""Fixtures that every test may use: clips made on the fly, and the folder of real ones."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: sums in one order, whatever the machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the hub; it retries for minutes without a network

from collections.abc import Callable, Generator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

WriteClip = Callable[..., Path]


def frame_pattern(index: int, width: int, height: int) -> np.ndarray:
    """A frame that carries its index as six black or white stripes, most significant first."""
    bits = [(index >> shift) & 1 for shift in range(5, -1, -1)]
    row = np.repeat(np.array(bits, dtype=np.uint8) * 200 + 25, -(-width // 6))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 12,
    size: tuple[int, int] = (96, 64),
    fps: int = 10,
    codec: str = "libx264",
    times: Sequence[float] | None = None,
    gop: int | None = None,
) -> Path:
    """Writes a clip of (width, height); a number of frames stands for frames that carry their index.

    ``times`` (seconds) shows each frame at its own moment: a variable rate. ``gop`` frames begin with a key frame.
    """
    pictures = [frame_pattern(i, *size) for i in range(frames)] if isinstance(frames, int) else list(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "12", "threads": "1"} if codec == "libx264" else {}
        options |= {} if gop is None else {"g": str(gop)}
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for place, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[place] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports without the garbage collector, which would visit a million objects of torch and transformers again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """``seed_everything`` leaves its seed in the environment, where whatever has no seed of its own finds it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_as_in_a_terminal() -> None:
    """Background processes of a script ignore SIGINT; tests send it to themselves and their processes."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def write_clip() -> WriteClip:
    """The function ``write_video(path, frames=12, size=(96, 64), fps=10, codec="libx264")``."""
    return write_video


@pytest.fixture
def test_data() -> Path:
    """The folder of real clips; skips where the environment does not name one."""
    folder = os.environ.get("VIDREASON_TEST_DATA")
    if not folder:
        pytest.skip("VIDREASON_TEST_DATA is not set: no real clips to test with")
    if not Path(folder).is_dir():
        pytest.skip(f"VIDREASON_TEST_DATA is {folder}, which is no folder")
    return Path(folder)
