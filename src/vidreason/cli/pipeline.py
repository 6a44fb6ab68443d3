"""``vidreason pipeline``: stages in order, as ordinary commands that can be repeated by hand.

What is finished is skipped while its inputs are unchanged, what was interrupted is resumed, and what lies behind a
changed stage runs again.
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
        Exit status: 0 done, 2 a wrong command line or pipeline file, else that of the stage that stopped.
    """
    if not argv:
        print(list_pipelines())
        return 0
    status = run_pipeline(argv)
    if status == 0 and (call := read_call(argv)).until is None and call.spec.stages[-1].command == "test":
        print(f"\nnext: {next_command(call.run_dir)}")
    return status


def list_pipelines() -> str:
    """The shipped pipelines with their stages and what each needs, and how to run one."""
    lines = []
    for path in sorted((shipped_folder() / "pipelines").glob("*.yaml")):
        spec = read_pipeline(str(path))
        lines.append(f"  {PREFIX}/pipelines/{path.name}")
        lines.append(f"    what:   {spec.description}")
        lines.append(f"    stages: {', '.join(stage.name for stage in spec.stages)}")
        lines.append(f"    needs:  {spec.needs}")
    usage = f"run one with\n  vidreason pipeline --config {PREFIX}/pipelines/deepintuit.yaml --run_dir runs/x"
    more = (
        "on your own clips: --data my_task/data.yaml, which `vidreason init` writes; another model: --vlm ID or FOLDER"
    )
    return "\n".join(["pipelines:", *lines, "", usage, more])
