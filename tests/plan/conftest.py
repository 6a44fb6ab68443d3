"""Clips that are headers only: a manifest with their length and size, and empty files."""

from pathlib import Path

import pytest
import vlm_builders


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data section of ten clips, of which ``b_long.mp4`` has the largest frames; its validation clips are smaller."""
    rows = ["path,label,split,clip_frames,clip_fps,clip_width,clip_height"]
    sizes = [("b_long", "train", 224, 168), *((f"a{i}", "train", 112, 84) for i in range(6))]
    sizes += [("c0", "val", 84, 84), ("c1", "test", 84, 84), ("c2", "cal", 84, 84)]
    for number, (name, split, width, height) in enumerate(sizes):
        (tmp_path / f"{name}.mp4").touch()
        rows.append(f"{name}.mp4,{('left', 'right')[number % 2]},{split},50,25,{width},{height}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    section = tmp_path / "data.yaml"
    section.write_text(
        "class_path: vidreason.datamodules.manifest.ManifestDataModule\n"
        f"init_args: {{manifest: {tmp_path / 'manifest.csv'}, frames: {{num_frames: 4}}, eval_batch_size: 2}}\n"
    )
    return section


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen2.5-VL without weights."""
    folder = vlm_builders.write_qwen(tmp_path / "qwen")
    next(folder.glob("*.safetensors")).unlink()
    return folder
