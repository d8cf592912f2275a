"""`--image NAME=VALUE`: settings of the backbone's image processor, tried, stored, and shown as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_cli_errors
import torch
from backbones import DEMOS, build, picture, plugin
from transformers import AutoProcessor
from typer.testing import CliRunner

from modeling_aim import AimProcessor
from modeling_aim.cli import app
from modeling_aim.image_settings import image_setting_names, image_tokens, set_image_settings, tokens_line
from modeling_aim.processing_aim import IMAGE_SETTINGS

files = test_cli_errors.files  # the fixture
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("qwen2_5_vl", {"max_pixels": 1568}, True),
    ("idefics3", {"do_image_splitting": False}, True),
    ("idefics3", {"size": {"longest_edge": 32}}, True),
    ("llava", {"do_convert_rgb": True}, False),
]
BESIDE_PIXELS = {  # settings of image processors that change no pixel of an RGB image
    "input_data_format", "data_format", "do_convert_rgb", "image_seq_length", "return_tensors", "device",
    "disable_grouping", "return_row_col_info", "transform", "image_num_channels",
}  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "idefics"])
def test_fused_tokens_are_bound_to_every_setting_that_changes_pixels(family: str) -> None:
    names = set(type(build(family).processor.image_processor).valid_kwargs.__annotations__)
    assert not names - set(IMAGE_SETTINGS) - BESIDE_PIXELS


def test_another_resampling_is_another_reader() -> None:
    aim = plugin("llava")
    before, source = aim.model(**aim.query(), demos=list(DEMOS)).logits, aim.model.source
    query = aim.query()
    aim.processor.image_processor.resample = 0
    assert aim.model.source != source
    assert not torch.equal(aim.model(**query, demos=list(DEMOS)).logits, before)


@pytest.mark.parametrize(("family", "settings", "fewer"), CASES)
def test_a_setting_changes_the_tokens_and_is_saved(
    family: str, settings: dict[str, Any], fewer: bool, tmp_path: Path
) -> None:
    processor = AimProcessor(build(family).processor)
    before = image_tokens(processor), processor.reading_settings["image settings"]
    set_image_settings(processor, settings)
    now = image_tokens(processor)
    assert (now < before[0]) is fewer and f"is {now} tokens" in tokens_line(processor)
    assert (processor.reading_settings["image settings"] != before[1]) is fewer  # fused tokens are bound to them
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.reading_settings == processor.reading_settings and image_tokens(again) == now


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen2_5_vl", {"max_pixel": 9}, "--image max_pixel=9: Qwen2VLImageProcessor takes .*max_pixels, "),
        ("qwen2_5_vl", {"max_pixels": "many"}, r"--image max_pixels=many: expected a positive number"),
        ("idefics3", {"do_image_splitting": "maybe"}, r"--image do_image_splitting=maybe: expected true or false"),
        ("llava", {"size": "x"}, r"--image size=x: CLIPImageProcessor does not take this .* Its own: size="),
        ("llava", {"image_mean": [1, 2]}, r"--image image_mean=\[1, 2\]: CLIPImageProcessor does not take this"),
    ],
)
def test_a_bad_setting_is_refused_and_nothing_is_changed(family: str, settings: dict[str, Any], message: str) -> None:
    processor = AimProcessor(build(family).processor)
    before = processor.image_processor
    with pytest.raises(ValueError, match=message):
        set_image_settings(processor, settings)
    assert processor.image_processor is before and "size" in image_setting_names(processor)


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone whose processor splits images, a demonstration and a query."""
    folder = tmp_path_factory.mktemp("idefics3")
    build("idefics3").save(folder / "backbone")
    picture(0, (90, 70)).save(folder / "0.png")
    (folder / "demos.jsonl").write_text("\n".join(json.dumps({"image": "0.png", "label": name}) for name in "ab"))
    return folder


def run(*typed: Any) -> Any:
    return CliRunner().invoke(app, [str(one) for one in typed])


def test_init_stores_it_and_answer_and_bank_take_it(idefics: Path, tmp_path: Path) -> None:
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    for repo, more in ((plain, []), (whole, ["--image", "do_image_splitting=false"])):
        done = run("init", idefics / "backbone", "--output", repo, *more)
        assert done.exit_code == 0, done.output
    tokens = [image_tokens(AimProcessor.from_pretrained(repo)) for repo in (plain, whole)]
    assert tokens[0] > tokens[1]
    ask = ["--demos", idefics / "demos.jsonl", "--image", idefics / "0.png", "--question", "What?", "--json"]
    cases = ((plain, []), (plain, ["--image", "do_image_splitting=false"]), (whole, []))
    prompts = [json.loads(run("answer", "--repo", r, *ask, *m).stdout)["prompt_tokens"] for r, m in cases]
    assert prompts[0] > prompts[1] == prompts[2]
    built = run("bank", "build", "--repo", plain, "--demos", idefics / "demos.jsonl", "--output", tmp_path / "bank",
                "--image", "do_image_splitting=false")  # fmt: skip
    assert built.exit_code == 0, built.output
    assert "tokens (--image NAME=VALUE changes this)" in built.stderr
    chosen = ["bank", "select", tmp_path / "bank", "--select", "random", "--shots", 1, "--repo"]
    opened = [run(*chosen, repo) for repo in (plain, whole)]
    assert [done.exit_code for done in opened] == [1, 0], [done.output for done in opened]
    assert "image settings" in opened[0].output  # another number of tokens: another reader


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--image", "tiles=1"], "--image tiles=1: Idefics3ImageProcessor takes"),
        (["--image", "size=9=9"], "--image size=9=9: Idefics3ImageProcessor does not take this"),
        (["--image", "a.png", "--image", "b.png"], "--image was given 2 times without NAME=: a.png, b.png."),
    ],
)
def test_bad_settings_of_a_command_are_one_line(idefics: Path, tmp_path: Path, typed: list[str], message: str) -> None:
    run("init", idefics / "backbone", "--output", tmp_path / "repo")
    ask = ["--repo", tmp_path / "repo", "--demos", idefics / "demos.jsonl", "--question", "What?"]
    done = run("answer", *ask, *typed)
    said = [line for line in done.stderr.splitlines() if line.startswith("aim answer")]
    assert done.exit_code == 1 and len(said) == 1 and message in said[0], done.output


def test_a_size_that_the_backbone_cannot_read_is_said_before_the_run(files: Path, tmp_path: Path) -> None:
    size = '--image=size={"height": 14, "width": 14}'
    done = run("init", files / "backbone", "--output", tmp_path / "repo", size)
    assert done.exit_code == 1 and "the backbone cannot read such images" in done.stderr, done.output
    assert not (tmp_path / "repo").exists()


def test_bench_counts_it(idefics: Path) -> None:
    counted = ["bench", "--backbone", idefics / "backbone", "--count-only", "--shots", "0,1"]
    tall, small = (run(*counted, *more) for more in ([], ["--image", "do_image_splitting=false"]))
    assert tall.exit_code == small.exit_code == 0, tall.output + small.output
    assert "4 visual tokens an image" in " ".join(small.output.split())  # a title may be on two lines
    assert run("bench", "--shape", "tiny", "--image", "size=1").exit_code == 1
