"""An exported adapter in PEFT and transformers alone: its folder says everything that they have to be given."""

import json

import pytest
import torch
from families import FAMILIES
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata
from vlm_builders import randomise_lora

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.testing import transformers_own


@pytest.mark.parametrize("family", ["qwen", "smolvlm"])
def test_an_adapter_elsewhere_gives_the_same_probabilities(ready, tmp_path, family):
    kind, write = FAMILIES[family]
    base = write(tmp_path / "base")
    vlm = kind(str(base), lora=LoRAOptions(r=4, alpha=8))
    module = ready(RationaleSFTModule(vlm))
    randomise_lora(module.policy)
    folder = module.export(tmp_path / "run")
    loader = module.data.loader("val", module.decider(module.data.task).view)
    batch = loader.collate_fn([loader.dataset[0]])
    with torch.no_grad():
        module.policy.eval()
        wanted = vlm.score(module.policy, batch.prompts, batch.texts).logprobs.sum(1).tolist()

    info = json.loads((folder / "vidreason.json").read_text())
    inputs = info["inputs"]
    given = inputs["frames"].pop("given")
    video = read_frames(batch.clips[0].path, FrameOptions(**inputs["frames"]))
    frames = [*video.frames, *[video.frames[-1]] * (given - len(video.frames))]
    times = [*video.timing.indices, *[video.timing.indices[-1]] * (given - len(video.frames))]
    metadata = VideoMetadata(video.timing.total_frames, video.timing.fps, duration=video.timing.duration)
    metadata.frames_indices = times
    processor = AutoProcessor.from_pretrained(base)
    made = processor(
        text=[inputs["prompt"]],
        videos=[[torch.stack(frames)]],
        video_metadata=[metadata],
        return_tensors="pt",
        **inputs["processor"],
    )
    shown = {name: torch.as_tensor(value) for name, value in made.items() if name != "video_metadata"}
    for row, name in enumerate(info["label_names"]):
        words = processor.tokenizer(inputs["lead"] + name, add_special_tokens=False)["input_ids"]
        ids = batch.texts.ids[row][batch.texts.mask[row]]
        assert ids.tolist() == [*words, *inputs["end_of_turn"]]
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder).eval()
    assert inputs["suppressed_tokens"] == sorted(vlm.suppressed_ids)
    found = transformers_own.logprobs(model, shown, batch.texts, vlm).sum(1).tolist()
    assert found == pytest.approx(wanted, abs=1e-4)
