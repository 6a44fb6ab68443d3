import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from vidreason.datamodules.prompts import DescribeView, ReasonView
from vidreason.datamodules.trace_parts import own_part
from vidreason.datamodules.traces import TraceStore
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.own_traces import Share, TraceOptions, write_missing
from vidreason.lightning_modules.rationale_filter import RationaleFilter
from vidreason.lightning_modules.vlms.generation import Sampling

OPTIONS = TraceOptions(samples=2, sampling=Sampling(max_new_tokens=4), filter=RationaleFilter(min_words=100))
CPU = torch.device("cpu")
SPLITS = ("val", "cal")


@pytest.fixture
def writer(make_vlm, ready):
    module = ready(VLMModule(make_vlm()))
    return module.writer(DescribeView(module.task), OPTIONS), module.data


def test_every_clip_gets_its_samples_and_rejected_ones_say_why(writer, tmp_path):
    who, data = writer
    store = write_missing(tmp_path / "t.jsonl", who, data, ("val", "cal"), CPU)
    records = store.by_video(kept_only=False)
    assert set(records) == {f"{split}_{i}" for split in ("val", "cal") for i in range(3)}
    assert all([r.sample for r in group] == [0, 1] for group in records.values())
    assert all(not r.kept and r.reject_reason for group in records.values() for r in group)
    header = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert header["sampling"] == {**sampling, "samples": 2, "seed": 0}
    assert header["adapter_sha"] == ""
    assert header["base_sha"] == who.base_sha


@pytest.mark.parametrize(
    ("lines_left", "written_about"), [(4, [("val_0", "val_1"), ("val_2",)]), (5, [("val_2",)]), (7, [])]
)
def test_an_interrupted_file_is_completed_with_the_same_texts(writer, tmp_path, lines_left, written_about):
    """A batch that was left half done is sampled again as it was: next to other clips digits would differ."""
    who, data = writer
    data.eval_batch_size = 2
    whole = write_missing(tmp_path / "whole.jsonl", who, data, ("val",), CPU)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:lines_left]) + "".join(lines[lines_left:])[:20])
    calls = []

    def sample(batch, options):
        calls.append(batch.video_ids)
        return who.sample(batch, options)

    cut = write_missing(tmp_path / "cut.jsonl", replace(who, sample=sample), data, ("val",), CPU)
    assert cut.by_video(kept_only=False) == whole.by_video(kept_only=False)
    assert calls == written_about
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_ranks_share_the_writing(make_vlm, ready, tmp_path):
    """Two writers at one file write each text once, as one writer does, and about as many batches each."""
    wait = Barrier(2, timeout=60).wait
    modules = [ready(VLMModule(make_vlm())) for _ in range(3)]
    for module in modules:
        module.data.eval_batch_size = 2
    whole = write_missing(
        tmp_path / "one.jsonl", modules[2].writer(DescribeView(modules[2].task), OPTIONS), modules[2].data, SPLITS, CPU
    )
    calls = [[], []]

    def work(rank):
        module = modules[rank]
        who = module.writer(DescribeView(module.task), OPTIONS)
        counted = replace(who, sample=lambda b, o: (calls[rank].append(b.video_ids), who.sample(b, o))[1])
        return write_missing(tmp_path / "two.jsonl", counted, module.data, SPLITS, CPU, share=Share(rank, 2, wait))

    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(work, (0, 1)))
    assert stores[0].by_video(kept_only=False) == whole.by_video(kept_only=False)
    assert calls == [[("val_0", "val_1"), ("cal_0", "cal_1")], [("val_2",), ("cal_2",)]]
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == len(
        (tmp_path / "one.jsonl").read_text().splitlines()
    )


def test_what_killed_ranks_left_is_joined(writer, tmp_path):
    """Lines that another rank has written count, its last line that was cut off does not, and nothing is twice."""
    who, data = writer
    data.eval_batch_size = 1
    whole = write_missing(tmp_path / "whole.jsonl", who, data, ("val",), CPU)
    header, *lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("".join([header, *lines[:3]]))
    (tmp_path / "t.rank1.jsonl").write_text("".join([header, lines[1], *lines[4:5], lines[5][:30]]))
    calls = []
    counted = replace(who, sample=lambda batch, options: (calls.append(batch.video_ids), who.sample(batch, options))[1])
    found = write_missing(tmp_path / "t.jsonl", counted, data, ("val",), CPU)
    assert found.by_video(kept_only=False) == whole.by_video(kept_only=False)
    assert calls == [("val_1",), ("val_2",)]
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 7
    assert not list(tmp_path.glob("t.rank*"))


def test_a_part_of_other_weights_is_refused_by_name(writer, tmp_path):
    who, data = writer
    other = replace(who, adapter_sha="other")
    write_missing(tmp_path / "t.jsonl", who, data, ("val",), CPU)
    own_part(tmp_path / "t.jsonl", other.header, rank=1)
    with pytest.raises(ValueError, match=r"t\.rank1\.jsonl: was begun with another adapter_sha"):
        write_missing(tmp_path / "t.jsonl", who, data, ("val",), CPU)


def test_an_unreadable_clip_is_reported_and_skipped(writer, tmp_path):
    who, data = writer
    data.broken = ("val_1",)
    data._clips = None
    with pytest.warns(UserWarning, match=r"broken\.mp4: no text written"):
        store = write_missing(tmp_path / "t.jsonl", who, data, ("val",), CPU)
    assert set(store.by_video(kept_only=False)) == {"val_0", "val_2"}


def test_another_author_may_not_go_on_with_a_file(writer, tmp_path):
    who, data = writer
    write_missing(tmp_path / "t.jsonl", who, data, ("val",), CPU)
    with pytest.raises(ValueError, match="adapter_sha"):
        write_missing(tmp_path / "t.jsonl", replace(who, adapter_sha="other"), data, ("val",), CPU)


def test_traces_with_an_answer_are_all_kept(writer, tmp_path):
    who, data = writer
    reasoning = replace(who, view=ReasonView(data.task))
    store = write_missing(tmp_path / "t.jsonl", reasoning, data, ("val",), CPU)
    assert all(record.kept for record in store.records())
    assert isinstance(store, TraceStore)
