"""The script that writes docs/BACKBONES.md: what it says of a class, and the page it makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

SCRIPT = Path(__file__).parents[1] / "docs" / "survey_backbones.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("survey_backbones", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_a_place_for_every_model_type(script: Any) -> None:
    assert "git" not in FAMILIES
    rows = [script.survey(name) for name in ("pix2struct", "git", "kosmos-2")]
    assert [(row.status, row.untrained) for row in rows] == [
        ("cannot", "no"), ("answers text", "yes"), ("by construction", "not known"),
    ]  # fmt: skip
    failed = {"image_counts": "ValueError: a|b"}
    rows += [script.Row("llava", "works", "yes", "", 29, failed), script.Row("x", "not known", "not known", "why|not")]
    page = script.page(rows)
    assert "- `pix2struct`: it is an encoder-decoder" in page
    assert "Without training, with words: `git`." in page
    assert r"| `llava` | yes | 28 of 29 | `image_counts`: ValueError: a\|b |" in page
    assert "- `image_counts`: queries and demonstrations with no image" in page
    assert all(f"\n## {status.capitalize()}\n" in page for status in script.STATUS)
