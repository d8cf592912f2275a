"""The Space without its page: what it takes from visitors, what it answers, what its repository says."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tomllib
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"
sys.path.insert(0, str(SPACE))
import answers  # noqa: E402
import demonstrations  # noqa: E402
import page  # noqa: E402
from answers import Answer, Answers, Backbone  # noqa: E402

EXAMPLES = sorted(path.name for path in (SPACE / "images").iterdir())


def example(name: str) -> tuple[tuple[demonstrations.Labelled, ...], Image.Image, str]:
    """Demonstrations, query and its label, as the page has them."""
    demos: tuple[demonstrations.Labelled, ...] = ()
    for path in sorted((SPACE / "images" / name).glob("demo-*.png")):
        demos = demonstrations.added(demos, [str(path)], path.stem.split("-")[-1])
    [query] = (SPACE / "images" / name).glob("query-*.png")
    return demos, demonstrations.opened(query), query.stem.split("-")[-1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_shows_what_demonstrations_are_good_for(name: str) -> None:
    """AIM and the full prompt name the image, zero-shot does not; AIM takes fewer tokens and reads once."""
    demos, image, label = example(name)
    model = answers.loaded(Backbone())
    first = answers.answers(model, demos, image, "What is this?")
    right = {method: label in answer.text.split() for method, answer in first.by_method.items()}
    assert right["aim"] and right["full"] and not right["zero"]
    assert not any(answer.problem for answer in first.by_method.values())
    tokens = {method: answer.tokens for method, answer in first.by_method.items()}
    assert tokens["zero"] < tokens["aim"] < tokens["text"] + len(demos) < tokens["full"]
    again = answers.answers(model, first.demos, image, "What is this?")
    assert (first.read, again.read) == (len(demos), 0)
    assert again.by_method["aim"].text == first.by_method["aim"].text


def test_with_its_projector_the_answer_is_right_too_and_what_was_read_without_is_read_again() -> None:
    demos, image, label = example("five-names")
    done = answers.answers(answers.loaded(Backbone()), demos, image, "What is this?").demos
    result = answers.answers(answers.loaded(Backbone(projector=True)), done, image, "What is this?")
    assert label in result.by_method["aim"].text.split() and result.read == len(demos)


def test_the_depth_belongs_to_a_visitor_although_the_model_is_shared() -> None:
    for cache in (answers._load, answers._default_depth):
        cache.cache_clear()
    assert "depth 3" in answers.description(Backbone(depth=3))  # the first visitor's
    assert "depth 2" in answers.description(Backbone())


@pytest.mark.parametrize(
    "name", ["examples/images", "/etc/passwd", "https://example.org/a/b", "aim-tiny2", "../aim-tiny", ""]
)
def test_only_hub_ids_are_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="is not a Hub id; write OWNER/NAME"):
        answers.loaded(Backbone(name))


def test_the_owner_of_a_space_limits_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIM_BACKBONES", "me/one me/two")
    with pytest.raises(ValueError, match=r"^This Space loads aim-tiny, me/one, me/two, not me/three\.$"):
        answers.loaded(Backbone("me/three"))
    assert answers.description(Backbone()).startswith("aim-tiny")


def test_the_file_name_is_the_label_where_none_is_given(tmp_path: Path) -> None:
    names = {"dax-1.png": "dax", "a_red_wug (12).png": "a red wug", "gacre.png": "gacre", "IMG_0017.png": "IMG"}
    for file in names:
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    demos = demonstrations.added((), [str(tmp_path / file) for file in names], "")
    assert [demo.label for demo in demos] == list(names.values())
    assert demonstrations.added((), [str(tmp_path / "gacre.png")], "  a   dax ")[0].label == "a dax"


def test_what_is_no_image_or_no_label_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (8000, 8000)).save(tmp_path / "huge.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "001.png")
    cases: dict[str, Callable[[], object]] = {
        "notes.png is not an image, or is damaged": lambda: demonstrations.opened(tmp_path / "notes.png"),
        "page.png is not an image, or is damaged": lambda: demonstrations.opened(tmp_path / "page.png"),
        "huge.png has 8000 x 8000 pixels, more than": lambda: demonstrations.opened(tmp_path / "huge.png"),
        "001.png has no name to take a label from": lambda: demonstrations.added((), [str(tmp_path / "001.png")], ""),
        "The label has 81 characters": lambda: demonstrations.checked_label("a" * 81),
        "The label is empty": lambda: demonstrations.checked_label("  "),
        "That would be 65 demonstrations": lambda: demonstrations.added((), [str(tmp_path / "001.png")] * 65, "dax"),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and str(tmp_path) not in str(caught)


def test_a_bank_comes_back_with_its_labels_pictures_and_answers(tmp_path: Path) -> None:
    demos, image, label = example("two-names")
    model = answers.loaded(Backbone())
    demos, _ = answers.read(model, demos)
    demonstrations.saved_bank(model, demos, tmp_path / "bank.zip")
    back = demonstrations.opened_bank(tmp_path / "bank.zip", model)
    assert [demo.label for demo in back] == [demo.label for demo in demos]
    assert all(demo.thumbnail is not None and demo.image is None for demo in back)
    result = answers.answers(model, back, image, "What is this?")
    assert result.read == 0 and label in result.by_method["aim"].text.split()
    assert "A bank keeps no full images" in result.by_method["full"].problem
    expected = answers.answers(model, demos, image, "What is this?")
    assert result.by_method["text"].text == expected.by_method["text"].text
    demonstrations.saved_bank(model, (*back, replace(demos[0])), tmp_path / "mixed.zip")  # images of some only
    assert len(demonstrations.opened_bank(tmp_path / "mixed.zip", model)) == len(demos) + 1
    with pytest.raises(ValueError, match="Another backbone, projector or depth has read this bank"):
        demonstrations.opened_bank(tmp_path / "bank.zip", answers.loaded(Backbone(projector=True)))
    with pytest.raises(ValueError, match="comes from a bank that another backbone or depth has read"):
        answers.read(answers.loaded(Backbone(projector=True)), back)


@pytest.mark.parametrize("entry", ["../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "run.py"])
def test_a_zip_file_writes_nothing_but_the_files_of_a_bank(entry: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(entry, b"x")
    with pytest.raises(ValueError, match=r"bad\.zip is not a bank: give a ZIP file that was saved here"):
        demonstrations.opened_bank(tmp_path / "bad.zip", None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.zip"]
    assert not list(tmp_path.parent.glob("outside*")) and not Path("/tmp/outside.safetensors").exists()


def test_a_zip_file_is_bounded_when_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "BANK_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("shard.safetensors", bytes(2**21))
    with pytest.raises(ValueError, match="This bank has more than 1 MB"):
        demonstrations.opened_bank(tmp_path / "bomb.zip", None)


def test_what_a_visitor_or_a_model_says_is_no_markup() -> None:
    one = {method: Answer("<img src=x onerror=alert(1)>", 5, 1.0, "") for method in answers.NAMES}
    one["full"] = Answer(problem="<script>")
    shown = page.cards(Answers(one, (), 0, 0.0), expected="<b>")
    assert "<img" not in shown and "<script" not in shown


def test_the_repository_of_the_space_is_complete() -> None:
    card = RepoCard.load(SPACE / "README.md").data.to_dict()
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file() and card["license"] == "apache-2.0"
    assert len(card["short_description"]) <= 60
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    [gradio] = [Requirement(line) for line in extras["space"] if line.startswith("gradio")]
    assert card["sdk_version"] in SpecifierSet(str(gradio.specifier))
    [requirement] = [Requirement(line) for line in (SPACE / "requirements.txt").read_text().splitlines()]
    assert requirement.name == "modeling-aim" and requirement.extras <= set(extras)
