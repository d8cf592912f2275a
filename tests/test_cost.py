"""What AIM adds to its backbone, without a clock: batches, images encoded once, KV that is not copied, an import."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, MORE_FAMILIES, Plugin, picture, plugin
from more_families import BUILDERS
from test_reading import calls
from transformers import DynamicCache

from modeling_aim import Demonstration
from modeling_aim.backbone_aim import decoder_layers, image_positions
from modeling_aim.batching_aim import PASS_PADDING, PASS_TOKENS, reading_batches
from modeling_aim.demonstrations_aim import FusedDemonstrations
from modeling_aim.prefix_aim import grown_from

NEW = {"max_new_tokens": 4, "do_sample": False}


# --- batches


def some_demonstrations(count: int, seed: int) -> tuple[list[Demonstration], list[int]]:
    """Demonstrations with none to two of a few images, and lengths as they might have."""
    drawn = random.Random(seed)
    images = [picture(number, (8 + number, 8)) for number in range(6)]
    demos = [Demonstration(tuple(drawn.sample(images, drawn.choice([0, 1, 1, 1, 2]))), "a dax") for _ in range(count)]
    return demos, [len(demo.images) * drawn.choice([64, 576, 2880]) + drawn.randint(1, 60) for demo in demos]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_tokens", [PASS_TOKENS, 1024])
def test_batches_have_every_demonstration_once_and_little_padding(seed: int, max_tokens: int) -> None:
    demos, lengths = some_demonstrations(200, seed)
    batches = list(reading_batches(demos, lengths, max_tokens=max_tokens))
    assert sorted(number for batch, _ in batches for number in batch) == list(range(len(demos)))
    for batch, alike in batches:
        area, used = len(batch) * max(lengths[i] for i in batch), sum(lengths[i] for i in batch)
        assert len(batch) == 1 or (area <= PASS_TOKENS and area - used <= PASS_PADDING)
        images = [image.size for i in batch for image in demos[i].images]
        assert alike == (len(set(images)) < len(images))
        assert len(batch) == 1 or alike or area <= max_tokens
        assert len({bool(demos[i].images) for i in batch}) == 1
    assert max(len(batch) for batch, _ in batches) > 8


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_batch_size_that_is_given_holds(size: int) -> None:
    demos, lengths = some_demonstrations(50, seed=0)
    counts = [len(batch) for batch, _ in reading_batches(demos, lengths, size)]
    assert sum(counts) == 50 and max(counts) == size and sum(count < size for count in counts) <= 2
    with pytest.raises(ValueError, match="batch_size=0: expected a whole number, 1 or more"):
        list(reading_batches(demos, lengths, 0))


def test_demonstrations_of_one_image_are_read_together() -> None:
    images = [picture(number) for number in range(4)]
    demos = [Demonstration((images[i % 4],), "x" * (i + 1)) for i in range(20)]
    batches = list(reading_batches(demos, [600 + i for i in range(20)], max_tokens=1024))
    assert sorted(sorted(batch) for batch, alike in batches if alike) == [list(range(k, 20, 4)) for k in range(4)]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_lengths_are_known_before_images_are_encoded(family: str) -> None:
    aim = plugin(family)
    demos = [Demonstration.of((picture(i, size), "a wug")) for i, size in enumerate([(40, 32), (130, 50), (60, 200)])]
    said = aim.processor.reading_lengths(demos)
    for demo, length in zip(demos, said, strict=True):
        ids = aim.processor.encode_demonstrations([demo])[0]["input_ids"]
        images = int(image_positions(aim.backbone.config, ids).sum())
        assert images <= length - len(aim.processor.apply_template(demo)[0])
    assert aim.processor.reading_lengths([Demonstration((), "a wug")])[0] < min(said)


def test_demonstrations_that_fit_are_read_in_one_pass(aim: Plugin) -> None:
    demos = [(picture(number), f"a thing, number {number}.") for number in range(12)]
    with calls(decoder_layers(aim.backbone)[0]) as seen:
        aim.model.read(demos)
    assert len(seen) == 1


def test_a_read_makes_no_kv_cache_and_no_graph(aim: Plugin) -> None:
    seen: list[dict[str, Any]] = []
    layer = decoder_layers(aim.backbone)[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({**kwargs, "graph": torch.is_grad_enabled()}), with_kwargs=True
    )
    aim.model.read(DEMOS)
    hook.remove()
    assert seen and all(one.get("past_key_values") is None and not one["graph"] for one in seen)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_an_image_of_several_demonstrations_is_encoded_once(family: str) -> None:
    aim = plugin(family)
    first, second = picture(0, (60, 40)), picture(1, (60, 40))
    demos = [(first, "dax"), (second, "a wug."), (first, "What is it?", "a dax."), (first.copy(), "blicket")]
    rows: list[int] = []

    def count(tower: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        rows.append(len(next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))))

    tower = aim.backbone.get_encoder("image")
    tower.register_forward_pre_hook(count, with_kwargs=True)  # behind that of the plug-in
    alone = torch.cat([aim.model.read([demo]).vectors for demo in demos])
    expected, rows[:] = rows[0] + rows[1], []
    found = aim.model.read(demos, batch_size=4).vectors
    assert rows == [expected]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    rows.clear()
    aim.model.read([(picture(number, (60, 40)), "dax") for number in range(4)], batch_size=4)
    assert rows == [2 * expected]
    rows.clear()
    same = [(first, f"number {number} of it.") for number in range(4)]
    alone = torch.cat([aim.model.read([demo]).vectors for demo in same])
    once, rows[:] = rows[0], []
    torch.testing.assert_close(aim.model.read(same, batch_size=4).vectors, alone, rtol=1e-4, atol=1e-4)
    assert rows[0] <= 2 * once  # with a single image nobody can tell whether the tower's output is in parts by image


def test_a_vision_tower_whose_output_is_not_in_parts_runs_on_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MORE_FAMILIES, "mistral3", BUILDERS["mistral3"])  # it joins the patches of all images
    aim = plugin("mistral3")
    for images in ((0, 0, 1), (0, 0, 0), (0, 0)):
        demos = [(picture(image), f"a wug, number {number}.") for number, image in enumerate(images)]
        alone = torch.cat([aim.model.read([demo]).vectors for demo in demos])
        found = aim.model.read(demos, batch_size=3).vectors
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


# --- the KV of a prefix


@pytest.mark.parametrize("rows", [1, 3])
def test_kept_kv_is_neither_copied_nor_changed(llava: Plugin, rows: int) -> None:
    prefix = llava.model.prefill(DEMOS)
    cache = next(iter(llava.model.prefix_cache._values.values()))[0]
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    own = grown_from(cache, rows)
    assert isinstance(own, DynamicCache) and own.get_seq_length() == cache.get_seq_length()
    for layer, kept in zip(own.layers, cache.layers, strict=True):
        assert layer.keys.data_ptr() == kept.keys.data_ptr() and layer.values.data_ptr() == kept.values.data_ptr()
        assert layer.keys.shape[0] == rows
    llava.answer(llava.query(*["What is this?"] * rows), prefix, num_beams=2, num_return_sequences=2)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_weights_are_looked_at_only_where_something_is_kept(llava: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, inputs, looked = llava.model.read(DEMOS), llava.query(), []
    state = llava.model._backbone_state
    monkeypatch.setattr(llava.model, "_backbone_state", lambda: (looked.append(1), state())[1])
    for demos in (None, [], fused, [fused], llava.model.read(DEMOS)):
        llava.answer(inputs, demos)
    assert not looked
    llava.answer(inputs, DEMOS)
    assert looked


def test_slices_of_many_demonstrations_look_at_their_own_alone() -> None:
    lengths = tuple(1 + number % 3 for number in range(1000))
    fused = FusedDemonstrations(torch.arange(sum(lengths))[:, None].float(), lengths, torch.arange(sum(lengths)))
    parts = fused.vectors.split(lengths)
    for index in (7, -1, slice(3, 40, 5), [999, 0, 5, 5], slice(0, 0)):
        chosen = range(1000)[index] if isinstance(index, (int, slice)) else index
        chosen = [chosen] if isinstance(chosen, int) else [i % 1000 for i in chosen]
        wanted = torch.cat([parts[i] for i in chosen]) if chosen else fused.vectors[:0]
        assert torch.equal(fused[index].vectors, wanted)
        assert fused[index].lengths == tuple(lengths[i] for i in chosen)
    assert torch.equal(torch.cat([one.vectors for one in fused]), fused.vectors)


# --- the import

NEEDED = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers import BatchFeature, BitsAndBytesConfig, GenerationMixin, PreTrainedModel, ProcessorMixin
import huggingface_hub, safetensors.torch, transformers.image_utils
"""


def test_an_import_adds_no_other_package() -> None:
    code = f"{NEEDED}\nimport json, sys\nbefore = set(sys.modules)\nfrom modeling_aim import AimConfig\n"
    code += "print(json.dumps([sorted(set(sys.modules) - before), sorted(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added, loaded = json.loads(done.stdout.splitlines()[-1])
    standard = {"fcntl", *sys.stdlib_module_names}
    foreign = {name for name in added if name.split(".")[0] not in standard | {"modeling_aim"}}
    assert {name.split(".")[0] for name in foreign} <= {"transformers", "safetensors", "packaging", "PIL", "numpy"}
    assert not {"datasets", "matplotlib", "faiss", "sklearn", "typer", "rich"} & set(added)
    ours = {name for name in loaded if name.startswith("modeling_aim.")}
    assert ours and all(name.endswith(("_aim", ".registered")) for name in ours), "more than what ships"
