"""TinyVLM in the hub's format: loading, saving, what it refuses, and where it puts what it sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_builders as builders
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlamaModel
from vlm_builders import PROMPTS

import vidreason.lightning_modules.vlms  # noqa: F401  makes TinyVLM known to the Auto classes
from vidreason.lightning_modules.vlms.tiny.configuration import TinyVLMConfig
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration
from vidreason.lightning_modules.vlms.tiny.processing import TinyVLMProcessor
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM, embedded_folder
from vidreason.lightning_modules.weights.parameters import set_train_mode

MakeTiny = Callable[..., TinyVLM]


def inputs_of(vlm: TinyVLM, prompts: tuple[str, ...] = PROMPTS, frames: int = 4) -> dict[str, Tensor]:
    examples = [builders.make_example(prompt=p, seed=i, frames=frames, size=(64, 96)) for i, p in enumerate(prompts)]
    return dict(vlm.encode(examples).prompts.inputs)


def test_loads_through_the_auto_classes(folder: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(folder), TinyVLMConfig)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, TinyVLMForConditionalGeneration)
    assert isinstance(model.model.language_model, LlamaModel), "a stock decoder"
    assert model.lm_head.weight is model.get_input_embeddings().weight, "tied"
    assert isinstance(AutoProcessor.from_pretrained(folder), TinyVLMProcessor)


def test_the_embedded_folder_describes_the_shipped_sizes() -> None:
    config, processor = AutoConfig.from_pretrained(embedded_folder()), AutoProcessor.from_pretrained(embedded_folder())
    assert config.text_config.vocab_size == len(processor.tokenizer)
    assert config.video_token_id == processor.tokenizer.convert_tokens_to_ids("<|video|>")
    assert config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    assert processor.tokens_per_frame == config.cells_per_frame == 6
    assert config.max_frames == 12


def test_a_saved_model_gives_identical_logits(make_tiny: MakeTiny, tmp_path: Path) -> None:
    vlm = make_tiny()
    model = vlm.build().eval()
    inputs = inputs_of(vlm)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    vlm.processor.save_pretrained(tmp_path)
    again = TinyVLM(str(tmp_path))
    loaded = again.build().eval()
    other = inputs_of(again)
    assert inputs.keys() == other.keys() == {"input_ids", "attention_mask", "pixel_values_videos"}
    assert all(inputs[name].equal(other[name]) for name in inputs)
    with torch.no_grad():
        assert model(**inputs).logits.equal(loaded(**other).logits)


def test_it_is_small(make_tiny: MakeTiny, folder: Path) -> None:
    parameters = sum(p.numel() for p in make_tiny().build().parameters())
    assert 1e6 < parameters <= 2.5e6
    assert 2 * parameters < 5e6, "5 MB in bf16"
    assert (folder / "model.safetensors").stat().st_size < 10e6


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_does_not_drift(make_tiny: MakeTiny, frozen: bool) -> None:
    vlm = make_tiny(freeze_vision=frozen)
    model = vlm.build()
    for put in (lambda m: m, nn.Module.train, lambda m: set_train_mode(m) or m):
        put(model)
        tower = model.get_submodule("model.visual")
        norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
        assert {module.training for module in norms} == {not frozen}
        assert model.get_submodule("model.language_model").training
        before = {name: value.clone() for name, value in tower.named_buffers()}
        model(**inputs_of(vlm))
        moved = any(not value.equal(before[name]) for name, value in tower.named_buffers())
        assert moved is not frozen
    assert [p.requires_grad for p in tower.parameters()] == [not frozen] * len(list(tower.parameters()))


@pytest.mark.parametrize("tower", [True, False], ids=["tower frozen", "tower trained"])
@pytest.mark.parametrize("frozen", [True, False], ids=["projector frozen", "projector trained"])
def test_a_frozen_projector_is_not_trained(make_tiny: MakeTiny, frozen: bool, tower: bool) -> None:
    model = make_tiny(freeze_vision=tower, freeze_projector=frozen).build()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    visual = set() if tower else {"visual"}
    projector = set() if tower and frozen else {"projector"}
    assert trained == {"language_model"} | visual | projector, "freeze_projector counts only behind a frozen tower"


def test_features_stand_where_the_placeholders_are(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    model = vlm.build().eval()
    inputs = inputs_of(vlm)
    seen: list[Tensor] = []
    model.get_submodule("model.language_model").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        features = model.get_video_features(inputs["pixel_values_videos"])  # type: ignore[operator]
        words = model.get_input_embeddings()(inputs["input_ids"])  # type: ignore[operator]
    places = inputs["input_ids"] == model.config.video_token_id  # type: ignore[union-attr]
    assert features.shape == (3, 4 * 6, 160)
    for row in range(3):
        assert seen[0][row][places[row]].equal(features[row]), "in order, each clip in its own row"
    assert seen[0][~places].equal(words[~places])


def test_a_token_sees_its_own_frame_and_place(make_tiny: MakeTiny) -> None:
    """Changing one 32 x 32 cell far from the others' receptive fields changes its own token most."""
    model = make_tiny().build().eval()
    frames = torch.zeros(1, 12, 3, 64, 96)
    changed = frames.clone()
    changed[0, 7, :, 40:56, 72:88] = 1.0  # the lower right of six cells of frame 7
    with torch.no_grad():
        a, b = (model.get_video_features(x)[0] for x in (frames, changed))  # type: ignore[operator]
    moved = (a - b).norm(dim=-1)
    assert int(moved.argmax()) == 7 * 6 + 5
    assert set(moved.nonzero()[:, 0].tolist()) <= set(range(7 * 6, 8 * 6)), "other frames stay as they are"
    assert (a[:6] - a[6:12]).norm() > 0, "equal frames at other times differ"


def test_refusals(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    model = vlm.build().eval()
    inputs = inputs_of(vlm)
    short = inputs["input_ids"].clone()
    first = (short[0] == model.config.video_token_id).nonzero()[0]  # type: ignore[union-attr]
    short[0, first] = 10
    with pytest.raises(ValueError, match="do not match: 72 features, 71 tokens"):
        model(**{**inputs, "input_ids": short})
    with pytest.raises(ValueError, match=r"at most 12 frames, got 16.*num_frames"):
        model(**inputs_of(vlm, frames=16))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="input_ids to place"):
        model(inputs_embeds=torch.zeros(1, 3, 160), pixel_values_videos=inputs["pixel_values_videos"][:1])
    with pytest.raises(ValueError, match="multiples of 32"):
        TinyVLMConfig(frame_width=100)


def test_the_processor_refuses_what_does_not_fit(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    examples = [builders.make_example(frames=frames, size=(64, 96)) for frames in (4, 8)]
    with pytest.raises(ValueError, match=r"one length in a batch, got .*\(4, 3, 64, 96\) and \(8, "):
        vlm.encode(examples)
    frames = torch.zeros(4, 3, 64, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 videos do not match"):
        vlm.processor("no mark", videos=[frames])
    with pytest.raises(ValueError, match="1 videos do not match"):
        vlm.processor("<|video|> and <|video|>", videos=[frames])


def test_frames_of_any_size_are_seen_at_one_size(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    whole = vlm.encode([builders.make_example(size=(64, 96))]).prompts.inputs["pixel_values_videos"]
    large = vlm.encode([builders.make_example(size=(240, 320))]).prompts.inputs["pixel_values_videos"]
    assert whole.shape == large.shape == (1, 4, 3, 64, 96)
    pixels = builders.make_example(size=(64, 96)).sample.frames
    torch.testing.assert_close(whole[0], pixels.float() / 127.5 - 1, rtol=0, atol=1e-5)


def test_a_left_padded_batch_equals_single_rows(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    model = vlm.build().eval()
    together = inputs_of(vlm)
    assert not together["attention_mask"].all(), "the prompts differ in length"
    positions = (together["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batched = model(**together, position_ids=positions).logits
        for row, prompt in enumerate(PROMPTS):
            examples = [builders.make_example(prompt=prompt, seed=row, size=(64, 96))]
            alone = model(**vlm.encode(examples).prompts.inputs).logits[0]
            torch.testing.assert_close(batched[row, -len(alone) :], alone, rtol=0, atol=1e-4)


def test_labels_give_the_mean_token_loss(make_tiny: MakeTiny) -> None:
    vlm = make_tiny()
    model = vlm.build().eval()
    inputs = inputs_of(vlm, PROMPTS[:1])
    labels = inputs["input_ids"].clone()
    labels[:, :30] = -100
    with torch.no_grad():
        made = model(**inputs, labels=labels)
        kept = model(**inputs, logits_to_keep=2).logits
    logprobs = made.logits[0, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]
    torch.testing.assert_close(made.loss, -logprobs[29:].mean())
    torch.testing.assert_close(kept, made.logits[:, -2:])


def test_scratch_is_a_base_without_weights(tmp_path: Path) -> None:
    one, same, other = (TinyVLM("scratch", seed=seed).build().state_dict() for seed in (0, 0, 1))
    name = "model.projector.linear.weight"
    assert one[name].equal(same[name])
    assert not one[name].equal(other[name])
    with pytest.raises(ValueError, match="scratch is for pretraining"):
        TinyVLM("scratch").build(adapter_path=str(tmp_path))


def test_a_recipe_travels_without_its_model() -> None:
    import pickle

    vlm = TinyVLM("scratch")
    vlm.build()
    assert len(vlm.processor.tokenizer) > 256
    sent = pickle.dumps(vlm)
    assert len(sent) < 5_000
    arrived: Any = pickle.loads(sent)
    assert arrived.path == vlm.path
    assert arrived.build() is not vlm.build()
