"""The evaluation on a repository's model card: table, pictures, and metadata that the Hub reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from backbones import picture
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from modeling_aim.cli import app
from modeling_aim.evaluation import EvalSettings, evaluate
from modeling_aim.evaluation.card import put_on_card

AIM_TINY = Path(__file__).resolve().parents[1] / "hub_configs" / "aim-tiny"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repository, and a run that evaluated it."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(AIM_TINY, folder / "repository")
    (folder / "repository" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\n## Training\n\nlong\n")
    picture(0).save(folder / "0.png")
    shown = {"image": "0.png", "question": "what is it ?", "answer": "red"}
    (folder / "e.jsonl").write_text(json.dumps({"demos": [shown, shown], "queries": [shown]}) + "\n")
    evaluate(
        EvalSettings(
            repo=str(folder / "repository"), tasks=(f"episodes:{folder / 'e.jsonl'},name=colours",),
            output=str(folder / "run"), shots=(0, 2), methods=("zero", "aim"), seeds=1,
        )
    )  # fmt: skip
    return folder / "repository", folder / "run"


def test_the_card_has_table_pictures_and_metadata_once(evaluated: tuple[Path, Path]) -> None:
    repository, run = evaluated
    for _ in range(2):
        done = CliRunner().invoke(app, ["eval", "card", str(run), str(repository)])
        assert done.exit_code == 0, done.output
    card = ModelCard.load(repository / "README.md")
    assert card.text.count("## Few-shot evaluation") == 1
    assert card.text.index("## Training") < card.text.index("## Few-shot evaluation")
    assert "| colours | 2 |" in card.text and "long" in card.text and card.data.license == "mit"
    for name in ("eval_by_shots.png", "eval_by_tokens.png"):
        assert name in card.text and (repository / name).is_file()
    assert (run / "by_cost.png").stat().st_size > 5000
    (two,) = [one for one in card.data.eval_results if one.dataset_args == {"shots": 2}]
    cells = json.loads((run / "results.json").read_text())["cells"]
    (cell,) = [one for one in cells if (one["method"], one["shots"]) == ("aim", 2)]
    assert two.metric_value == pytest.approx(cell["mean"], abs=1e-4) and two.dataset_name == "colours"


def test_what_comes_after_the_section_stays(evaluated: tuple[Path, Path]) -> None:
    repository, run = evaluated
    put_on_card(run, repository)
    path = repository / "README.md"
    path.write_text(path.read_text() + "\n## Licence\n\nfree\n")
    put_on_card(run, repository)
    text = path.read_text()
    assert text.count("## Few-shot evaluation") == 1 and "## Licence\n\nfree" in text


def test_a_run_of_another_model_stays_off_the_card(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    repository, run = evaluated
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("# Other\n")
    with pytest.raises(ValueError, match="is an evaluation of"):
        put_on_card(run, other)
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        put_on_card(tmp_path, repository)
    assert (other / "README.md").read_text() == "# Other\n"
