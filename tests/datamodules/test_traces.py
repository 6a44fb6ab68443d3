import json
import logging
from dataclasses import replace

import pytest

from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore

HEADER = TraceHeader(False, "base", "adapter", "prompt", "task", {"temperature": 1.0, "stop": [1, 2]})


def record(video_id: str = "a", sample: int = 0, **changes: object) -> TraceRecord:
    return replace(TraceRecord(video_id, sample, f"Grüße\n{sample}", None, "visit", "stop", -3.5, 7), **changes)


def test_a_store_gives_back_what_it_got(tmp_path):
    store = TraceStore.create(tmp_path / "run" / "traces.jsonl", HEADER)
    written = [record(), record(sample=1, kept=False, reject_reason="empty"), record("b", reasoning="x", answer=None)]
    store.append(written[:2])
    store.append(written[2:])
    again = TraceStore.open(store.path)
    assert again.header == HEADER
    assert again.records() == written
    assert again.records(kept_only=True) == [written[0], written[2]]
    assert again.by_video() == {"a": (written[0],), "b": (written[2],)}
    assert again.by_video(kept_only=False)["a"] == tuple(written[:2])
    assert again.missing(["a", "b", "c"], 2) == {"b": (1,), "c": (0, 1)}


def test_the_file_is_as_documented(tmp_path):
    store = TraceStore.create(tmp_path / "t.jsonl", HEADER)
    store.append([record()])
    first, second = map(json.loads, store.path.read_text(encoding="utf-8").splitlines())
    assert list(first) == [
        "vidreason_traces",
        "external",
        "base_sha",
        "adapter_sha",
        "prompt_sha",
        "task_sha",
        "sampling",
    ]
    assert first["vidreason_traces"] == 1
    assert list(second) == [
        *("video_id", "sample", "text", "reasoning", "answer", "finish_reason", "logprob_sum", "n_tokens"),
        *("kept", "reject_reason"),
    ]


def test_generation_goes_on_where_it_was(tmp_path):
    path = tmp_path / "t.jsonl"
    TraceStore.create(path, HEADER).append([record()])
    store = TraceStore.create(path, replace(HEADER, sampling={"temperature": 1.0, "stop": (1, 2)}))
    store.append([record("b")])
    assert [r.video_id for r in TraceStore.open(path).records()] == ["a", "b"]


@pytest.mark.parametrize("change", [{"base_sha": "x"}, {"task_sha": "x"}, {"sampling": {"temperature": 0.5}}])
def test_another_run_is_not_continued(tmp_path, change):
    path = tmp_path / "t.jsonl"
    TraceStore.create(path, HEADER)
    with pytest.raises(ValueError, match=rf"t\.jsonl: was begun with another {next(iter(change))}; remove it"):
        TraceStore.create(path, replace(HEADER, **change))


def test_a_line_cut_in_half_is_dropped(tmp_path, caplog):
    path = tmp_path / "t.jsonl"
    TraceStore.create(path, HEADER).append([record(), record("b")])
    whole = path.read_bytes()
    line = whole.splitlines(keepends=True)[-1]
    for cut in (1, len(line) // 2, len(line) - 2):
        path.write_bytes(whole[: len(whole) - len(line) + cut])
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert [r.video_id for r in TraceStore.open(path).records()] == ["a"]
            assert "cut in half" in caplog.text
        store = TraceStore.create(path, HEADER)
        store.append([record("b")])
        assert path.read_bytes() == whole


def test_a_last_line_without_its_end_is_whole(tmp_path):
    path = tmp_path / "t.jsonl"
    TraceStore.create(path, HEADER).append([record()])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(TraceStore.open(path).records()) == 1
    TraceStore.create(path, HEADER).append([record("b")])
    assert [r.video_id for r in TraceStore.open(path).records()] == ["a", "b"]


def test_a_header_cut_in_half_starts_anew(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"vidreason_tra')
    TraceStore.create(path, HEADER).append([record()])
    assert TraceStore.open(path).header == HEADER


def test_the_later_of_two_counts(tmp_path):
    store = TraceStore.create(tmp_path / "t.jsonl", HEADER)
    store.append([record(), record(text="better")])
    assert [r.text for r in store.records()] == ["better"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"video_id": "a"}', "line 2: missing sample, text"),
        (json.dumps({**vars(record()), "score": 1}), "line 2: unknown score"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    store = TraceStore.create(path, HEADER)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        store.records()


@pytest.mark.parametrize("content", [b'{"video_id": "a"}\n', b'{"vidreason_traces": 2}\n', b"text\n", b"", b"\xff\n"])
def test_other_files_are_no_traces(tmp_path, content):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.jsonl"):
        TraceStore.open(path)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        TraceStore.open(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"base_sha": "x"}, r"weights \(base\)"),
        ({"adapter_sha": "x"}, r"weights \(adapter\)"),
        ({"prompt_sha": "x"}, "prompt"),
        ({"task_sha": "x"}, "task"),
    ],
)
def test_stale_traces_are_refused(tmp_path, change, name):
    store = TraceStore.create(tmp_path / "t.jsonl", HEADER)
    store.check(HEADER)
    store.check(replace(HEADER, sampling={}))
    with pytest.raises(ValueError, match=rf"something else: {name}: .* is .*, expected x\. Write the traces again"):
        store.check(replace(HEADER, **change))


def test_a_teacher_is_excused_from_the_weights_alone(tmp_path):
    store = TraceStore.create(tmp_path / "t.jsonl", replace(HEADER, external=True, base_sha="", adapter_sha=""))
    store.check(HEADER)
    for change in ({"prompt_sha": "x"}, {"task_sha": "x"}):
        with pytest.raises(ValueError, match="something else"):
            store.check(replace(HEADER, **change))
    with pytest.raises(ValueError, match="teacher's traces"):
        store.check(HEADER, allow_external=False)
