"""Each folder of hub_configs/ builds at its real size on the meta device, is what its script writes; its card works.

The cards run with a tiny backbone of the same family in the place of the published one, on the tests' own Hub.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import build, picture, run_without_package
from forked import run_python
from hub_server import HubServer
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_aim import AimConfig, AimForConditionalGeneration, AimProjector
from modeling_aim.configuration_aim import PRESETS

WRITTEN_WITH = "5.23."
HUB_CONFIGS = Path(__file__).resolve().parents[1] / "hub_configs"
FOLDERS = sorted(p.name for p in HUB_CONFIGS.iterdir() if (p / "config.json").exists() and p.name != "aim-tiny")
FAMILY = {  # of each folder
    name: json.loads((HUB_CONFIGS / name / "config.json").read_text())["backbone_config"]["model_type"]
    for name in FOLDERS
}
QUICK = ("llava-1.5-7b", "Qwen2.5-VL-7B", "idefics-9b", "SmolVLM-256M")
CARDS = [  # cards differ in names alone
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FOLDERS
]
CARD_TEST = "test_a_card_shows_what_works"
SIZES = {  # billions of parameters, as published with each backbone
    "llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35, "llava-v1.6-mistral-7b": 7.57, "llava-onevision-qwen2-7b": 8.03,
    "Qwen2-VL-2B": 2.21, "Qwen2-VL-7B": 8.29, "Qwen2.5-VL-3B": 3.75, "Qwen2.5-VL-7B": 8.29, "Qwen3-VL-2B": 2.13,
    "Qwen3-VL-4B": 4.44, "Qwen3-VL-8B": 8.77, "idefics-9b": 8.93, "idefics2-8b": 8.40, "Idefics3-8B-Llama3": 8.46,
    "SmolVLM-256M": 0.256, "SmolVLM-500M": 0.508, "SmolVLM-2.2B": 2.25,
}  # fmt: skip


def test_a_folder_for_each_backbone() -> None:
    assert set(FOLDERS) == set(SIZES)


@pytest.mark.parametrize("folder", FOLDERS)
def test_builds_at_its_real_size(folder: str) -> None:
    config = AimConfig.from_pretrained(HUB_CONFIGS / folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.projector.parameters())
    assert sum(p.numel() for p in model.backbone.parameters()) / 1e9 == pytest.approx(SIZES[folder], rel=0.01)
    assert not list(model.projector.parameters())  # it works without training
    width = config.hidden_size
    trained, paper = (AimConfig(config.backbone_config, **PRESETS[name]) for name in ("trained", "paper"))
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in AimProjector(form).parameters()) for form in (trained, paper)]
    assert sizes[1] == width * width + 3 * width and sizes[0] < 17_000_000


def test_the_folders_are_what_the_script_writes() -> None:
    if not transformers.__version__.startswith(WRITTEN_WITH):
        pytest.skip(f"written with transformers {WRITTEN_WITH}; others put other defaults into a config.json")
    script = HUB_CONFIGS / "make.py"
    done = run_python([str(script), "--check"])
    assert done.returncode == 0, done.stdout + done.stderr


# --- the cards

RUN_CARDS = """
import contextlib, io, os

os.chdir(given["folder"])  # where the images of the cards are

def printed(code, names):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()

found = {}
for repository, (use, pipe, four_bit) in given["plugins"].items():
    said = found[repository] = {"use": printed(use, names := {}), "pipeline": printed(pipe, {})}
    said["AutoModel"] = printed(use.replace("AutoModelForImageTextToText", "AutoModel"), {})
    asked, answer = use.split("inputs = ")
    said["4-bit"] = printed(four_bit + "inputs = " + answer, names)
    said["code"] = type(names["model"]).__module__.split(".")[0]
use, again = given["stock"]
found["stock"] = [printed(use, names := {}), type(names["model"]).__module__.split(".")[0]]
printed(again, names)
found["stock"] += [names["ids"].tolist()]
print()
print(json.dumps(found))
"""
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
CARD_DEMOS = [{"image": picture(1), "label": "dax"}, {"image": picture(2), "label": "wug"}]


def card_code(folder: Path, repository: str) -> list[str]:
    """The Python of a card, of the repository that the folder became."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return [block.replace("this/repository", repository) for block in blocks]


def answer_of(backbone: Path, **options: Any) -> tuple[torch.Tensor, str]:
    """What the plug-in without training says on a backbone, asked as a card asks."""
    model = AimForConditionalGeneration.from_backbone(backbone, **options)
    processor = model.processor
    inputs = processor(images=picture(3), text=processor.prompt("What is this?"), return_tensors="pt")
    ids = model.generate(**inputs.to(model.device, model.dtype), demos=CARD_DEMOS, max_new_tokens=8)
    return ids, processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) + "\n"


@pytest.fixture(scope="module")
def cards(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each card that is tested prints, and what the plug-in says on the backbone of its family."""
    items = [item for item in request.session.items if getattr(item, "originalname", "") == CARD_TEST]
    tested = {item.callspec.params["folder"] for item in items}
    folders = [name for name in FOLDERS if name in tested or name == "llava-1.5-7b"]  # aim-generate needs that family
    scratch = tmp_path_factory.mktemp("cards")
    for number, name in enumerate(("dax1", "wug1", "query"), 1):
        picture(number).save(scratch / f"{name}.png")
    wanted: dict[str, Any] = {}
    given: dict[str, Any] = {"folder": str(scratch), "plugins": {}}
    with HubServer(scratch / "hub") as hub:
        for folder in folders:
            config = json.loads((HUB_CONFIGS / folder / "config.json").read_text())
            family, hub_id = config["backbone_config"]["model_type"], config["backbone_name_or_path"]
            if family not in wanted:
                tiny = build(family)
                tiny.model.save_pretrained(scratch / family)
                tiny.processor.save_pretrained(scratch / family)
                wanted[family] = {"full": answer_of(scratch / family)}
                wanted[family]["4-bit"] = answer_of(scratch / family, quantization_config=FOUR_BIT)
            hub.add_repo(hub_id, scratch / family)
            hub.add_repo(f"me/{folder}", HUB_CONFIGS / folder)
            backbone = json.loads((scratch / family / "config.json").read_text())
            config |= {"backbone_config": backbone, "read_layers": None, "entry_layers": None}
            hub.commit(f"me/{folder}", {"config.json": json.dumps(config)})
            given["plugins"][f"me/{folder}"] = card_code(HUB_CONFIGS / folder, f"me/{folder}")
            wanted[f"me/{folder}"] = wanted[family]
        hub.add_repo("me/aim-tiny", HUB_CONFIGS / "aim-tiny")
        given["plugins"]["me/aim-tiny"] = card_code(HUB_CONFIGS / "aim-tiny", "me/aim-tiny")
        hub.add_repo("me/aim-generate", HUB_CONFIGS / "aim-generate")
        given["stock"] = card_code(HUB_CONFIGS / "aim-generate", "me/aim-generate")
        return run_without_package(RUN_CARDS, given, hub.env()), wanted


@pytest.mark.timeout(900)
@pytest.mark.parametrize("folder", CARDS)
def test_a_card_shows_what_works(cards: tuple[dict[str, Any], dict[str, Any]], folder: str) -> None:
    found, wanted = (of[f"me/{folder}"] for of in cards)
    assert found["use"] == found["pipeline"] == found["AutoModel"] == wanted["full"][1]
    assert found["4-bit"] == wanted["4-bit"][1] and found["code"] == "transformers_modules"


@pytest.mark.timeout(900)
def test_the_card_of_aim_tiny_works(cards: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found = cards[0]["me/aim-tiny"]
    answers = [found[way].strip() for way in ("use", "pipeline", "AutoModel")]
    assert answers == [answers[0]] * 3 and "dax" in answers[0] and found["4-bit"].strip()


@pytest.mark.timeout(900)
def test_the_card_of_aim_generate_works(cards: tuple[dict[str, Any], dict[str, Any]]) -> None:
    printed, code, ids = cards[0]["stock"]
    wanted, text = cards[1]["llava"]["full"]
    assert printed == text and ids == wanted.tolist() and code == "transformers"
