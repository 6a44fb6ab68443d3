import pytest

from vidreason.datamodules.task import ClassSpec, Task, find_task_file

GOOD = """
name: door
question: What happens?
classes: [{name: theft, definition: a parcel is taken}, {name: visit}]
metadata_fields: [camera]
prompts: {label: "{question} {fields} Say one of {names}."}
"""


def write(tmp_path, text):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    return path


def test_a_task_file_is_read(tmp_path):
    task = Task.from_yaml(write(tmp_path, GOOD))
    assert task.label_names == ("theft", "visit")
    assert task.classes[0] == ClassSpec("theft", "a parcel is taken")
    assert task.prompt_text("label", {"camera": "north"}) == "What happens? camera: north Say one of theft, visit."


def test_classes_may_be_plain_names(tmp_path):
    task = Task.from_yaml(write(tmp_path, "name: a\nquestion: b?\nclasses: [x, y]\n"))
    assert task == Task("a", "b?", (ClassSpec("x"), ClassSpec("y")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: door", "name: door\nmetadata: [x]", "unknown key 'metadata'"),
        ("definition", "meaning", r"unknown key 'meaning' in classes\[0\]; known are name, definition$"),
        ("{name: visit}", "{name: visit, definition: one, or two}", "key 'or two' .*; put quotes around a text"),
        ("name: door", "", "key 'name' is missing"),
        ("{name: visit}", "{name: yes}", r"'classes\[1\]\.name' must be text, got True; quote it"),
        ("{name: visit}", "{name: Theft}", "occurs twice"),
        ("{name: visit}", "{name: theft}", "occurs twice"),
        (", {name: visit}", "", "at least two classes"),
        ("{name: visit}", "{name: <answer>}", "may not stand inside an answer"),
        ("label:", "labels:", "unknown prompt kind 'labels'"),
        ("{names}", "{name}", r"unknown placeholder \{name\}"),
        ("[camera]", "[camera, camera]", "twice"),
        ("metadata_fields: [camera]", "metadata_fields: camera", "must be a list"),
        ("metadata_fields: [camera]", "ordinal: perhaps", "true or false"),
        ("classes: [", "classes: [[", r", line \d, column \d+: not valid YAML"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, old, new, message):
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        Task.from_yaml(path)
    assert str(path) in str(caught.value)


def test_every_part_of_a_task_is_in_its_hash(tmp_path):
    changes = ["", "door/gate", "happens/happened", "a parcel/the parcel", "{name: visit}/{name: call}"]
    changes += ["[camera]/[]", "Say one/Name one", "name: door/name: door\nordinal: true"]
    shas = set()
    for change in changes:
        old, _, new = change.partition("/")
        shas.add(Task.from_yaml(write(tmp_path, GOOD.replace(old, new, 1) if old else GOOD)).sha())
    assert len(shas) == len(changes)
    assert Task.from_yaml(write(tmp_path, GOOD)).sha() == Task.from_yaml(write(tmp_path, "# same\n" + GOOD)).sha()


def test_a_written_task_is_read_as_the_same(tmp_path):
    task = Task.from_yaml(write(tmp_path, GOOD))
    task.to_yaml(tmp_path / "again.yaml")
    assert Task.from_yaml(tmp_path / "again.yaml").sha() == task.sha()


def test_metadata_enters_by_name_only(tmp_path):
    task = Task.from_yaml(write(tmp_path, GOOD))
    fields = {"camera": "north", "note": "he steals it"}
    for kind in ("describe", "reason", "label", "calibrate"):
        text = task.prompt_text(kind, fields)
        assert "camera: north" in text
        assert "steals" not in text
    assert "camera" not in task.prompt_text("reason", {"camera": " "})


def test_values_are_not_templates(tmp_path):
    task = Task.from_yaml(write(tmp_path, GOOD))
    assert "camera: {names}" in task.prompt_text("reason", {"camera": "{names}"})


def test_from_labels_has_working_prompts():
    task = Task.from_labels("mine", ["a", "b"])
    assert "- a\n- b" in task.prompt_text("reason", {})
    with pytest.raises(ValueError, match="unknown prompt kind"):
        task.prompt_text("guess", {})


def test_task_files_are_found_here_or_among_the_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_task_file("tasks/weizmann.yaml")
    assert len(Task.from_yaml(shipped).classes) == 10
    own = tmp_path / "tasks" / "weizmann.yaml"
    own.parent.mkdir()
    own.write_text(GOOD)
    assert Task.from_yaml("tasks/weizmann.yaml").name == "door"
    with pytest.raises(ValueError, match=r"no task file tasks/none\.yaml: looked at .*none\.yaml and .*configs"):
        find_task_file("tasks/none.yaml")


@pytest.mark.parametrize(("name", "classes"), [("weizmann", 10), ("surveillance_fight", 2), ("utd_mhad_depth", 27)])
def test_shipped_tasks_define_every_class(name, classes):
    task = Task.from_yaml(f"tasks/{name}.yaml")
    assert task.name == name
    assert len(task.classes) == classes
    assert all(spec.definition for spec in task.classes)
