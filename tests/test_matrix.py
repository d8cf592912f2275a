"""Every property that `aim check` promises, on every family."""

import pytest
from backbones import FAMILIES, MORE_FAMILIES, build

from modeling_aim import AimForConditionalGeneration
from modeling_aim.checks import PROPERTIES, Case, NotApplicable


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE_FAMILIES])
def case(request: pytest.FixtureRequest) -> Case:
    backbone = build(request.param)
    return Case(AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor))


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(case: Case, name: str) -> None:
    try:
        PROPERTIES[name](case)
    except NotApplicable as reason:
        pytest.skip(str(reason))
