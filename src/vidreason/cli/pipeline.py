"""``vidreason pipeline``: runs stages in order, as ordinary commands that can be repeated by hand.

A finished stage is skipped while its inputs, which include the artefacts of earlier stages, are unchanged; otherwise it
runs again. An interrupted stage is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence

from vidreason.config.files import PREFIX, shipped_folder
from vidreason.pipelines.call import next_command, read_call, run_pipeline
from vidreason.pipelines.spec import read_pipeline


def main(argv: Sequence[str]) -> int:
    """Lists the shipped pipelines, or runs one.

    Args:
        argv: Options of ``vidreason pipeline``.

    Returns:
        Exit status: 0 success, 2 wrong command line or pipeline file, else that of the stage that stopped.
    """
    if not argv:
        print(list_pipelines())
        return 0
    status = run_pipeline(argv)
    if status == 0 and (call := read_call(argv)).until is None and call.spec.stages[-1].command == "test":
        print(f"\nnext: {next_command(call.run_dir)}")
    return status


def list_pipelines() -> str:
    """Returns a list of the shipped pipelines with their stages and requirements, and how to run one."""
    lines = []
    for path in sorted((shipped_folder() / "pipelines").glob("*.yaml")):
        spec = read_pipeline(str(path))
        lines.append(f"  {PREFIX}/pipelines/{path.name}")
        lines.append(f"    what:   {spec.description}")
        lines.append(f"    stages: {', '.join(stage.name for stage in spec.stages)}")
        lines += [f"    folds:  {spec.folds}, for cross-fitted traces of train"] if spec.folds else []
        lines.append(f"    needs:  {spec.needs}")
    usage = f"run one with\n  vidreason pipeline --config {PREFIX}/pipelines/deepintuit.yaml --run_dir runs/x"
    more = (
        "on your own clips: --data my_task/data.yaml, which `vidreason init` writes; another model: --vlm ID or FOLDER"
    )
    return "\n".join(["pipelines:", *lines, "", usage, more])
