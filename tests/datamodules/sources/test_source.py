import json
import os
import unicodedata

import pytest

from vidreason.datamodules.sources.columns import ColumnNames
from vidreason.datamodules.sources.source import SourceOptions, read_source
from vidreason.rewards.completion import render_completion

CLIPS = [(f"v/{i}.mp4", "ab"[i % 2]) for i in range(6)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "v").mkdir()
    for name, _ in CLIPS:
        (tmp_path / name).touch()
    return tmp_path


def csv(folder, header, rows=CLIPS, name="t.csv", delimiter=",", encoding="utf-8"):
    lines = [header, *(delimiter.join(row) for row in rows)]
    path = folder / name
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


def pairs(source):
    return [(clip.name, clip.label) for clip in source.clips]


@pytest.mark.parametrize(
    ("delimiter", "encoding", "name"),
    [
        (",", "utf-8", "t.csv"),
        (";", "utf-8-sig", "t.csv"),
        ("\t", "utf-8", "t.tsv"),
        ("|", "utf-8", "t.txt"),
        (";", "utf-16", "T.CSV"),
    ],
)
def test_tables_of_any_spelling(folder, delimiter, encoding, name):
    header = delimiter.join(("Video Path", "Category"))
    source = read_source(csv(folder, header, name=name, delimiter=delimiter, encoding=encoding))
    assert pairs(source) == CLIPS
    assert all(clip.file.is_file() for clip in source.clips)
    assert any("path: column 'Video Path', guessed" in note for note in source.notes)


def test_windows_1252_is_read_and_said(folder):
    (folder / "v" / "ü.mp4").touch()
    source = read_source(csv(folder, "path,label", [*CLIPS, ("v/ü.mp4", "größe")], encoding="cp1252"))
    assert source.clips[-1].file.is_file()
    assert source.clips[-1].label == "größe"
    assert "Windows-1252" in source.kind


def test_words_are_preferred_to_numbers_and_other_columns_are_kept(folder):
    rows = [(path, str(i % 2), label, f"p{i}") for i, (path, label) in enumerate(CLIPS)]
    source = read_source(csv(folder, "file,label,class_name,person", rows))
    assert pairs(source) == CLIPS
    assert source.clips[3].fields == {"label": "1", "person": "p3"}


def test_columns_can_be_named(folder):
    rows = [(path, label, "xy"[i // 3], f"g{i}", "validation") for i, (path, label) in enumerate(CLIPS)]
    path = csv(folder, "path,label,other,who,when", rows)
    columns = ColumnNames(label="other", group="who", split="when")
    source = read_source(path, SourceOptions(columns))
    assert [clip.label for clip in source.clips] == list("xxxyyy")
    assert source.clips[2].group == "g2"
    assert {clip.split for clip in source.clips} == {"val"}
    assert {clip.split for clip in read_source(path).clips} == {""}, "no column is called split"


def test_subset_is_a_split_only_if_it_says_so(folder):
    rows = [(path, label, ("training", "testing")[i % 2]) for i, (path, label) in enumerate(CLIPS)]
    assert {clip.split for clip in read_source(csv(folder, "path,label,subset", rows)).clips} == {"train", "test"}
    rows = [(path, label, "kitchen") for path, label in CLIPS]
    assert {clip.split for clip in read_source(csv(folder, "path,label,subset", rows)).clips} == {""}


def test_where_keeps_rows(folder):
    rows = [(path, label, "xy"[i // 3]) for i, (path, label) in enumerate(CLIPS)]
    path = csv(folder, "path,label,cam", rows)
    assert pairs(read_source(path, SourceOptions(where={"cam": "y"}))) == CLIPS[3:]
    with pytest.raises(ValueError, match="cam=z: no such row; the column has x, y"):
        read_source(path, SourceOptions(where={"cam": "z"}))


def test_roots_are_tried_and_said(folder, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists")
    path = csv(elsewhere, "path,label")
    monkeypatch.chdir(folder)
    source = read_source(path)
    assert source.clips[0].file == folder / "v/0.mp4"
    assert any(str(folder) in note for note in source.notes)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ValueError, match="path not found"):
        read_source(path)
    assert read_source(path, SourceOptions(root=folder)).clips[0].file == folder / "v/0.mp4"


def test_files_without_suffix_and_with_other_accents_are_found(folder):
    (folder / "v" / unicodedata.normalize("NFD", "ü.mp4")).touch()
    rows = [(path.removesuffix(".mp4"), label) for path, label in CLIPS] + [
        (unicodedata.normalize("NFC", "v/ü.mp4"), "a")
    ]
    assert all(clip.file.is_file() for clip in read_source(csv(folder, "id,label", rows)).clips)


def test_labels_are_compared_in_one_composition(tmp_path):
    for form in ("NFC", "NFD"):
        file = tmp_path / unicodedata.normalize(form, "größe") / f"{form}.mp4"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert len({clip.label for clip in read_source(tmp_path).clips}) == 1


def test_a_row_twice_counts_once_and_contradictions_are_refused(folder):
    source = read_source(csv(folder, "path,label", [*CLIPS, CLIPS[0], ("./v/1.mp4", "b")]))
    assert pairs(source) == CLIPS
    assert any("v/0.mp4 (row 2, row 8)" in note for note in source.notes)
    with pytest.raises(ValueError, match="v/0.mp4 has two labels: 'a' in row 2 and 'b' in row 8"):
        read_source(csv(folder, "path,label", [*CLIPS, ("v/0.mp4", "b")]))
    rows = [(path, label, "same") for path, label in CLIPS]
    with pytest.raises(ValueError, match="video_id 'same' stands for two files, in row 2 and row 3"):
        read_source(csv(folder, "path,label,video_id", rows))


def messages(answer, question="Which?"):
    return [{"role": "user", "content": f"<video>{question}"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_chat_records_with_absolute_and_relative_paths(folder, suffix):
    records = [
        {
            "messages": messages(label if i % 2 else render_completion("I think", label)),
            "videos": [path if i % 3 else str(folder / path)],
        }
        for i, (path, label) in enumerate(CLIPS)
    ]
    text = json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records))
    (folder / f"c{suffix}").write_text(text)
    source = read_source(folder / f"c{suffix}")
    assert source.kind == "chat records"
    assert [(clip.file, clip.label) for clip in source.clips] == [(folder / path, label) for path, label in CLIPS]
    assert source.question == "Which?"


def test_sharegpt_names_and_parts(folder):
    records = [
        {
            "conversations": [
                {"from": "human", "value": f"<video>\nQ{i}?"},
                {"from": "gpt", "value": "first thought"},
                {"from": "gpt", "value": [{"type": "text", "text": label}]},
            ],
            "video": path,
            "source": "cam1",
        }
        for i, (path, label) in enumerate(CLIPS)
    ]
    (folder / "c.json").write_text(json.dumps(records))
    source = read_source(folder / "c.json")
    assert pairs(source) == CLIPS
    assert source.question == "", "they ask different things"
    assert source.clips[0].fields == {"source": "cam1"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": messages("a"), "videos": []}, r"row 1: one clip is wanted in 'videos', got \[\]"),
        ({"messages": messages("a"), "videos": ["v/0.mp4", "v/1.mp4"]}, "row 1: one clip is wanted"),
        ({"messages": messages("a")[:1], "videos": ["v/0.mp4"]}, "row 1: no message of the assistant"),
        ({"messages": messages("a\nb"), "videos": ["v/0.mp4"]}, "row 1: the answer is a text"),
    ],
)
def test_wrong_chat_records_name_the_row(folder, record, message):
    (folder / "c.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_source(folder / "c.jsonl")


def test_answers_in_free_text_are_no_classes(folder):
    records = [{"messages": messages(f"text {i}"), "videos": ["v/0.mp4"]} for i in range(12)]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ValueError, match="12 different answers in 12 records"):
        read_source(folder / "c.jsonl")


def test_folders_say_what_they_pass_over(tmp_path):
    for name in ("a/1.mp4", "b/2.mp4", "_no/3.mp4", "b/notes.txt", "list.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c").mkdir()
    source = read_source(tmp_path)
    assert pairs(source) == [("a/1.mp4", "a"), ("b/2.mp4", "b")]
    notes = "\n".join(source.notes)
    for words in ("begin with _ or a dot: _no", "no clips in them: c", "1 .txt", "list.csv is not used"):
        assert words in notes


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("path,label", ColumnNames(label="lable"), r"--label-column lable: no such column \(did you mean 'label'\?\)"),
        ("path,label", ColumnNames(group="who"), "--group-column who: no such column; there are path, label"),
        ("v/0.mp4,a", ColumnNames(), "row 1: a clip and not the names of columns"),
    ],
)
def test_wrong_columns(folder, header, options, message):
    with pytest.raises(ValueError, match=message):
        read_source(csv(folder, header), SourceOptions(options))


def test_what_cannot_be_guessed_is_asked_for(folder):
    rows = [(path, label, "xy"[i // 3]) for i, (path, label) in enumerate(CLIPS)]
    with pytest.raises(ValueError, match=r"which column is the label\? .*there are what, where"):
        read_source(csv(folder, "path,what,where", rows))
    with pytest.raises(ValueError, match="no column looks like the path"):
        read_source(csv(folder, "a,b", [("1", "2")]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no such file or folder"),
        ("v/0.mp4", "a clip; give a folder"),
        ("x.xlsx", "neither a folder nor a table"),
    ],
)
def test_other_files(folder, name, message):
    (folder / "x.xlsx").touch()
    with pytest.raises(ValueError, match=message):
        read_source(folder / name)


def test_missing_cells_name_their_rows(folder):
    with pytest.raises(ValueError, match=r"no label \(column 'label'\): row 3; fill it in"):
        read_source(csv(folder, "path,label", [CLIPS[0], ("v/1.mp4", "")]))
    rows = [(*CLIPS[0], "train"), (*CLIPS[1], "")]
    with pytest.raises(ValueError, match="no split .* row 3"):
        read_source(csv(folder, "path,label,split", rows))


def test_a_folder_takes_no_columns(folder):
    os.rename(folder / "v", folder / "a")
    with pytest.raises(ValueError, match="a folder has no columns"):
        read_source(folder, SourceOptions(ColumnNames(label="label")))
