"""Loading and saving: from the shipped files alone, from folders and by repository id, with the user's own options."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
import transformers
from backbones import DEMOS, FAMILIES, Plugin, build, on_disk, plugin, run_without_package
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import modeling_aim
from modeling_aim import (
    AimConfig,
    AimForConditionalGeneration,
    AimProcessor,
    laptop_quantization_config,
)
from modeling_aim.backbone_aim import decoder_layers
from modeling_aim.projector_aim import PROJECTOR_WEIGHTS

# huggingface_hub uploads large files with an argument that its HTTP client deprecates
pytestmark = [pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"), pytest.mark.timeout(900)]
PACKAGE = Path(modeling_aim.__file__).parent
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
DISTRIBUTIONS = {"pillow": "PIL", "huggingface-hub": "huggingface_hub"}  # named differently when imported


def copy_backbone(aim: Plugin, folder: Path) -> str:
    """The backbone's own repository."""
    aim.backbone.save_pretrained(folder)
    aim.processor.processor.save_pretrained(folder)
    return str(folder)


# --- the shipped files alone

LOAD = """
import os, torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, pipeline
)

def answer(model, processor, demos=given["demos"]):
    prompt = processor.prompt(given["question"])
    inputs = processor(images=given["image"], text=prompt, return_tensors="pt").to(model.dtype)
    output = model.generate(**inputs, demos=demos, max_new_tokens=6, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()

found = {}
for family, folder in given["folders"].items():
    result = found[family] = {}
    options = {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(folder, **options)
    for kind in (AutoModel, AutoModelForImageTextToText):
        model = kind.from_pretrained(folder, **options)
        result[kind.__name__] = answer(model, processor)
    result["read"] = answer(model, processor, model.read(given["demos"]))
    result["code"] = [type(x).__module__.split(".")[0] for x in (model, model.config, processor, model.processor)]

    pipe = pipeline("image-text-to-text", model=folder, max_new_tokens=6, **options)
    call = {"images": given["image"], "text": processor.prompt(given["question"]), "return_full_text": False}
    result["pipeline"] = pipe(**call, demos=given["demos"], generate_kwargs={"do_sample": False})[0]["generated_text"]

    again = os.path.join(given["scratch"], family)
    model.save_pretrained(again, include_backbone=True)
    result["again"] = answer(*(kind.from_pretrained(again, **options) for kind in (AutoModel, AutoProcessor)))
    result["files"] = sorted(os.listdir(again))
    eager = AutoModel.from_pretrained(again, attn_implementation="eager", **options)
    result["eager"] = eager.backbone.config.get_text_config()._attn_implementation

    for name in ("bfloat16", "float16"):
        low = AutoModel.from_pretrained(folder, dtype=getattr(torch, name), **options)
        low.save_pretrained(again, include_backbone=True)
        result[name] = [str(low.dtype), str(next(low.projector.parameters()).dtype), answer(low, processor)]
        result[name] += [answer(AutoModel.from_pretrained(again, **options, dtype="auto"), processor)]

    four = BitsAndBytesConfig(**given["four_bit"], llm_int8_skip_modules=["nothing"])
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=four, **options)
    result["4-bit"] = [type(model.projector.layers[0]).__name__, answer(model, processor)]
    result["4-bit"] += [sum("Linear4bit" == type(m).__name__ for m in model.modules())]
    options["model_kwargs"] = {"quantization_config": four}
    pipe = pipeline("image-text-to-text", model=folder, max_new_tokens=6, **options)
    call |= {"demos": given["demos"], "generate_kwargs": {"do_sample": False}}
    result["4-bit pipeline"] = pipe(**call)[0]["generated_text"]
    result["4-bit text"] = processor.decode(result["4-bit"][1], skip_special_tokens=True)

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    result["from_config"] = [str(model.device), len(answer(model, processor, []))]
print()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A self-contained repository of each family."""
    scratch = tmp_path_factory.mktemp("repositories")
    for family in FAMILIES:
        plugin(family).model.save_pretrained(scratch / family, include_backbone=True)
    return {family: str(scratch / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a script without the package finds in the repository of each family."""
    scratch = tmp_path_factory.mktemp("again")
    given = {"folders": folders, "scratch": str(scratch), "four_bit": FOUR_BIT, **on_disk(scratch / "images")}
    return run_without_package(LOAD, given)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_files_alone_give_the_same_answers(loaded: dict[str, Any], family: str) -> None:
    aim, found = plugin(family), loaded[family]
    wanted = aim.answer(aim.query(), DEMOS)[0].tolist()
    assert found["AutoModel"] == found["AutoModelForImageTextToText"] == found["read"] == wanted
    assert found["code"] == ["transformers_modules"] * 4
    assert found["pipeline"] == aim.processor.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_remote_code_saved_loads_again(loaded: dict[str, Any], folders: dict[str, str], family: str) -> None:
    found = loaded[family]
    assert found["again"] == found["AutoModel"]
    assert found["files"] == sorted(path.name for path in Path(folders[family]).iterdir())
    assert found["eager"] == "eager"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_from_the_shipped_files(loaded: dict[str, Any], family: str, precision: str) -> None:
    dtype, projector, answer, again = loaded[family][precision]
    assert (dtype, projector) == (f"torch.{precision}", "torch.float32")
    assert answer == again and len(answer) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_from_the_shipped_files(loaded: dict[str, Any], family: str) -> None:
    kind, answer, quantized = loaded[family]["4-bit"]
    assert kind == "Linear" and len(answer) > 0
    assert quantized == 3 * 7  # layers, linear maps in each
    assert loaded[family]["4-bit pipeline"] == loaded[family]["4-bit text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_config_builds_random_weights(loaded: dict[str, Any], family: str) -> None:
    assert loaded[family]["from_config"][0] == "cpu" and loaded[family]["from_config"][1] > 0


def test_a_repository_carries_exactly_the_code_it_needs(folders: dict[str, str]) -> None:
    shipped = {path.name for path in PACKAGE.glob("*_aim.py")}
    for folder in map(Path, folders.values()):
        assert {path.name for path in folder.glob("**/*.py")} == shipped
    entries = ("modeling_aim.py", "configuration_aim.py", "processing_aim.py")
    needed = {Path(found).name for entry in entries for found in get_relative_import_files(PACKAGE / entry)}
    assert needed | set(entries) == shipped
    for entry in entries:  # from a folder, transformers 5.5 copies what the entry itself names
        named = {f"{name}.py" for name in get_relative_imports(PACKAGE / entry)}
        assert {Path(found).name for found in get_relative_import_files(PACKAGE / entry)} == named


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*_aim.py")), ids=lambda path: path.name)
def test_shipped_code_imports_only_what_a_copy_has(path: Path) -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = [name.split(">")[0].split("=")[0].strip() for name in project["dependencies"]]
    allowed = {*sys.stdlib_module_names, *(DISTRIBUTIONS.get(name, name) for name in names)}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}"
            assert (path.parent / f"{node.module}.py").is_file() and node.module.endswith("_aim")
            relative.add(node.module)
    assert set(get_relative_imports(path)) == relative  # transformers finds them by pattern, in docstrings too


# --- saving


def test_saved_and_reloaded_answers_are_equal(aim: Plugin, self_contained: Path) -> None:
    loaded = Plugin(aim.family, AimForConditionalGeneration.from_pretrained(self_contained))
    assert torch.equal(loaded.answer(loaded.query(), DEMOS), aim.answer(aim.query(), DEMOS))
    assert torch.equal(loaded.model.read(DEMOS).vectors, aim.model.read(DEMOS).vectors)
    assert torch.equal(loaded.answer(loaded.query(), aim.model.read(DEMOS)), aim.answer(aim.query(), DEMOS))
    assert loaded.model.config.to_dict().keys() == aim.model.config.to_dict().keys()
    processor = AimProcessor.from_pretrained(self_contained)
    assert processor.image_text == aim.processor.image_text
    assert processor.to_dict() == loaded.processor.to_dict()


def test_settings_are_saved(tmp_path: Path) -> None:
    settings = {"read_layers": [1, -1], "read_span": "answer", "max_fused_tokens": 3, "projector_form": "mlp"}
    aim = plugin("llava", **settings, projector_intermediate_size=48)
    aim.processor.label_template = "Its name is {label}."
    aim.model.save_pretrained(tmp_path, include_backbone=True)
    loaded = Plugin("llava", AimForConditionalGeneration.from_pretrained(tmp_path))
    assert {name: getattr(loaded.model.config, name) for name in settings} == settings
    assert loaded.processor.label_template == "Its name is {label}."
    assert torch.equal(loaded.answer(loaded.query(), DEMOS), aim.answer(aim.query(), DEMOS))
    assert json.loads((tmp_path / "config.json").read_text())["backbone_config"]["model_type"] == "llava"


def test_a_backbone_that_was_drawn_anew_or_resized_is_known_again(aim: Plugin, tmp_path: Path) -> None:
    drawn = AimForConditionalGeneration(AimConfig.from_dict(aim.model.config.to_dict()), processor=aim.processor)
    images = [aim.backbone.config.image_token_id]
    inputs, fused = aim.query(), drawn.read(DEMOS)
    with torch.no_grad():
        before = drawn(**inputs, demos=fused).logits
    size = drawn.get_input_embeddings().weight.shape[0]
    for rows in (size, size + 8):
        drawn.resize_token_embeddings(rows)
        for config in (drawn.config, drawn.backbone.config):
            assert config.get_text_config().vocab_size == rows
        with torch.no_grad():
            logits = drawn(**inputs, demos=fused).logits
        assert logits.shape[-1] == rows and torch.equal(logits[..., :size], before)
        drawn.save_pretrained(tmp_path / str(rows), include_backbone=True)
        loaded = Plugin(aim.family, AimForConditionalGeneration.from_pretrained(tmp_path / str(rows)))
        wanted = Plugin(aim.family, drawn).answer(inputs, DEMOS, suppress_tokens=images)
        assert torch.equal(loaded.answer(inputs, DEMOS, suppress_tokens=images), wanted)
    assert not any(p.requires_grad for p in drawn.backbone.parameters())


def test_what_was_missing_in_the_backbones_files_is_told(self_contained: Path) -> None:
    model, info = AimForConditionalGeneration.from_pretrained(self_contained, output_loading_info=True)
    assert isinstance(model, AimForConditionalGeneration)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_backbone_with_missing_weights_is_refused(aim: Plugin, self_contained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(self_contained, folder)
    weights = load_file(folder / "backbone" / "model.safetensors")
    gone = next(name for name in weights if "vision" not in name and "visual" not in name and "v_proj" in name)
    del weights[gone]
    save_file(weights, folder / "backbone" / "model.safetensors", metadata={"format": "pt"})
    wanted = rf"1 weights of .* missing in .*damaged.backbone: .*v_proj.*says {re.escape(transformers.__version__)}"
    with pytest.raises(ValueError, match=wanted):
        AimForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"missing in .*backbone=model"):
        AimForConditionalGeneration.from_backbone(folder / "backbone", aim.processor)
    _, info = AimForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert len(info["missing_keys"]) == 1
    given = AutoModelForImageTextToText.from_pretrained(folder / "backbone")
    assert AimForConditionalGeneration.from_pretrained(folder, backbone=given).backbone is given


def test_a_tied_head_is_not_a_missing_weight(llava: Plugin, tmp_path: Path) -> None:
    config = copy.deepcopy(llava.backbone.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    type(llava.backbone)(config).save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name]
    tied = AimForConditionalGeneration.from_backbone(tmp_path, llava.processor)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def attention(model: AimForConditionalGeneration) -> tuple[str, str, str]:
    """What a backbone, its decoder and its vision tower have, after checking that the configurations say so."""
    found = []
    for config in (model.backbone.config, model.config.backbone_config):
        parts = (config, config.get_text_config(), config.vision_config)
        found.append(tuple(part._attn_implementation for part in parts))
    assert found[0] == found[1]
    assert model.backbone.get_decoder().config._attn_implementation == found[0][1]
    return found[0]


@pytest.mark.parametrize("loader", [AimForConditionalGeneration, AutoModelForImageTextToText], ids=["own", "auto"])
def test_the_configuration_says_which_attention_the_backbone_has(self_contained: Path, loader: Any) -> None:
    model = loader.from_pretrained(self_contained)
    assert attention(model) == ("sdpa", "sdpa", "sdpa") and model.config._attn_implementation == "sdpa"
    for asked in ({"text_config": "eager"}, {"backbone_config": {"text_config": "eager"}}):
        model = loader.from_pretrained(self_contained, attn_implementation=asked)
        assert attention(model) == ("sdpa", "eager", "sdpa")
    model = loader.from_pretrained(self_contained, attn_implementation="eager")
    assert attention(model) == ("eager", "eager", "eager") and model.config._attn_implementation == "eager"
    assert attention(AimForConditionalGeneration(model.config)) == ("eager", "eager", "eager")
    model.set_attn_implementation("sdpa")
    assert attention(model) == ("sdpa", "sdpa", "sdpa") and model.config._attn_implementation == "sdpa"
    for asked, wanted in (("vision_config", ("sdpa", "sdpa", "eager")), ("backbone_config", ("eager",) * 3)):
        model.set_attn_implementation({asked: "eager"})
        assert attention(model) == wanted


def test_a_configuration_made_of_a_live_models_leaves_the_model_alone() -> None:
    """The parent class writes into the parts of a configuration: a shared one would lose its kind of attention."""
    model = plugin("llava").backbone
    before = model.config._attn_implementation
    assert AimConfig(backbone_config=model.config).backbone_config == model.config
    assert before is not None and model.config._attn_implementation == before


def test_the_backbone_is_saved_only_if_asked_for(aim: Plugin, tmp_path: Path) -> None:
    backbone = copy_backbone(aim, tmp_path / "backbone")
    model = AimForConditionalGeneration.from_backbone(backbone, preset="trained")
    model.save_pretrained(tmp_path / "aim")
    assert not list((tmp_path / "aim").glob("**/model*.safetensors")) and not (tmp_path / "aim" / "backbone").exists()
    size = sum(path.stat().st_size for path in (tmp_path / "aim").glob("*.safetensors"))
    assert size < 2 * sum(p.numel() * p.element_size() for p in model.projector.parameters())
    loaded = Plugin(aim.family, AimForConditionalGeneration.from_pretrained(tmp_path / "aim"))
    assert loaded.model.config.backbone_name_or_path == backbone
    assert torch.equal(loaded.answer(loaded.query(), model.read(DEMOS)), loaded.answer(loaded.query(), DEMOS))


def test_a_new_projector_from_a_folder_or_a_model_is_the_same(aim: Plugin, tmp_path: Path) -> None:
    backbone = copy_backbone(aim, tmp_path / "backbone")
    answers = []
    for given in (backbone, Path(backbone), AutoModelForImageTextToText.from_pretrained(backbone)):
        torch.manual_seed(3)
        made = Plugin(aim.family, AimForConditionalGeneration.from_backbone(given))
        answers.append(made.answer(made.query(), DEMOS))
        assert not any(p.requires_grad for p in made.backbone.parameters())
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_a_failed_save_leaves_the_folder_as_it_was(
    llava: Plugin, tmp_path: Path, listing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    llava.model.save_pretrained(folder)
    before = listing(tmp_path)
    trained = plugin("llava", projector_form="mlp")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(trained.backbone, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        trained.model.save_pretrained(folder, include_backbone=True)
    with pytest.raises(OSError, match="No space"):
        trained.model.save_pretrained(tmp_path / "new", include_backbone=True)
    assert listing(tmp_path) == before


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    plugin("llava").model.save_pretrained(tmp_path, include_backbone=True)
    (tmp_path / "README.md").write_text("My own card.")
    (tmp_path / "notes.txt").write_text("kept")
    trained = plugin("llava", projector_form="mlp")
    trained.model.save_pretrained(tmp_path, include_backbone=True)
    assert AimForConditionalGeneration.from_pretrained(tmp_path).source == trained.model.source
    assert (tmp_path / "README.md").read_text() == "My own card." and (tmp_path / "notes.txt").exists()


# --- the user's options reach the backbone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"], ids=str)
def test_the_users_dtype(aim: Plugin, self_contained: Path, dtype: Any) -> None:
    model = AimForConditionalGeneration.from_pretrained(self_contained, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == model.backbone.dtype == wanted
    assert next(model.projector.parameters()).dtype == torch.float32  # small, and trained
    loaded = Plugin(aim.family, model)
    fused = model.read(DEMOS)
    assert fused.vectors.isfinite().all()
    inputs = loaded.query()
    inputs = {name: value.to(wanted) if value.is_floating_point() else value for name, value in inputs.items()}
    assert torch.equal(loaded.answer(inputs, fused), loaded.answer(inputs, DEMOS))
    aim.model.read(fused)  # the projector is the same one, rounded


def test_the_users_device_map_and_attention(self_contained: Path) -> None:
    model = AimForConditionalGeneration.from_pretrained(self_contained, device_map="cpu", attn_implementation="eager")
    assert model.device.type == "cpu"
    assert model.backbone.config.get_text_config()._attn_implementation == "eager"


def linears(model: torch.nn.Module) -> dict[str, str]:
    """The class of every linear map."""
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(load_in_4bit=True),
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"]),
        {"load_in_4bit": True, "llm_int8_skip_modules": []},
        laptop_quantization_config(),
    ],
    ids=["default", "own list", "dict, empty list", "laptop"],
)
def test_in_4_bit_only_decoder_layers_are_quantized(aim: Plugin, self_contained: Path, config: Any) -> None:
    model = AimForConditionalGeneration.from_pretrained(self_contained, quantization_config=config)
    layers = decoder_layers(model.backbone)
    within = {f"{name}.{n}" for name, m in model.named_modules() if m is layers for n in linears(m)}
    for name, kind in linears(model).items():
        assert kind == ("Linear4bit" if name in within else "Linear"), name
    assert len(within) == 21 and "backbone.lm_head" in linears(model) and "projector.layers.0" in linears(model)
    assert model.is_loaded_in_4bit
    loaded = Plugin(aim.family, model)
    inputs = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in loaded.query().items()}
    assert loaded.answer(inputs, DEMOS).shape[1] > 0


def test_a_list_of_the_user_adds_to_what_is_not_quantized(self_contained: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["down_proj"])
    model = AimForConditionalGeneration.from_pretrained(self_contained, quantization_config=config)
    kinds = {name.rsplit(".", 1)[-1]: kind for name, kind in linears(decoder_layers(model.backbone)).items()}
    assert kinds.pop("down_proj") == "Linear" and set(kinds.values()) == {"Linear4bit"}
    assert config.llm_int8_skip_modules == ["down_proj"]  # the user's own object is left alone


def test_what_is_saved_from_4_bit_loads_in_full_precision(aim: Plugin, tmp_path: Path) -> None:
    backbone = copy_backbone(aim, tmp_path / "backbone")
    full = Plugin(aim.family, AimForConditionalGeneration.from_backbone(backbone))
    full.model.save_pretrained(tmp_path / "full")
    four = AimForConditionalGeneration.from_pretrained(
        tmp_path / "full", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    four.save_pretrained(tmp_path / "four")
    loaded = Plugin(aim.family, AimForConditionalGeneration.from_pretrained(tmp_path / "four"))
    assert "Linear4bit" not in linears(loaded.model).values()
    assert torch.equal(loaded.answer(loaded.query(), DEMOS), full.answer(full.query(), DEMOS))
    config = AimConfig.from_pretrained(tmp_path / "four")
    assert "Linear4bit" not in linears(AimForConditionalGeneration(config)).values()


def test_a_backbone_in_4_bit_gets_a_new_projector(aim: Plugin, tmp_path: Path) -> None:
    backbone = copy_backbone(aim, tmp_path / "backbone")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AimForConditionalGeneration.from_backbone(backbone, preset="trained", quantization_config=config)
    assert set(linears(model.projector).values()) == {"Linear"} and linears(model)["backbone.lm_head"] == "Linear"
    model.read(DEMOS)


# --- by repository id

BY_ID = (
    LOAD.split("found = {}")[0]
    + """
options = {"trust_remote_code": True, "revision": given["revision"], "token": given.get("token")}
processor = AutoProcessor.from_pretrained(given["repository"], **options)
model = AutoModelForImageTextToText.from_pretrained(given["repository"], **options)
config = AutoConfig.from_pretrained(given["repository"], **options)
pipe = pipeline("image-text-to-text", model=given["repository"], max_new_tokens=6, **options)
call = {"images": given["image"], "text": processor.prompt(given["question"]), "return_full_text": False}
text = pipe(**call, demos=given["demos"], generate_kwargs={"do_sample": False})[0]["generated_text"]
code = [type(x).__module__.split(".")[0] for x in (model, config, processor, pipe.model, pipe.processor)]
print()
print(json.dumps({"answer": answer(model, processor), "text": text, "code": code}))
"""
)


def test_a_pushed_repository_loads_by_id_at_its_revision(aim: Plugin, hub: HubServer, tmp_path: Path) -> None:
    sha = aim.model.push_to_hub("user/aim", include_backbone=True, token=hub.token).oid
    plugin(aim.family, projector_form="mlp").model.push_to_hub("user/aim", include_backbone=True, token=hub.token)
    hub.requests.clear()
    given = {"repository": "user/aim", "revision": sha, **on_disk(tmp_path / "images")}
    found = run_without_package(BY_ID, given, hub.env())
    wanted = aim.answer(aim.query(), DEMOS)[0].tolist()
    assert found["answer"] == wanted and found["text"] == aim.processor.decode(wanted, skip_special_tokens=True)
    assert found["code"] == ["transformers_modules"] * 5
    assert {revision for revision, _ in hub.asked("user/aim")} == {sha}


def test_a_backbone_elsewhere_has_its_own_revision_and_takes_the_token(hub: HubServer, tmp_path: Path) -> None:
    aim = plugin("llava")
    sha = hub.add_repo("user/backbone", copy_backbone(aim, tmp_path / "backbone"), private=True)
    model = AimForConditionalGeneration.from_backbone("user/backbone", revision=sha, token=hub.token)
    wanted = Plugin("llava", model).answer(aim.query(), DEMOS)[0].tolist()
    pinned = model.push_to_hub("user/aim", private=True, token=hub.token).oid
    assert hub.repos["user/aim"].private and "model.safetensors" not in hub.files("user/aim")

    other = build("llava", seed=5)
    other.model.save_pretrained(tmp_path / "moved")
    hub.commit("user/backbone", {"model.safetensors": (tmp_path / "moved" / "model.safetensors").read_bytes()})
    hub.commit("user/aim", {"aim_projector.safetensors": b"moved"})
    hub.requests.clear()
    given = {"repository": "user/aim", "revision": pinned, "token": hub.token, **on_disk(tmp_path / "images")}
    empty_cache = {"HF_HOME": str(tmp_path / "empty")}
    assert run_without_package(BY_ID, given, hub.env() | empty_cache)["answer"] == wanted
    assert {revision for revision, _ in hub.asked("user/aim")} == {pinned}
    assert {revision for revision, _ in hub.asked("user/backbone")} == {sha}
    with pytest.raises(OSError, match="user/aim"):
        AimForConditionalGeneration.from_pretrained("user/aim", revision=pinned, cache_dir=tmp_path / "other")


def test_cache_dir_and_local_files_only_hold_for_both_repositories(hub: HubServer, tmp_path: Path) -> None:
    aim = plugin("llava")
    hub.add_repo("user/backbone", copy_backbone(aim, tmp_path / "backbone"))
    AimForConditionalGeneration.from_backbone("user/backbone").push_to_hub("user/aim", token=hub.token)
    options = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(OSError, match="cached files"):
        AimForConditionalGeneration.from_pretrained("user/aim", local_files_only=True, **options)
    first = AimForConditionalGeneration.from_pretrained("user/aim", **options)
    first.read(DEMOS[:1])  # loads the processor too
    assert {path.name for path in (tmp_path / "cache").iterdir()} >= {"models--user--aim", "models--user--backbone"}
    hub.requests.clear()
    again = AimForConditionalGeneration.from_pretrained("user/aim", local_files_only=True, **options)
    assert torch.equal(again.read(DEMOS).vectors, first.read(DEMOS).vectors)
    assert not hub.requests


def test_a_push_keeps_the_card_on_the_hub_and_leaves_no_folder(hub: HubServer, llava: Plugin) -> None:
    hub.add_repo("user/aim")
    hub.commit("user/aim", {"README.md": "My own card.", "notes.txt": "kept"})
    llava.model.push_to_hub("user/aim", token=hub.token, commit_message="Better weights")
    files = hub.files("user/aim")
    assert files["README.md"] == b"My own card." and files["notes.txt"] == b"kept"
    assert hub.repos["user/aim"].at("main").message == "Better weights"
    hub.repos.pop("user/aim")
    llava.model.push_to_hub("user/aim", token=hub.token)
    assert b"arxiv.org/abs/2406.07588" in hub.files("user/aim")["README.md"]


def test_what_was_pushed_is_what_is_saved(hub: HubServer, llava: Plugin, tmp_path: Path) -> None:
    llava.model.save_pretrained(tmp_path / "aim", push_to_hub=True, repo_id="user/aim", token=hub.token)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "aim").iterdir()}
    pushed = hub.files("user/aim")
    assert {name: pushed[name] for name in saved} == saved
    assert pushed.keys() - saved.keys() <= {".gitattributes"}
    assert PROJECTOR_WEIGHTS in saved
