"""Tests what a wheel holds, and that a project with its own ``datamodules/`` can build on it."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MAPPED = ("rewards", "datamodules", "lightning_modules", "callbacks", "configs")
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "*.egg-info", "runs", "lightning_logs", "tests"
)
DISTRIBUTION_OF = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "python_multipart": "python-multipart",
    "backports": "backports-zstd",
}


def python_files() -> list[Path]:
    folders = [ROOT / "src", *(ROOT / name for name in MAPPED)]
    return [path for folder in folders for path in folder.rglob("*.py") if "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """Paths inside a wheel built from a copy, so that no ``build/`` folder of before can slip in."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    (copy / "tests").mkdir()
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return set(archive.namelist())


def installed_path(path: Path) -> str:
    inside = path.relative_to(ROOT)
    return inside.relative_to("src").as_posix() if inside.parts[0] == "src" else f"vidreason/{inside.as_posix()}"


def test_wheel_holds_every_module_config_and_weight(wheel_names):
    expected = {installed_path(path) for path in python_files()}
    expected |= {installed_path(path) for path in (ROOT / "configs").rglob("*.yaml")}
    weights = ROOT / "lightning_modules" / "vlms" / "tiny" / "weights"
    expected |= {installed_path(path) for path in weights.glob("*") if path.is_file()}
    expected.add("vidreason/py.typed")
    assert expected - wheel_names == set()


def test_wheel_has_one_top_level_package(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vidreason"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_every_package_folder_is_listed(setup_cfg):
    listed = set(setup_cfg["options"]["packages"].split())
    folders = {installed_path(path.parent).replace("/", ".") for path in python_files()}
    assert folders == listed


def test_pyproject_has_no_project_table():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(tables) == {"build-system", "tool"}
    assert "setuptools" not in tables["tool"]


@pytest.mark.parametrize("extra", ["", "serve"])
def test_every_imported_distribution_is_required(setup_cfg, extra):
    """Only the service imports what its extra brings, and only ``--logger`` the packages that it names if they lack."""
    lines = setup_cfg["options"]["install_requires"].split("\n")
    lines += setup_cfg["options.extras_require"][extra].split("\n") if extra else []
    required = {re.split(r"[\[<>=; ]", line, maxsplit=1)[0].lower() for line in lines}
    imported = set()
    for path in python_files():
        if (path.parent.name == "serving") != (extra == "serve"):
            continue
        optional = {"wandb", "mlflow"} if path.parts[-2:] == ("config", "loggers.py") else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names} - optional
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module.split(".")[0]} - optional
    outside = imported - sys.stdlib_module_names - {"vidreason", "compression"}
    assert {DISTRIBUTION_OF.get(name, name).lower() for name in outside} - required == set()


def test_compromised_lightning_releases_are_excluded(setup_cfg):
    """Lightning 2.6.2 and 2.6.3 were malicious uploads (GHSA-w37p-236h-pfx3)."""
    assert "lightning>=2.6.4" in setup_cfg["options"]["install_requires"].split()


def test_ci_clears_stale_builds():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.index("rm -rf build") < script.index("-m build --sdist --wheel")


def test_modules_are_importable_under_one_name_only():
    for path in python_files():
        name = installed_path(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if not name.endswith("__main__"):
            import_module(name)
    assert not set(MAPPED) & set(sys.modules)
    files = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("vidreason")]
    assert len(files) == len(set(files))


def test_public_names_are_lazy_and_true():
    import vidreason

    for name in vidreason.__all__:
        assert getattr(vidreason, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_it"):
        vidreason.nothing_like_it  # noqa: B018


def class_paths(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["class_path"]] if isinstance(node.get("class_path"), str) else []
        return own + [path for value in node.values() for path in class_paths(value)]
    return [path for value in node for path in class_paths(value)] if isinstance(node, list) else []


@pytest.mark.parametrize(
    "path",
    sorted(path for name in ("configs", "tools") for path in (ROOT / name).rglob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_class_paths_in_configs_resolve(path):
    for class_path in class_paths(yaml.safe_load(path.read_text(encoding="utf-8"))):
        module, _, name = class_path.rpartition(".")
        assert module.split(".")[0] in ("vidreason", "lightning", "torch", "tools"), f"{path}: {class_path}"
        assert hasattr(import_module(module), name), f"{path}: {class_path}"


DOWNSTREAM = '''
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.types import Clip


class Blinks(VideoDataModule):
    """Four clips, dark or bright."""

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("dark", "bright")

    def samples(self, split: str) -> Sequence[Clip]:
        clips = []
        for number in range(4):
            label = self.label_names[number % 2]
            path = Path("clips", f"{split}_{number}.mp4")
            write(path, level=number % 2 * 200 + 20)
            clips.append(Clip(path=path, label=label, video_id=path.stem, split=split))
        return clips


def write(path: Path, level: int) -> None:
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
'''

DOWNSTREAM_DATA = "class_path: datamodules.blinks.Blinks\ninit_args: {batch_size: 2, frames: {num_frames: 4}}\n"


@pytest.mark.slow
def test_a_project_with_its_own_datamodules_trains(tmp_path, monkeypatch):
    """One file of the user's, the installed console script, no PYTHONPATH, nothing of theirs installed."""
    package = tmp_path / "datamodules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "blinks.py").write_text(DOWNSTREAM)
    (tmp_path / "blinks.yaml").write_text(DOWNSTREAM_DATA)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = Path(sysconfig.get_path("scripts"), "vidreason")
    command = [
        str(script),
        "fit",
        "--config",
        "configs/sft_label.yaml",
        "--data",
        "blinks.yaml",
        "--trainer.max_steps=2",
    ]
    done = subprocess.run(
        [*command, "--trainer.accelerator=cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "sft_label"
    assert (run / "command.txt").is_file()
    assert any((run / "checkpoints").iterdir())
