"""The YAML that a newcomer copies out of README.md."""

import re
from pathlib import Path

from vidreason.datamodules.task import Task

README = Path(__file__).parents[1] / "README.md"


def test_the_task_file_in_the_readme_loads_as_written(tmp_path):
    blocks = re.findall(r"```yaml\n(# my_task\.yaml\n.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    path = tmp_path / "my_task.yaml"
    path.write_text(blocks[0], encoding="utf-8")
    task = Task.from_yaml(path)
    assert task.label_names == ("safe", "danger")
    assert task.classes[0].definition == "people wait, board or leave"
