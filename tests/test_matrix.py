"""Every property that `aim check` promises, on every family; each in bfloat16, some in float16; quantized; on disk."""

from pathlib import Path

import pytest
import torch
from backbones import FAMILIES, MORE_FAMILIES, build, slow_unless_of_its_kind
from more_families import BUILDERS
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_aim import AimForConditionalGeneration
from modeling_aim.backbone_aim import decoder_layers
from modeling_aim.checks import PROPERTIES, Case, NotApplicable

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")

# Those whose outcome rounding can change. All properties hold in low precision; the others compute nothing twice.
ROUNDED = (
    "read_or_raw", "rows_of_a_batch", "without_cache", "beams", "kept_prefix", "attention_kinds", "batch_reading",
    "equal_images", "early_stop", "without_training", "words_at_depth", "gradients",
)  # fmt: skip
LOW_PRECISION = [
    *(slow_unless_of_its_kind(family, (family, torch.bfloat16)) for family in [*FAMILIES, *MORE_FAMILIES]),
    *((family, torch.float16) for family in FAMILIES),
]


def holds(case: Case, name: str) -> None:
    """A property of `aim check` on one plug-in; the test is skipped where it does not apply."""
    try:
        PROPERTIES[name](case)
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE_FAMILIES])
def case(request: pytest.FixtureRequest) -> Case:
    backbone = build(request.param)
    return Case(AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor))


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(case: Case, name: str) -> None:
    holds(case, name)


@pytest.fixture(scope="module", params=LOW_PRECISION, ids=lambda param: f"{param[0]}-{param[1]}".replace("torch.", ""))
def rounded_case(request: pytest.FixtureRequest) -> Case:
    family, dtype = request.param
    backbone = build(family)
    return Case(AimForConditionalGeneration.from_backbone(backbone.model.to(dtype), backbone.processor))


@pytest.mark.parametrize("name", ROUNDED)
def test_property_in_low_precision(rounded_case: Case, name: str) -> None:
    holds(rounded_case, name)


@pytest.mark.parametrize("family", ["gemma3", "lfm2_vl", "mllama"])
def test_kv_of_a_prefix_with_windows_with_recurrence_and_with_cross_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MORE_FAMILIES, family, BUILDERS[family])
    backbone = build(family)
    PROPERTIES["kept_prefix"](Case(AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor)))


@pytest.fixture(
    scope="module", params=[slow_unless_of_its_kind(family, family) for family in [*FAMILIES, *MORE_FAMILIES]]
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """The plug-in of a family, and as files with its backbone."""
    backbone = build(request.param)
    model = AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor)
    folder = tmp_path_factory.mktemp("family") / "repository"
    model.save_pretrained(folder, include_backbone=True)
    return Case(model), folder


def test_in_4_bit(saved: tuple[Case, Path]) -> None:
    quantized = AimForConditionalGeneration.from_pretrained(saved[1], quantization_config=FOUR_BIT)
    kinds = {type(m).__name__ for m in decoder_layers(quantized.backbone).modules() if hasattr(m, "in_features")}
    assert "Linear4bit" in kinds
    small = Case(quantized)
    for name in ("no_demonstrations", "demonstrations_reach", "read_or_raw"):
        PROPERTIES[name](small)
    inputs = {**small.query(), "demos": small.demos}  # after inference, for which bitsandbytes repacks the weights
    inputs["labels"] = inputs["input_ids"]
    trained = AimForConditionalGeneration.from_backbone(quantized.backbone, quantized.processor, preset="trained")
    trained(**inputs).loss.backward()
    weight = trained.projector.layers[-1].weight
    slope, step, losses = weight.grad.norm(), 0.001, []
    for side in (step, -step):
        with torch.no_grad():
            weight += side * weight.grad / slope
            losses.append(trained(**inputs).loss.double())
            weight -= side * weight.grad / slope
    routed = hasattr(quantized.config.get_text_config(), "num_experts")  # the loss has steps where the route changes
    assert routed or float(losses[0] - losses[1]) / (2 * step) == pytest.approx(float(slope), rel=0.05)
    PROPERTIES["gradients"](small)


def test_partly_on_disk(saved: tuple[Case, Path], tmp_path: Path) -> None:
    case, folder = saved
    expected = case.answer(case.query(), case.demos)
    size = sum(p.numel() * p.element_size() for p in case.model.backbone.parameters())
    places = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": str(tmp_path)}
    try:
        host = AutoModelForImageTextToText.from_pretrained(folder / "backbone", **places)
    except Exception as error:
        pytest.skip(f"the backbone alone cannot be offloaded: {error}")
    if "disk" not in host.hf_device_map.values():
        pytest.skip("accelerate finds no part of this backbone that may go to disk")
    queries = case.query()
    alone = [some.generate(**queries, max_new_tokens=4, do_sample=False) for some in (host, case.model.backbone)]
    if not torch.equal(*alone):
        pytest.skip("offloaded, the backbone alone answers otherwise")
    model = AimForConditionalGeneration.from_pretrained(folder, **places)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(Case(model).answer(case.query(), case.demos), expected)
