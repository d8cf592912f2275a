"""Bad input: an error that names what was given, what was expected and what to do, and nothing changed on disk."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import torch
from backbones import DEMOS, Plugin, build, picture, plugin
from hub_server import run_python
from safetensors.torch import load_file, save_file

from modeling_aim import AimConfig, AimForConditionalGeneration, AimProcessor, Demonstration, configuration_aim
from modeling_aim.demonstrations_aim import check_source
from modeling_aim.projector_aim import PROJECTOR_WEIGHTS


def fails(action: Callable[[], Any], *words: str, error: type[Exception] = ValueError) -> str:
    """Run `action`, which must fail with all of `words` in its message."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    missing = [word for word in words if not re.search(word, message)]
    assert not missing, f"{missing} not in: {message}"
    return message


@pytest.fixture
def saved(llava: Plugin, tmp_path: Path) -> Path:
    """A self-contained repository to be damaged."""
    llava.model.save_pretrained(tmp_path / "repository", include_backbone=True)
    return tmp_path / "repository"


# --- projectors


def test_a_projector_for_another_hidden_size(saved: Path, listing: Any) -> None:
    before = listing(saved)
    other = build("llava", hidden_size=96)
    fails(
        lambda: AimForConditionalGeneration.from_pretrained(saved, backbone=other.model),
        "another backbone",
        "hidden_size 96",
        "64",
        "from_backbone",
    )
    assert listing(saved) == before


def test_a_projector_for_another_backbone(saved: Path, listing: Any) -> None:
    before = listing(saved)
    load = AimForConditionalGeneration.from_pretrained
    fails(
        lambda: load(saved, backbone=build("qwen2_5_vl").model), "another backbone", "model type qwen2_5_vl", "llava"
    )
    fails(lambda: load(saved, backbone=build("llava", seed=5).model), "another backbone", "other weights", "from_back")
    assert listing(saved) == before


def test_a_backbone_that_was_replaced_in_the_repository(saved: Path) -> None:
    build("llava", seed=5).model.save_pretrained(saved / "backbone")
    fails(lambda: AimForConditionalGeneration.from_pretrained(saved), "another backbone", "other weights")


def test_a_missing_projector(saved: Path, listing: Any) -> None:
    (saved / PROJECTOR_WEIGHTS).unlink()
    before = listing(saved)
    load = AimForConditionalGeneration.from_pretrained
    fails(lambda: load(saved), PROJECTOR_WEIGHTS, str(saved), "saved whole", error=FileNotFoundError)
    assert listing(saved) == before


def test_a_truncated_projector(saved: Path) -> None:
    path = saved / PROJECTOR_WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    fails(lambda: AimForConditionalGeneration.from_pretrained(saved), str(path), "1000 bytes", "cut short", "again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    fails(lambda: AimForConditionalGeneration.from_pretrained(saved), str(path), "another kind of file", "again")


def test_a_foreign_projector(saved: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, saved / PROJECTOR_WEIGHTS)
    fails(
        lambda: AimForConditionalGeneration.from_pretrained(saved), PROJECTOR_WEIGHTS, "weight", r"layers\.0\.weight"
    )
    other = plugin("llava", projector_form="mlp")
    other.model.save_pretrained(saved.parent / "other", include_backbone=True)
    shutil.copy(saved.parent / "other" / PROJECTOR_WEIGHTS, saved)
    fails(
        lambda: AimForConditionalGeneration.from_pretrained(saved),
        "projector_form=mlp",
        "residual_mlp",
        "own settings",
    )


def test_a_projector_that_is_not_finite_or_of_another_width(saved: Path) -> None:
    tensors = load_file(saved / PROJECTOR_WEIGHTS)
    save_file(
        {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in tensors.items()}, saved / PROJECTOR_WEIGHTS
    )
    fails(lambda: AimForConditionalGeneration.from_pretrained(saved), r"\(256, 64\)", r"\(128, 64\)", "hidden size 64")


# --- demonstrations

WRONG_DEMONSTRATIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no text": ({"image": picture(0)}, ("no words", "text", "label", "answer")),
    "no text for a file": ({"image": "a.png"}, (r" \(image 'a\.png'\) has no words; give text",)),
    "empty text": ((picture(0), "  "), ("no words", "text")),
    "a text that is a number": (
        {"image": picture(0), "text": 3},
        ("no words: text is the number 3; expected a string",),
    ),
    "a question without answer": ({"image": picture(0), "question": "What?"}, ("no words", "answer", r"What\?")),
    "a misspelt key": ({"image": picture(0), "lable": "a"}, ("lable", "known are", "Did you mean 'label'")),
    "two texts": ({"text": "a", "label": "b"}, ("text and label; give one of",)),
    "unknown keys": ({"img": picture(0), "text": "a"}, ("img", "known are", "'image'")),
    "one thing": ("a dax", (r"\(image, text\)", "a dax")),
    "four things": ((picture(0), "a", "b", "c"), (r"\(image, question, answer\)",)),
    "no image in a dict": (
        {"image": None, "label": "a dax"},
        (r"\('a dax'\) has None for its image", "without 'image'"),
    ),
    "no image in a tuple": ((None, "Which?", "a dax"), (r"\('a dax'\) has None for its image", r"images=\[\]")),
    "no image in a list": ({"images": [picture(0), None], "text": "a"}, ("Cannot read the image None",)),
    "a missing file": (("nowhere.png", "dax"), (re.escape(os.path.abspath("nowhere.png")), "image file")),
    "a folder as an image": ((".", "dax"), (re.escape(os.path.abspath(".")) + " is a folder",)),
    "a row of pixels": ((np.zeros(3), "dax"), (r"must be \(height, width, 3\), got shape \(3,\)",)),
    "an array of five channels": ((np.zeros((8, 9, 5)), "dax"), (r"\(height, width, 3\), got shape \(8, 9, 5\)",)),
    "an image that is a number": ((7, "dax"), ("7", "PIL image", "URL")),
    "an array of another shape": ((np.zeros((3, 4, 5, 6)), "dax"), ("array", r"\(height, width, 3\)")),
    "an image that is a list of lists": (([[1, 2]], "dax"), ("image", "PIL image")),
}


@pytest.mark.parametrize("case", WRONG_DEMONSTRATIONS)
def test_a_wrong_demonstration(llava: Plugin, case: str) -> None:
    wrong, words = WRONG_DEMONSTRATIONS[case]
    demos, inputs = [DEMOS[0], wrong, DEMOS[1]], llava.query()
    fails(lambda: Demonstration.of(wrong), *words)
    fails(lambda: llava.model.read(demos), *words)
    fails(lambda: llava.processor(images=picture(9), text=llava.processor.prompt("?"), demos=demos), *words)
    fails(lambda: llava.model.generate(**inputs, demos=demos), *words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (((picture(0),), ""), "a text with words; got text=''"),
        (((picture(0),), "  "), "a text with words"),
        (((picture(0),), None), "a text with words; got text=None"),
        ((("a.png",), "dax"), "a tuple of RGB images"),
        ((picture(0), "dax"), "a tuple of RGB images"),
        (((picture(0).convert("RGBA"),), "dax"), "a tuple of RGB images.*mode=RGBA"),
        (((), "dax", ""), "A question is a string with words, or None"),
        (((), "dax \ud800"), "lone surrogate"),
    ],
    ids=range(8),
)
def test_a_demonstration_made_by_hand_is_checked(fields: tuple[Any, ...], words: str) -> None:
    fails(lambda: Demonstration(*fields), words)


def test_the_bound_on_pixels_holds_for_demonstrations_made_by_hand() -> None:
    aim = plugin("llava")
    aim.processor.max_image_pixels = 100
    large = [Demonstration((picture(3),), "a thing.")]
    fails(lambda: aim.model.read(large), "Demonstration 0 has.*40 x 32 pixels", "max_image_pixels=100")


def test_the_demonstration_that_is_wrong_is_named(llava: Plugin) -> None:
    for wrong in (
        {"image": "a.png"},
        {"image": None, "label": "dax"},
        {"lable": "dax"},
        {"text": "a", "label": "b"},
        {"question": "What?"},
    ):
        for demos in ([*DEMOS[:2], wrong], [[*DEMOS[:2], wrong]]):
            fails(lambda demos=demos: llava.model.generate(**llava.query(), demos=demos), "^Demonstration 2 ")
    for demos in ([{"text": "a dax"}, "x"], [*DEMOS[:1], "x", *DEMOS[1:]]):
        fails(lambda demos=demos: llava.model.read(demos), r"^Entry 1 of demos is 'x'; expected \(image, text\)")
    fails(
        lambda: llava.model.read("demos.jsonl"), r"demos = \[json\.loads\(line\) for line in open\('demos\.jsonl'\)\]"
    )
    words = "demos is a list of 3 demonstrations", "DemonstrationBank.build"
    fails(lambda: llava.model.generate(**llava.query(), demos=DEMOS[:3], shots=2), *words)


def test_a_file_that_is_no_image(llava: Plugin, tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    path.write_text("<html>not found</html>")
    for given in (str(path), path):
        fails(lambda given=given: llava.model.read([(given, "dax")]), "page.png", "PIL image", "image file")
    half = tmp_path / "half.png"
    picture(0).save(half)
    half.write_bytes(half.read_bytes()[:200])
    fails(lambda: llava.model.read([(half, "dax")]), "half.png")


@pytest.mark.parametrize(
    "single", [(picture(0), "dax"), {"text": "dax"}, Demonstration((), "dax")], ids=["tuple", "dict", "object"]
)
def test_one_demonstration_where_a_list_belongs(llava: Plugin, single: Any) -> None:
    inputs = llava.query()
    for action in (
        lambda: llava.model.read(single),
        lambda: llava.model.generate(**inputs, demos=single),
        lambda: llava.model(**inputs, demos=single),
        lambda: llava.processor(images=picture(9), text=llava.processor.prompt("?"), demos=single),
    ):
        fails(action, "list", "demonstration")


@pytest.mark.parametrize(
    "given",
    ["dax", 3, [3], ["dax"], [picture(0)], {1, 2}],
    ids=["text", "number", "numbers", "texts", "images", "set"],
)
def test_demonstrations_that_are_none(llava: Plugin, given: Any) -> None:
    inputs = llava.query()
    fails(lambda: llava.model.generate(**inputs, demos=given), "demos")
    fails(lambda: llava.model.read(given), "demonstration")


def test_demonstrations_for_another_number_of_rows(aim: Plugin) -> None:
    inputs = aim.query("What is this?", "And that one?")
    rows = [[DEMOS[0]], [DEMOS[1]], [DEMOS[2]]]
    for demos in (rows, [aim.model.read(row) for row in rows], [None, *rows[1:]]):
        for call in (aim.model.generate, aim.model):
            fails(
                lambda call=call, demos=demos: call(**inputs, demos=demos), "3 rows", "batch has 2", "one a row|a row"
            )


def test_demonstrations_mixed_with_rows(llava: Plugin) -> None:
    inputs = llava.query("What is this?", "And that one?")
    fused = llava.model.read(DEMOS[:1])
    fails(lambda: llava.model.generate(**inputs, demos=[DEMOS[0], fused]), "mixes", "one a row")


def test_demonstrations_beside_embeddings(llava: Plugin) -> None:
    inputs = llava.query(image=None)
    inputs["inputs_embeds"] = llava.model.get_input_embeddings()(inputs["input_ids"])
    for call in (llava.model.generate, llava.model):
        fails(lambda call=call: call(**inputs, demos=DEMOS), "input_ids", "inputs_embeds")


def test_fused_tokens_of_another_projector(llava: Plugin) -> None:
    other = plugin("llava", projector_form="mlp").model.read(DEMOS)
    inputs, words = llava.query(), ("another model", "projector", r"model\.read\(demos\)")
    fails(lambda: llava.model.generate(**inputs, demos=other), *words)
    fails(lambda: llava.model.generate(**inputs, demos=[other]), *words)
    fails(lambda: llava.model.read(other), *words)
    fails(lambda: llava.model.read(DEMOS) + other, *words)


def test_every_difference_of_a_source_counts_that_the_model_can_know() -> None:
    mine = {"backbone": "a", "label template": "This is {label}."}
    check_source(mine, dict(mine))
    fails(lambda: check_source({**mine, "begins with": "<s>"}, mine), r"begins with <s> \(this model: none\)")
    fails(lambda: check_source(mine, {**mine, "begins with": "<s>"}), r"begins with unknown \(this model: <s>\)")
    check_source(mine, {"backbone": "a"})  # of a model without a processor
    fails(lambda: check_source(mine, {"backbone": "b"}), r"backbone a \(this model: b\)")


def test_a_model_without_a_processor_uses_what_another_read(llava: Plugin) -> None:
    model = AimForConditionalGeneration(copy.deepcopy(llava.model.config), llava.backbone)
    model.projector.load_state_dict(llava.model.projector.state_dict())
    inputs, fused = llava.query(), llava.model.read(DEMOS[:2])
    assert torch.equal(model(**inputs, demos=fused).logits, llava.model(**inputs, demos=fused).logits)


def test_fused_tokens_of_this_projector_before_it_was_trained() -> None:
    aim = plugin("llava")
    before = aim.model.read(DEMOS)
    with torch.no_grad():
        aim.model.projector.layers[0].weight.mul_(2)
    fails(lambda: aim.model.generate(**aim.query(), demos=before), "another model", "projector", "Read")


def test_fused_tokens_of_another_backbone(llava: Plugin) -> None:
    for family, seed in (("qwen2_5_vl", 0), ("llava", 5)):
        backbone = build(family, seed)
        other = AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor).read(DEMOS)
        fails(
            lambda other=other: llava.model.generate(**llava.query(), demos=other), "another model", "backbone", "Read"
        )


# --- prompts


@pytest.mark.parametrize("placeholders", [0, 1, 3])
def test_a_prompt_whose_placeholders_do_not_match_its_images(aim: Plugin, placeholders: int) -> None:
    prompt = aim.processor.image_text * placeholders + "What is this?"
    words = (f"{placeholders} image placeholders", "for 2 images", "processor.prompt")
    fails(lambda: aim.processor(images=[picture(0), picture(1)], text=prompt), *words)
    fails(lambda: aim.processor(images=[[picture(0), picture(1)]], text=[prompt]), *words)


def test_placeholders_without_any_image(aim: Plugin) -> None:
    fails(lambda: aim.processor(text=aim.processor.prompt("?")), "1 image placeholder", "0 images")


def test_placeholders_that_match_in_sum_but_not_row_by_row(aim: Plugin) -> None:
    one, text = aim.processor.image_text, "What is this?"
    images = [[picture(0)], [picture(1)]]
    words = ("image placeholder", "image")
    fails(lambda: aim.processor(images=images, text=[one + one + text, text], padding=True), *words)


def test_a_prompt_longer_than_the_backbones_positions(aim: Plugin) -> None:
    inputs = aim.query()
    length = inputs["input_ids"].shape[1]
    demos = [(picture(0), "dax")] * (2048 // 12 + 5)
    fused = aim.model.read(demos)
    fitting = (2048 - length) // 12
    words = (str(length), str(fused.num_tokens), str(length + fused.num_tokens), "2048", rf"demos\[:{fitting}\]")
    for given in (fused, demos, [fused]):
        fails(lambda given=given: aim.model.generate(**inputs, demos=given, max_new_tokens=2), *words)
        fails(lambda given=given: aim.model(**inputs, demos=given), *words)
    aim.model(**inputs, demos=fused[:fitting])


def test_a_demonstration_longer_than_the_backbones_positions(aim: Plugin) -> None:
    words = ("demonstration", "2048", r"\d{4} tokens")
    fails(lambda: aim.model.read([(picture(0), "a very long story " * 120)]), *words)


# --- settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"read_layers": [4]}, ("read_layers", "4", r"0\.\.3")),
        ({"read_layers": [-2]}, ("read_layers", r"\[-2\]", r"0\.\.3")),
        ({"preset": "trained", "read_layers": [3]}, ("put back at 0..2", "not at 3", "paper")),
        ({"preset": "untrained", "read_layers": [-1]}, ("put back at 0..2", "not at -1", "paper")),
        ({"read_layers": [1], "entry_layers": [2]}, (r"entry_layers=\[2\]", r"read_layers=\[1\]")),
        ({"read_layers": [1], "entry_layers": [0], "projector_form": "identity"}, ("identity", "needs a projector")),
        ({"read_layers": [1], "entry_layers": [1], "projector_form": "mlp"}, ("mlp", r"entry_layers=\[0\]")),
        ({"preset": "none"}, ("preset='none'", "untrained")),
        ({"read_layers": []}, ("read_layers", r"\[\]")),
        ({"read_span": "image"}, ("read_span", "image", "answer")),
        ({"projector_form": "conv"}, ("projector_form", "conv", "mlp")),
        ({"max_fused_tokens": 0}, ("max_fused_tokens", "0", "at least 1")),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range(setting: dict[str, Any], words: tuple[str, ...]) -> None:
    fails(lambda: plugin("llava", **setting), *words)


def test_a_template_without_its_field(llava: Plugin) -> None:
    fails(
        lambda: AimProcessor(llava.processor.processor, label_template="This is it."), "label_template", r"\{label\}"
    )
    fails(
        lambda: AimProcessor(llava.processor.processor, question_template="{answer}"), "question_template", "question"
    )
    fails(
        lambda: AimProcessor(llava.processor.processor, question_template="{answer} to {question}"),
        "question_template",
        "before",
    )
    for name, template in (
        ("label_template", "{label}, yes {label}."),
        ("question_template", "{question} {answer}, {answer}"),
        ("question_template", "{question} {question} {answer}"),
    ):
        fails(lambda name=name, t=template: AimProcessor(llava.processor.processor, **{name: t}), name, "once")


def test_no_backbone_to_build_or_load(saved: Path, listing: Any) -> None:
    fails(lambda: AimForConditionalGeneration(AimConfig()), "names no backbone", "from_backbone")
    config = json.loads((saved / "config.json").read_text())
    config["backbone_subfolder"] = None
    (saved / "config.json").write_text(json.dumps(config))
    before = listing(saved)
    fails(lambda: AimForConditionalGeneration.from_pretrained(saved), "names no backbone", "backbone=model")
    assert listing(saved) == before


def test_a_backbone_where_a_repository_belongs(saved: Path) -> None:
    words = "backbone is a backbone, not an AIM repository", "model_type is llava", "from_backbone", "aim init"
    fails(lambda: AimForConditionalGeneration.from_pretrained(saved / "backbone"), *words)
    for load, folder in (
        (AimForConditionalGeneration.from_backbone, saved / "backbone"),
        (AimForConditionalGeneration.from_pretrained, saved),
    ):
        fails(lambda load=load, folder=folder: load(folder, dtype="bfloat16x"), "bfloat16x", "expected auto, float32")


def test_no_processor_for_raw_demonstrations() -> None:
    backbone = build("llava")
    model = AimForConditionalGeneration.from_backbone(backbone.model)
    fails(lambda: model.read(DEMOS), "no processor", "AimProcessor")


def test_a_plain_call_needs_no_processor(saved: Path, tmp_path: Path) -> None:
    """Also where the repository has lost the files of one: the call is the backbone's own."""
    folder = shutil.copytree(saved, tmp_path / "without")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    model = AimForConditionalGeneration.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 6, 7]])
    wanted = model.backbone.generate(ids, max_new_tokens=2, do_sample=False)
    for demos in (None, [], [None], [[]]):
        assert torch.equal(model.generate(ids, demos=demos, max_new_tokens=2, do_sample=False), wanted)
        assert torch.equal(model(ids, demos=demos).logits, model.backbone(ids).logits)


def test_a_folder_to_save_to_that_is_a_file(llava: Plugin, tmp_path: Path, listing: Any) -> None:
    (tmp_path / "taken").write_text("here")
    before = listing(tmp_path)
    fails(lambda: llava.model.save_pretrained(tmp_path / "taken"), "taken", "is a file", "folder")
    fails(lambda: llava.processor.save_pretrained(tmp_path / "taken"), "taken", "is a file", "folder")
    assert listing(tmp_path) == before


# --- versions and trust


@pytest.mark.parametrize(("name", "version"), [("transformers", "5.4.1"), ("torch", "2.9.1")])
def test_an_old_library(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    monkeypatch.setattr(getattr(configuration_aim, name), "__version__", version)
    words = (f"{name}>=", version, "pip install --upgrade")
    fails(configuration_aim.check_versions, *words, error=ImportError)


def test_a_new_enough_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.5.0.dev0", "5.5", "6.0rc1", "5.10.0+local"):
        monkeypatch.setattr(configuration_aim.transformers, "__version__", version)
        configuration_aim.check_versions()


UNTRUSTED = """
import json, sys, transformers
sys.modules["modeling_aim"] = None
failed = {}
for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"):
    try:
        getattr(transformers, name).from_pretrained(FOLDER)
    except Exception as error:
        failed[name] = str(error)
try:
    transformers.pipeline("image-text-to-text", model=FOLDER)
except Exception as error:
    failed["pipeline"] = str(error)
sys.modules["transformers"].__version__ = "5.4.0"
try:
    transformers.AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
except ImportError as error:
    failed["old"] = str(error)
print("\\n" + json.dumps(failed))
"""


def test_remote_code_that_is_not_trusted_or_too_new(saved: Path, listing: Any, hub: hub_server.HubServer) -> None:
    before = listing(saved)
    run = run_python(UNTRUSTED.replace("FOLDER", repr(str(saved))), hub)
    failed = json.loads(run.stdout.splitlines()[-1])
    assert failed.keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoProcessor",
        "pipeline",
        "old",
    }
    old = failed.pop("old")
    assert "transformers>=5.5" in old and "5.4.0" in old and "pip install --upgrade" in old
    assert all("trust_remote_code=True" in message and str(saved) in message for message in failed.values())
    assert listing(saved) == before
