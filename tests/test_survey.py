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
    failed, beside = {"image_counts": "ValueError: a|b"}, {"beams": "always", "equal_images": "they differ by 3.7e-01"}
    rows += [
        script.Row("llava", "works", "yes", "", 28, failed, {"beams": "always"}),
        script.Row("llava", "works", "yes", "", 27, {}, beside, "bfloat16"),
        script.Row("llava", "works", "yes", "", 28, {}, {"beams": "always"}, "float16"),
        script.Row("x", "not known", "not known", "why|not"),
    ]
    page = script.page(rows)
    assert "- `pix2struct`: it is an encoder-decoder" in page
    assert "Without training, with words: `git`." in page
    assert (
        r"| `llava` | yes | 27 of 28 | 27 of 27 | 28 of 28 | float32: `image_counts`: ValueError: a\|b; "
        "bfloat16: `equal_images` is not counted: they differ by 3.7e-01 |"
    ) in page
    assert "- `image_counts`: queries and demonstrations with no image" in page and "- `beams`" not in page
    for title in ("Works", "Answers text", "By construction", "Not known", "Cannot"):
        assert f"\n## {title}\n" in page


def test_a_survey_goes_on_where_it_ended(script: Any, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert script.read_results(results) == script.read_results(None) == {}
    jobs = script.jobs_of(["git", "llava"], script.DTYPES)  # git has no tiny model, whose precision counts
    assert jobs == [("git", "float32"), ("llava", "float32"), ("llava", "bfloat16"), ("llava", "float16")]
    for number, (model_type, dtype) in enumerate(jobs[:3], 1):
        row = script.Row(model_type, "works", "yes", "why", 29, {"beams": "no"}, {"reload": "n/a"}, dtype)
        script.add_result(results, row)
        known = script.read_results(results)
        assert len(known) == number and known[model_type, dtype] == row
    assert [job for job in jobs if job not in known] == jobs[3:]
