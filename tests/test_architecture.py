"""The rules that hold the layout together and that no linter knows."""

import ast
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("rewards", "datamodules", "lightning_modules", "callbacks", "configs")
SOURCES = sorted(
    path
    for folder in (*FOLDERS, "src", "benchmarks", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
DECODERS = {"decord", "av", "torchcodec"}
RECORDS = {"Looks", "SummaryRow"}
"""Rows of a table, which only our own code makes; they may have more fields than a constructor has arguments"""


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a file's tree, the module first."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return frozenset(names)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_sources():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_are_absolute_from_vidreason(path):
    names = imported(path)
    assert not [name for name in names if name.startswith(".")], "relative import"
    assert not tops(path) & set(FOLDERS), "a folder imported under its bare name"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent == ROOT / "rewards"], ids=relative)
def test_rewards_need_the_standard_library_only(path):
    assert tops(path) - sys.stdlib_module_names <= {"vidreason"}


def test_functions_need_torch_only():
    for path in (ROOT / "lightning_modules" / "functional").glob("*.py"):
        assert tops(path) - sys.stdlib_module_names <= {"vidreason", "torch"}, relative(path)


def test_decoders_stand_behind_one_file():
    """Writing mp4 files is not decoding: files named for rendering may use PyAV's muxer."""
    users = {
        relative(path) for path in SOURCES if tops(path) & DECODERS and not relative(path).startswith("benchmarks")
    }
    readers = {name for name in users if "render" not in name and "write" not in name}
    assert readers == {"datamodules/clips/pyav_packets.py", "datamodules/clips/pyav_reader.py"}
    behind = {"vidreason.datamodules.clips.pyav_reader", "vidreason.datamodules.clips.pictures"}
    users = {relative(path) for path in SOURCES if imported(path) & behind}
    assert users == {"datamodules/clips/decoding.py", "datamodules/clips/header.py"}, "the latter reads no frames"
    named = {relative(path) for path in SOURCES if '"decord"' in path.read_text(encoding="utf-8").replace("'", '"')}
    assert {name for name in named if "import_module" in (ROOT / name).read_text()} == {
        "datamodules/clips/decord_reader.py"
    }


def test_the_grammar_is_written_in_one_file():
    """Strings that begin with a tag build or match completions; sentences about tags are fine."""
    tag = re.compile(r"\W*</?(think|answer)>")
    for path in SOURCES:
        if relative(path) == "rewards/completion.py":
            continue
        # a bare string is a docstring, of a field too
        docstrings = {id(node.value) for node in nodes(path) if isinstance(node, ast.Expr)}
        for node in nodes(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not tag.match(node.value), f"{relative(path)}, line {node.lineno}: use rewards/completion.py"


def test_quantisation_is_configured_in_one_folder():
    users = {relative(path) for path in SOURCES if "bitsandbytes" in tops(path)}
    assert all(name.startswith("lightning_modules/vlms/") for name in users)


def test_the_command_line_starts_without_heavy_imports():
    for name in (
        "__init__",
        "__main__",
        "cli/__init__",
        "cli/main",
        "cli/configs",
        "config/files",
        "config/options",
        "run_folder",
        "exit_codes",
    ):
        path = ROOT / "src" / "vidreason" / f"{name}.py"
        top_level = ast.parse(path.read_text(encoding="utf-8")).body
        found = {
            alias.name.partition(".")[0] for node in top_level if isinstance(node, ast.Import) for alias in node.names
        } | {(node.module or "").partition(".")[0] for node in top_level if isinstance(node, ast.ImportFrom)}
        assert found - sys.stdlib_module_names <= {"vidreason"}, name


def test_package_folders_start_empty():
    """Importing a package imports nothing, but for the families: that registers the embedded model's Auto classes."""
    for path in SOURCES:
        exempt = (
            "src/vidreason/__init__.py",
            "lightning_modules/vlms/__init__.py",
            "lightning_modules/vlms/tiny/__init__.py",
        )
        if path.name == "__init__.py" and relative(path) not in exempt:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{relative(path)} should hold its docstring only"
            assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_swallows_errors_or_saves_hyperparameters(path):
    for node in nodes(path):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            last = node.body[-1]
            passes_on = isinstance(last, ast.Raise) and last.exc is None
            passes_on |= ast.unparse(last).endswith(f".set_exception({node.name})")  # raised where the result is asked
            assert passes_on or caught not in ("", "Exception", "BaseException"), f"line {node.lineno}: swallows all"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".save_hyperparameters"):
            raise AssertionError(f"line {node.lineno}: with it, --ckpt_path of another stage replaces the model class")


def test_no_file_without_an_idea():
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "util", "common", "helpers", "misc", "registry"}


def test_the_modules_of_lightning_are_few():
    flat = [path for path in (ROOT / "lightning_modules").glob("*.py") if path.name != "__init__.py"]
    assert 0 < len(flat) <= 6, sorted(map(relative, flat))


def test_a_stage_has_one_base_of_ours():
    from lightning import LightningModule

    for path in SOURCES:
        if path.parent == ROOT / "lightning_modules":
            importlib.import_module(dotted(path))
    stages = [kind for kind in _subclasses(LightningModule) if kind.__module__.startswith("vidreason.")]
    assert {"VLMModule", "RationaleSFTModule", "GRPOModule", "CalibrationModule"} <= {kind.__name__ for kind in stages}
    for kind in stages:
        ours = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("vidreason.")]
        assert len(ours) <= 2, f"{kind.__name__} stands on {ours[1:]}"


def test_constructors_are_narrow():
    """Arguments that a class hands on to its base count as the base's."""
    classes = {node.name: node for path in SOURCES for node in nodes(path) if isinstance(node, ast.ClassDef)}
    for name, node in classes.items():
        bases = [classes[base] for base in map(ast.unparse, node.bases) if base in classes]
        inherited = {argument for base in bases for argument in _constructor_arguments(base)}
        own = [argument for argument in _constructor_arguments(node) if argument not in inherited]
        assert len(own) <= 12 or name in RECORDS, f"{name} takes {len(own)} arguments, group them: {', '.join(own)}"


def test_no_module_imports_itself_through_others():
    """Imports inside functions and under ``TYPE_CHECKING`` count."""
    modules = {dotted(path): path for path in SOURCES if dotted(path).startswith("vidreason.")}
    graph = {name: _own_imports(path, modules.keys()) - {name} for name, path in modules.items()}
    circles = [circle for circle in _strongly_connected(graph) if len(circle) > 1]
    assert not circles, "\n".join(" <-> ".join(sorted(circle)) for circle in circles)


def test_a_circle_would_be_found():
    assert _strongly_connected({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}, {"a"}, {"d"}]


def test_nothing_forks_a_process_that_may_have_threads():
    """Workers of loaders come from ``worker_options``, or from the loader that another one is made of."""
    forks = ("os.fork(", "preexec_fn", "ProcessPoolExecutor", '"fork"')
    loaders = 0
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        found = [word for word in forks if word in text]
        assert not found, f"{relative(path)}: {', '.join(found)}"
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if "collate_fn" in given:
                loaders += 1
                safe = given.get(None, "").startswith("worker_options(") or "multiprocessing_context" in given
                assert safe, f"{relative(path)}, line {call.lineno}: its workers would be forks"
    assert loaders >= 2


def dotted(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "src":
        parts = parts[1:]
    elif parts[0] in FOLDERS:
        parts = ("vidreason", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _own_imports(path: Path, modules: Iterable[str]) -> set[str]:
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in inner}
    return found.intersection(modules)


def _strongly_connected(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Tarjan's algorithm: sets of nodes that can reach each other, those that are imported first."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            at = stack.index(node)
            found.append(set(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _constructor_arguments(node: ast.ClassDef) -> list[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = item.args
            return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return []
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return [ast.unparse(f.target) for f in fields if "ClassVar" not in ast.unparse(f.annotation)]
