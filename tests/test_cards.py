"""Cards of repositories and banks: the Hub reads their metadata, and their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from backbones import DEMOS, Plugin, picture
from forked import run_python
from huggingface_hub import ModelCard

from modeling_aim import AimForConditionalGeneration, DemonstrationBank
from modeling_aim.files_aim import model_card
from modeling_aim.training.report import hub_datasets

HUB_CONFIGS = Path(__file__).resolve().parents[1] / "hub_configs"
FOLDERS = sorted(path.parent.name for path in HUB_CONFIGS.glob("*/README.md"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_hub_lists_a_plug_in_as_an_adapter(folder: str) -> None:
    data = ModelCard.load(HUB_CONFIGS / folder / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", "apache-2.0")
    assert data.tags and "few-shot" in data.tags
    if folder not in ("aim-tiny", "aim-generate"):  # the one has its backbone in it, the other is for any
        assert data.base_model and data.to_dict()["base_model_relation"] == "adapter"


def test_datasets_and_the_revision_of_the_backbone(llava: Plugin, tmp_path: Path) -> None:
    config = llava.model.config
    named = {"backbone_name_or_path": "stock/llava", "backbone_revision": "4ff2a1c"}
    old = {name: getattr(config, name) for name in named}
    (tmp_path / "mine.jsonl").touch()
    specs = ["obelics:HuggingFaceM4/OBELICS,weight=2", f"pairs:{tmp_path / 'mine.jsonl'}", "lcl:a/b", "lcl:a/b"]
    assert hub_datasets(specs) == ["HuggingFaceM4/OBELICS", "a/b"]
    try:
        vars(config).update(named)
        card = ModelCard(model_card(config, llava.model.projector, hub_datasets(specs)))
    finally:
        vars(config).update(old)
    assert card.data.datasets == ["HuggingFaceM4/OBELICS", "a/b"]
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("stock/llava", "adapter")
    assert "stock/llava at revision `4ff2a1c`" in card.text
    own = ModelCard(model_card(config, llava.model.projector)).data.to_dict()
    assert not {"datasets", "base_model", "base_model_relation"} & set(own)  # a backbone without a name


def test_the_card_of_a_bank_is_read_and_its_code_runs(llava: Plugin, tmp_path: Path) -> None:
    llava.model.save_pretrained(tmp_path / "repo", include_backbone=True)
    model = AimForConditionalGeneration.from_pretrained(tmp_path / "repo")
    bank = DemonstrationBank.build(model, DEMOS, tmp_path / "bank")
    card = ModelCard.load(tmp_path / "bank" / "README.md")
    assert (card.data.library_name, card.data.license) == ("transformers", "other")
    assert "demonstration-bank" in (card.data.tags or [])
    picture(9).save(tmp_path / "query.png")
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code = code.replace("this/repository", "bank").replace("the/plug-in", "repo")
    done = run_python(["-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    inputs = llava.query()
    ids = model.generate(**inputs, demos=bank, shots=5, select="random", max_new_tokens=8)
    said = llava.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.stdout == said + "\n"
