"""Features of classes, by which neighbours are mined: their files, and those of a tiny CLIP."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import linked_classes
import pytest
import torch
import transformers as hf
from backbones import picture
from families import clip_vision, make_tokenizer
from linked_classes import CLASSES, NAMES, read
from PIL import Image
from safetensors.torch import save_file

from modeling_aim.data import link_context, mining
from modeling_aim.data.mining import ClassFeatures, clip_features
from modeling_aim.training.link_context import LinkContext

folder, features = linked_classes.folder, linked_classes.features  # the fixtures


def test_features_are_saved_loaded_and_put_in_the_folders_order(folder: Path, tmp_path: Path) -> None:
    rows = torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(0))
    mixed = ClassFeatures(tuple(reversed(NAMES)), rows, rows + 1)
    mixed.save(tmp_path / "a.safetensors")
    save_file({"text": rows, "images": rows + 1}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"does not say which classes its rows are of.*b.json beside it"):
        ClassFeatures.load(tmp_path / "b.safetensors")
    (tmp_path / "b.json").write_text(json.dumps(list(reversed(NAMES))))
    direct = LinkContext(folder, features=mixed, seed=3)
    for name in ("a", "b"):
        loaded = ClassFeatures.load(tmp_path / f"{name}.safetensors")
        assert loaded.classes == mixed.classes and torch.equal(loaded.text, rows)
        assert torch.equal(loaded.images, rows + 1)
        assert LinkContext(folder, features=tmp_path / f"{name}.safetensors", seed=3).neighbours == direct.neighbours
    ordered = mixed.of(link_context.class_folders(folder))
    assert ordered.classes == tuple(NAMES) and torch.equal(ordered.text, rows.flip(0))


def test_a_damaged_file_of_features_is_refused(tmp_path: Path, features: ClassFeatures) -> None:
    path = tmp_path / "features.safetensors"
    features.save(path)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"features.safetensors cannot be read as safetensors"):
            ClassFeatures.load(path)
    names = {"classes": json.dumps(NAMES)}
    for tensors, message in (
        ({"text": features.text}, r"holds the tensors \['text'\]"),
        ({"text": features.text, "images": features.images[:5].clone()}, "for 6 classes; expected"),
        ({"text": features.text, "images": features.images / 0}, "'images' that are not finite numbers"),
    ):
        save_file(tensors, path, metadata=names)
        with pytest.raises(ValueError, match=message):
            ClassFeatures.load(path)
    save_file({"text": features.text, "images": features.images.clone()}, path, metadata={"classes": '["a", "a"]'})
    with pytest.raises(ValueError, match="names the class 'a' twice"):
        ClassFeatures.load(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of the real class with its real processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer([], "<s>")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {**size, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "initializer_range": 0.3}
    config = hf.CLIPConfig(text_config=text, vision_config=clip_vision().to_dict(), projection_dim=32)
    tokenizer.model_max_length = 40
    pixels = {"height": 28, "width": 28}
    images = hf.CLIPImageProcessor(size=pixels, crop_size=pixels, do_center_crop=False)
    hf.CLIPModel(config).eval().save_pretrained(path)
    hf.CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[mining.ImageClass]:
    for number, image in itertools.product(range(3), range(5)):
        path = tmp_path / "pictures" / f"n{number}" / f"{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(10 * number + image).save(path)
    names = {"n0": "dax", "n1": "a longer wug", "n2": "blicket"}
    return link_context.class_folders(tmp_path / "pictures", names)


def by_hand(clip: Path, classes: list[mining.ImageClass], lengths: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """One name and one image at a time, through the projections of the model; images with their lengths if asked."""
    model, processor = hf.CLIPModel.from_pretrained(clip), hf.AutoProcessor.from_pretrained(clip)
    text, images = [], []
    with torch.no_grad():
        for one in classes:
            pooled = model.text_model(**processor.tokenizer(one.name, return_tensors="pt")).pooler_output[0]
            vector = model.text_projection(pooled)
            text.append(vector / vector.norm())
            total = torch.zeros(32)
            for path in one.images:
                pixels = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
                vector = model.visual_projection(model.vision_model(pixels).pooler_output[0])
                total += vector if lengths else vector / vector.norm()
            images.append(total / total.norm())
    return torch.stack(text), torch.stack(images)


def test_clip_features_equal_those_by_hand(clip: Path, pictures: list[mining.ImageClass], tmp_path: Path) -> None:
    found = clip_features(pictures, clip, tmp_path / "cache" / "f.safetensors", batch_size=2, device="cpu")
    text, images = by_hand(clip, pictures)
    assert found.classes == ("n0", "n1", "n2")
    assert torch.allclose(found.text, text, atol=1e-5) and torch.allclose(found.images, images, atol=1e-5)
    assert (text[0] - text[1]).norm() > 0.01 and (images[0] - images[1]).norm() > 0.01
    raw = clip_features(pictures, clip, tmp_path / "cache" / "f.safetensors", means="raw", device="cpu")
    means = by_hand(clip, pictures, lengths=True)[1]
    assert torch.allclose(raw.text, text, atol=1e-5) and torch.allclose(raw.images, means, atol=1e-5)
    assert not torch.allclose(raw.images, found.images, atol=1e-5)  # its key differs, so it was computed again
    with pytest.raises(ValueError, match=r"means='mean' is unknown; choose one of \('unit', 'raw'\)"):
        clip_features(pictures, clip, means="mean")
    fewer = clip_features(pictures, clip, tmp_path / "few.safetensors", images_per_class=2, device="cpu")
    assert not torch.allclose(fewer.images, found.images, atol=1e-3)


def test_features_are_kept_until_what_they_are_of_changes(
    clip: Path, pictures: list[mining.ImageClass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "f.safetensors"
    monkeypatch.setattr(mining.constants, "HF_HOME", str(tmp_path / "home"))
    first = clip_features(pictures, clip, cache, device="cpu")
    written = cache.stat().st_mtime_ns, cache.read_bytes()
    assert torch.equal(clip_features(pictures, clip, cache, device="cpu").images, first.images)
    assert (cache.stat().st_mtime_ns, cache.read_bytes()) == written

    picture(99, (50, 50)).save(pictures[1].images[0])
    changed = clip_features(pictures, clip, cache, device="cpu")
    assert not torch.equal(changed.images[1], first.images[1]) and torch.equal(changed.images[0], first.images[0])
    renamed = [pictures[0], pictures[1], mining.ImageClass("n2", "fep", pictures[2].images)]
    again = clip_features(renamed, clip, cache, device="cpu")
    assert torch.equal(again.text[:2], first.text[:2]) and not torch.equal(again.text[2], first.text[2])
    root = Path(pictures[0].images[0]).parents[1]
    source = LinkContext(root, clip=clip, policy="2way_weight", shots=2, seed=1)
    assert len(list((tmp_path / "home" / "aim").glob("class-features-*.safetensors"))) == 1
    assert len(source.neighbours[0]) == 2 and len(read(source, 3)) == 3


def test_a_killed_run_leaves_no_half_file(
    clip: Path, pictures: list[mining.ImageClass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)  # when everything is written but not yet under its name
        with pytest.raises(KeyboardInterrupt):
            clip_features(pictures, clip, folder / "f.safetensors", device="cpu")
    assert not (folder / "f.safetensors").exists()
    assert clip_features(pictures, clip, folder / "f.safetensors", device="cpu").text.shape == (3, 32)


def test_clip_features_skip_broken_images_and_refuse_what_cannot_be(
    clip: Path, pictures: list[mining.ImageClass], tmp_path: Path
) -> None:
    whole = by_hand(clip, [mining.ImageClass("n1", "a longer wug", pictures[1].images[1:])])[1][0]
    Path(pictures[1].images[0]).write_bytes(b"broken")
    found = clip_features(pictures, clip, tmp_path / "f.safetensors", device="cpu")
    assert torch.allclose(found.images[1], whole, atol=1e-5)
    for path in pictures[2].images:
        Path(path).write_bytes(b"broken")
    with pytest.raises(ValueError, match="None of the 5 images of the class 'n2' can be read"):
        clip_features(pictures, clip, tmp_path / "g.safetensors", device="cpu")
    hf.CLIPVisionModel(clip_vision()).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"does not put texts and images in one space. Give a CLIP"):
        clip_features(pictures[:2], tmp_path / "vision", tmp_path / "h.safetensors", device="cpu")
