"""Every property that `aim check` promises, on every family."""

import pytest
from backbones import FAMILIES, build

from modeling_aim import AimForConditionalGeneration
from modeling_aim.checks import PROPERTIES, Case


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    backbone = build(request.param)
    return Case(AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor))


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(case: Case, name: str) -> None:
    PROPERTIES[name](case)
