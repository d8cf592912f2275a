"""Training on more data than memory holds: which images are opened, how large, by whom, and what is left of others."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import backbones
import numpy as np
import pytest
import torch
import transformers as hf
from accelerate.data_loader import IterableDatasetShard
from backbones import picture
from PIL import Image, ImageDraw
from training_runs import arguments
from transformers import TrainerCallback

from modeling_aim import Demonstration
from modeling_aim.data.json_array import json_entries
from modeling_aim.data.shrink import ShrinkFor
from modeling_aim.images_aim import open_image
from modeling_aim.training import AimTrainer, Episode, EpisodeCollator, EpisodeStream, Mixture, ShotLaw, open_source
from modeling_aim.training.episodes import FAILED_IN_A_ROW, Opener

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def pages(tmp_path: Path) -> str:
    """Forty web pages, each with five images of its own."""
    rows = []
    for number in range(40):
        names = [f"{number}-{place}.png" for place in range(5)]
        for name in names:
            picture(number).save(tmp_path / name)
        found = [{"image_name": name, "matched_text_index": i, "matched_sim": 0.9} for i, name in enumerate(names)]
        rows.append(json.dumps({"text_list": [f"page {number} word {i}" for i in range(5)], "image_info": found}))
    (tmp_path / "docs_shard_0_v2.jsonl").write_text("\n".join(rows))
    return f"mmc4:{tmp_path}"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image file is opened from now on."""
    counts: Counter[str] = Counter()
    real = Image.open

    def counting(place: Any, *args: Any, **kwargs: Any) -> Any:
        counts[Path(place).name] += 1
        return real(place, *args, **kwargs)

    monkeypatch.setattr(Image, "open", counting)
    return counts


def mixture(spec: str, shots: int = 4) -> Mixture:
    return Mixture([open_source(spec)[0]], [1.0], ShotLaw(shots))


# --- who opens what


@pytest.mark.parametrize("group", [False, True])
def test_processes_open_their_own_images_alone(pages: str, opened: Counter[str], group: bool) -> None:
    """In one pass over the data every image is opened once, by one process; what is passed by is not opened."""
    model = backbones.plugin("llava").model
    collator = EpisodeCollator(model)
    by_rank = []
    for rank in range(2):
        stream = EpisodeStream(islice(mixture(pages), 16), 4, group_by_length=group)
        opened.clear()
        share = list(IterableDatasetShard(stream, 2, num_processes=2, process_index=rank))
        assert not opened  # dealt, and grouped by their words, with images unopened
        for start in range(0, len(share), 2):
            collator(share[start : start + 2])
        assert set(opened.values()) == {1}
        assert opened.total() == sum(len(pair["images"]) for episode in share for pair in episode.pairs)
        by_rank.append(set(opened))
    assert not by_rank[0] & by_rank[1] and len(by_rank[0] | by_rank[1]) > 40
    assert abs(len(by_rank[0]) - len(by_rank[1])) < 20


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_opens_only_what_lies_before_it(
    pages: str, opened: Counter[str], tmp_path: Path, accumulation: int
) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": accumulation}

    def run(stop: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        model = backbones.plugin("llava").model
        data = arguments(tmp_path / "run", **options)
        trainer = AimTrainer(model, data, train_dataset=mixture(pages, 2), callbacks=[StopAt(stop)])
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.projector.state_dict().items()}

    whole = run(6)
    all_of_it = opened.total()
    opened.clear()
    resumed = run(6, str(tmp_path / "run" / "checkpoint-4"))
    assert 0 < opened.total() < 0.6 * all_of_it  # two steps of six, and a batch that is made ahead
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6)


# --- what is left without its images


def test_a_batch_of_which_nothing_can_be_read_changes_nothing(tmp_path: Path) -> None:
    model = backbones.plugin("llava").model
    gone = Episode(({"image": "/no/1.png", "text": "a"}, {"image": "/no/2.png", "text": "b"}), (1,))
    batch = EpisodeCollator(model)([gone])
    assert batch["skipped"]["batch of which nothing can be read"] == 1 and (batch["labels"] == -100).all()
    good = Episode((Demonstration.of((picture(1), "a cat")), Demonstration.of((picture(2), "a dog"))), (1,))
    before = {name: value.clone() for name, value in model.projector.state_dict().items()}
    trainer = AimTrainer(model, arguments(tmp_path, per_device_train_batch_size=1), train_dataset=[gone] * 3)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.projector.state_dict().items())
    trainer = AimTrainer(model, arguments(tmp_path), train_dataset=[gone, good] * 4, eval_dataset=[gone, good])
    trainer.train()
    assert not all(torch.equal(value, before[name]) for name, value in model.projector.state_dict().items())
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_a_source_whose_images_are_gone_ends_the_run() -> None:
    opener = Opener()
    lost = Episode(tuple({"image": f"/no/{n}.png", "text": "a"} for n in range(5)), (1, 2, 3, 4), "web")
    good = Episode((Demonstration.of((picture(1), "a")), Demonstration.of((picture(2), "b"))), (1,), "web")
    for _ in range(3):
        for _ in range(FAILED_IN_A_ROW // 5 - 1):
            opener(lost)
        opener(good)
    with pytest.raises(ValueError, match=r"None of the last 1000 pairs of web .*unreadable or missing image"):
        for _ in range(FAILED_IN_A_ROW):
            opener(lost)


# --- how large images are opened

PROCESSORS: dict[str, Any] = {
    "shortest edge": lambda: hf.CLIPImageProcessor(size={"shortest_edge": 84}, crop_size=84),
    "height and width": lambda: hf.SiglipImageProcessor(size={"height": 96, "width": 96}),
    "pixels": lambda: hf.Qwen2VLImageProcessor(max_pixels=64 * 28 * 28, min_pixels=3136),
    "longest edge": lambda: hf.SmolVLMImageProcessor(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=True
    ),
    "grids": lambda: hf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=56, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]]
    ),
}


class Bare:
    """A processor of images alone."""

    def __init__(self, images: Any) -> None:
        self.image_processor, self.processor = images, object()


def photograph(width: int, height: int) -> Image.Image:
    """Shapes on a gradient, with some noise."""
    draw_from = random.Random(width)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    noise = np.random.default_rng(0).normal(0, 10, (height, width, 3))
    image = Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y = draw_from.randrange(width), draw_from.randrange(height)
        colour = tuple(draw_from.randrange(256) for _ in range(3))
        draw.ellipse((x, y, x + width // 6, y + height // 6), fill=colour)
    return image


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(1600, 1200), (900, 1601), (200, 150)])
def test_a_processor_makes_the_same_of_a_shrunk_image(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    images = PROCESSORS[name]()
    shrink = ShrinkFor(Bare(images))
    photograph(*size).save(tmp_path / "a.jpg", quality=95)
    whole, shrunk = open_image(str(tmp_path / "a.jpg")), open_image(str(tmp_path / "a.jpg"), shrink=shrink)
    divisor = shrink(size)
    assert (divisor > 1) == (size != (200, 150)) and shrunk.size == tuple(-(-side // divisor) for side in size)
    made, again = (images(images=[image], return_tensors="pt")["pixel_values"] for image in (whole, shrunk))
    assert made.shape == again.shape
    assert float((made - again).abs().mean() / made.std()) < 0.05


def test_an_image_that_is_turned_or_no_jpeg_is_shrunk_alike(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by a quarter
    image = photograph(1601, 900)
    image.save(tmp_path / "a.jpg", exif=turned, quality=95)
    image.save(tmp_path / "a.png")

    def shrink(size: tuple[int, int]) -> int:
        sizes.append(size)
        return 4

    sizes: list[tuple[int, int]] = []
    assert open_image(str(tmp_path / "a.jpg"), shrink=shrink).size == (225, 401)
    assert open_image(str(tmp_path / "a.png"), shrink=shrink).size == (401, 225)
    assert sizes == [(900, 1601), (1601, 900)]


def test_a_processor_that_sees_more_than_its_settings_say_gets_images_as_they_are() -> None:
    class Tiles(hf.SiglipImageProcessor):  # type: ignore[misc, name-defined]
        """Cuts the upper left corner out at full size, which no setting tells."""

        def preprocess(self, images: Any, **kwargs: Any) -> Any:
            return super().preprocess([image.crop((0, 0, 96, 96)) for image in images], **kwargs)

    honest, other = (
        ShrinkFor(Bare(kind(size={"height": 96, "width": 96}))) for kind in (hf.SiglipImageProcessor, Tiles)
    )
    assert honest((1600, 1200)) == 4 and other((1600, 1200)) == 1


# --- JSON lists


def test_entries_of_a_json_list_are_read_in_any_pieces(tmp_path: Path) -> None:
    values: list[Any] = [
        {"a": "ä\U0001f600\\", "b": [1, {"c": None}]},
        12345,
        "x, ]",
        [],
        {},
        -0.5,
        True,
        {"é": "ü" * 9},
    ]
    for encoding, indent in (("utf-8", None), ("utf-8-sig", 2)):
        path = tmp_path / f"{encoding}.json"
        path.write_text(json.dumps(values, ensure_ascii=False, indent=indent) + " \n", encoding=encoding)
        for piece in (1, 2, 3, 7, 1000):
            found = list(json_entries(path, piece))
            assert [value for value, _, _ in found] == values
            assert [json.loads(path.read_bytes()[begin:end]) for _, begin, end in found] == values
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert list(json_entries(tmp_path / "empty.json")) == []


@pytest.mark.parametrize("text", ["", "[", "[1", "[1,", "[1,]", "[1 2]", "[1] 2", "[1]]", '["a', "{", "[,]", "nul"])
def test_what_is_no_json_list_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    for piece in (1, 1000):
        with pytest.raises(ValueError, match="is not JSON"):
            list(json_entries(path, piece))
