"""Texts that a model writes about clips, and the file that they are written to by one or more ranks."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from threading import Barrier

import pytest
import torch

from vidreason.datamodules.prompts import DescribeView, ReasonView
from vidreason.datamodules.trace_parts import own_part
from vidreason.datamodules.traces import TraceStore
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.traces.generation import RankShard, TraceFile, TraceGenerator, TraceOptions
from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.lightning_modules.vlms.generation import Sampling

OPTIONS = TraceOptions(samples=2, sampling=Sampling(max_new_tokens=4), filter=RationaleFilter(min_words=100))
CPU = torch.device("cpu")
SPLITS = ("val", "cal")


def generator_of(module):
    """A generator of descriptions, its model and the data."""
    generator = module.trace_generator(module.data.task)
    assert isinstance(generator.view, DescribeView)
    return generator, module.policy, module.data


@dataclass(frozen=True)
class Noting(TraceGenerator):
    """Notes the clips of every batch that it writes about."""

    calls: list[tuple[str, ...]] = field(default_factory=list)

    def records(self, model, batch, label_names):
        self.calls.append(batch.video_ids)
        return super().records(model, batch, label_names)


def noting(generator):
    return Noting(**{field.name: getattr(generator, field.name) for field in fields(TraceGenerator)})


@pytest.fixture
def writer(make_vlm, ready):
    return generator_of(ready(VLMModule(make_vlm(), traces=OPTIONS)))


def test_every_clip_gets_its_samples_and_rejected_ones_say_why(writer, tmp_path):
    who, model, data = writer
    store = TraceFile(tmp_path / "t.jsonl", who, data).complete(model, ("val", "cal"), CPU)
    records = store.by_video(kept_only=False)
    assert set(records) == {f"{split}_{i}" for split in ("val", "cal") for i in range(3)}
    assert all([r.sample for r in group] == [0, 1] for group in records.values())
    assert all(not r.kept and r.reject_reason for group in records.values() for r in group)
    header = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert header["sampling"] == {**sampling, "samples": 2, "seed": 0}
    assert header["adapter_sha"] == ""
    assert header["base_sha"] == who.vlm.base_sha()


@pytest.mark.parametrize(
    ("lines_left", "written_about"), [(4, [("val_0", "val_1"), ("val_2",)]), (5, [("val_2",)]), (7, [])]
)
def test_an_interrupted_file_is_completed_with_the_same_texts(writer, tmp_path, lines_left, written_about):
    """A batch that was left half done is sampled again as it was: next to other clips digits would differ."""
    who, model, data = writer
    data.eval_batch_size = 2
    whole = TraceFile(tmp_path / "whole.jsonl", who, data).complete(model, ("val",), CPU)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:lines_left]) + "".join(lines[lines_left:])[:20])
    who = noting(who)
    cut = TraceFile(tmp_path / "cut.jsonl", who, data).complete(model, ("val",), CPU)
    assert cut.by_video(kept_only=False) == whole.by_video(kept_only=False)
    assert who.calls == written_about
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_ranks_share_the_writing(make_vlm, ready, tmp_path):
    """Two writers at one file write each text once, as one writer does, and about as many batches each."""
    wait = Barrier(2, timeout=60).wait
    writers = [generator_of(ready(VLMModule(make_vlm(), traces=OPTIONS))) for _ in range(3)]
    for _, _, data in writers:
        data.eval_batch_size = 2
    *ranks, alone = [(noting(who), model, data) for who, model, data in writers]
    whole = TraceFile(tmp_path / "one.jsonl", alone[0], alone[2]).complete(alone[1], SPLITS, CPU)

    def work(rank):
        who, model, data = ranks[rank]
        return TraceFile(tmp_path / "two.jsonl", who, data, RankShard(rank, 2, wait)).complete(model, SPLITS, CPU)

    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(work, (0, 1)))
    assert stores[0].by_video(kept_only=False) == whole.by_video(kept_only=False)
    assert [who.calls for who, _, _ in ranks] == [[("val_0", "val_1"), ("cal_0", "cal_1")], [("val_2",), ("cal_2",)]]
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == len(
        (tmp_path / "one.jsonl").read_text().splitlines()
    )


def test_what_killed_ranks_left_is_joined(writer, tmp_path):
    """Lines that another rank has written count, its last line that was cut off does not, and nothing is twice."""
    who, model, data = writer
    data.eval_batch_size = 1
    whole = TraceFile(tmp_path / "whole.jsonl", who, data).complete(model, ("val",), CPU)
    header, *lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("".join([header, *lines[:3]]))
    (tmp_path / "t.rank1.jsonl").write_text("".join([header, lines[1], *lines[4:5], lines[5][:30]]))
    who = noting(who)
    found = TraceFile(tmp_path / "t.jsonl", who, data).complete(model, ("val",), CPU)
    assert found.by_video(kept_only=False) == whole.by_video(kept_only=False)
    assert who.calls == [("val_1",), ("val_2",)]
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 7
    assert not list(tmp_path.glob("t.rank*"))


def test_a_part_of_other_weights_is_refused_by_name(writer, tmp_path):
    who, model, data = writer
    other = replace(who, adapter_sha="other")
    TraceFile(tmp_path / "t.jsonl", who, data).complete(model, ("val",), CPU)
    own_part(tmp_path / "t.jsonl", other.header, rank=1)
    with pytest.raises(ValueError, match=r"t\.rank1\.jsonl: was begun with another adapter_sha"):
        TraceFile(tmp_path / "t.jsonl", who, data).complete(model, ("val",), CPU)


def test_an_unreadable_clip_is_reported_and_skipped(writer, tmp_path):
    who, model, data = writer
    data.broken = ("val_1",)
    data._clips = None
    with pytest.warns(UserWarning, match=r"broken\.mp4: no text written"):
        store = TraceFile(tmp_path / "t.jsonl", who, data).complete(model, ("val",), CPU)
    assert set(store.by_video(kept_only=False)) == {"val_0", "val_2"}


def test_another_author_may_not_go_on_with_a_file(writer, tmp_path):
    who, model, data = writer
    TraceFile(tmp_path / "t.jsonl", who, data).complete(model, ("val",), CPU)
    with pytest.raises(ValueError, match="adapter_sha"):
        TraceFile(tmp_path / "t.jsonl", replace(who, adapter_sha="other"), data).complete(model, ("val",), CPU)


def test_traces_with_an_answer_are_all_kept(writer, tmp_path):
    who, model, data = writer
    reasoning = replace(who, view=ReasonView(data.task))
    store = TraceFile(tmp_path / "t.jsonl", reasoning, data).complete(model, ("val",), CPU)
    assert all(record.kept for record in store.records())
    assert isinstance(store, TraceStore)
