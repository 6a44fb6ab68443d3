"""Tests the verdict on texts as language about clips, against a slow loop and with bases that see and that do not."""

import json
import os
import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stage_world as world
import torch

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.porch.data import PorchDataModule
from vidreason.datamodules.porch.render import write_mp4
from vidreason.datamodules.prompts import DescribeView
from vidreason.datamodules.traces import TraceStore
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.run_texts import write_run_traces
from vidreason.lightning_modules.traces.text_quality import (
    TextQuality,
    compressed_share,
    judge_texts,
    pair_differences,
    summarise,
)
from vidreason.lightning_modules.vlms.completions import generate_completions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

CPU = torch.device("cpu")
TEXTS = {f"train_{i}": ("it is dark " * (i + 1), f"clip number {i}") for i in range(6)}


def text_score(vlm, model, example, text):
    """The mean log-probability per token of one text behind one clip, from the logits of one plain forward."""
    encoded = vlm.encode([replace(example, texts=(replace(example.texts[0], text=text),))])
    ids = torch.cat([encoded.prompts.inputs["input_ids"], encoded.texts.ids], 1)
    inputs = {**encoded.prompts.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**inputs).logits[0].float()
    logits[:, sorted(vlm.suppressed_ids)] = -torch.inf
    start = ids.shape[1] - encoded.texts.ids.shape[1]
    steps = [logits[place - 1].log_softmax(-1)[ids[0, place]].item() for place in range(start, ids.shape[1])]
    return statistics.fmean(steps)


def test_differences_are_those_of_a_slow_loop(make_vlm, ready):
    module = ready(VLMModule(make_vlm()))
    vlm, model, data = module.vlm, module.policy, module.data
    view = DescribeView(data.task, TEXTS)
    loader = data.loader("train", view)
    items = [loader.dataset[place] for place in range(6)]
    found = pair_differences(vlm, model, loader.collate_fn(items))
    examples = [item.content for item in items]
    expected = []
    model.eval()
    with torch.no_grad():
        for pair in ((0, 1), (2, 3), (4, 5)):
            gains = []
            for own, other in (pair, pair[::-1]):
                texts = [text.text for text in examples[own].texts]
                gains += [
                    text_score(vlm, model, examples[own], text) - text_score(vlm, model, examples[other], text)
                    for text in texts
                ]
            expected.append(statistics.fmean(gains))
    assert found == pytest.approx(expected, abs=1e-5)
    assert any(abs(value) > 1e-5 for value in expected), "the random base sees something"


def test_the_interval_is_students():
    values = [0.3, -0.1, 0.4, 0.2, 0.1, 0.5]
    found = summarise(values, ["x"])
    half = 2.5706 * statistics.stdev(values) / 6**0.5  # 97.5 % point of t with 5 degrees of freedom, from tables
    assert (found.difference, found.low, found.high) == pytest.approx(
        (0.7 / 3, 0.7 / 3 - half, 0.7 / 3 + half), abs=1e-3
    )
    assert summarise(values[:3], ["x"]).low is None


def test_verdicts():
    good = TextQuality(64, 16, 0.5, 0.4, 0.6, 0.4)
    rng = random.Random(0)
    letters = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=60)) for _ in range(60)]
    assert not good.faults
    assert not replace(good, difference=None, low=None, high=None).faults, "too few pairs: the size decides"
    for quality, fault in (
        (replace(good, low=-0.1), "no likelier behind their own clip than behind another one"),
        (replace(good, compressed=compressed_share(letters)), "of that of random letters"),
        (replace(good, compressed=compressed_share(["The same."] * 500)), "repeat one text"),
        (replace(good, compressed=compressed_share(["soup", "s"])), "too short"),
    ):
        assert len(quality.faults) == 1
        assert fault in quality.faults[0]


def test_a_base_that_writes_soup_is_warned_of_and_on_record(make_vlm, ready, tmp_path):
    """A random base; an earlier stage's weights are not judged, and nothing is unless asked for."""
    options = TraceOptions(samples=2, sampling=Sampling(max_new_tokens=8), judge=True)
    module = ready(VLMModule(make_vlm(), traces=options))
    generator = module.trace_generator(module.data.task)
    for who in (replace(generator, options=replace(options, judge=False)), replace(generator, adapter_sha="trained")):
        write_run_traces(module.trainer, module.policy, who, module.data, ("train",), name=f"{who.adapter_sha}.jsonl")
    assert not (tmp_path / "run/text_quality.json").exists()
    with pytest.warns(UserWarning, match=r"writes no language about these clips: .*; name a model .* --vlm Qwen"):
        store = write_run_traces(module.trainer, module.policy, generator, module.data, ("train",))
    record = json.loads((tmp_path / "run/text_quality.json").read_text())
    assert record["texts"] == sum(bool(r.text.strip()) for r in TraceStore.open(store.path).records())
    assert record["faults"]


def written(vlm, model, data):
    """Judges two texts per training clip, sampled as the pipelines do."""
    data.prepare_data()
    data.setup("fit")
    view, texts = DescribeView(data.task), {}
    for batch in data.loader("train", view):
        made = generate_completions(vlm, model, batch.prompts, batch.clips, 2, Sampling(128, temperature=0.5), 0)
        texts |= {name: [c.text for c in group] for name, group in zip(batch.video_ids, made.completions, strict=True)}
    return judge_texts(vlm, model, data, view, ("train",), texts, CPU)


class Noise(world.GreyClips):
    """Clips of uniform noise."""

    def samples(self, split):
        rng, clips = np.random.default_rng(0), super().samples(split)
        if split != "train":
            return clips
        for i in range(16):
            write_mp4(self.folder / f"n{i}.mp4", rng.integers(0, 256, (12, 96, 96, 3), dtype=np.uint8))
        return [replace(clips[0], path=self.folder / f"n{i}.mp4", video_id=f"n{i}", group=f"n{i}") for i in range(16)]


@pytest.mark.slow
def test_the_embedded_base_sees_what_it_was_made_for_and_nothing_else(tmp_path):
    vlm = TinyVLM("embedded")
    model = vlm.build().eval()
    frames = FrameOptions(num_frames=12, max_pixels=76800)
    shared = {"encoder": vlm, "frames": frames, "batch_size": 8, "seed": 0}
    sizes = {"train_clips": 16, "val_clips": 2, "cal_clips": 2, "test_clips": 2, "levels": [0]}
    seen = written(vlm, model, PorchDataModule(str(tmp_path / "porch"), **sizes, **shared))
    assert not seen.faults
    assert seen.low > 0.1
    assert written(vlm, model, Noise(tmp_path, **shared)).faults
    if real := os.environ.get("VIDREASON_TEST_DATA"):
        manifest = Path(real, "real_clips/manifest.csv")
        depth = ManifestDataModule(manifest, where={"subset": "utd_mhad_depth"}, limit={"train": 24}, **shared)
        assert any("random letters" in fault for fault in written(vlm, model, depth).faults)
