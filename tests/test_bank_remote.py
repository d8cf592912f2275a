"""Banks with a model whose class was loaded as remote code, and fused demonstrations kept without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, on_disk, plugin, run_without_package
from forked import run_python
from safetensors.torch import load_file, save_file

from modeling_aim import DemonstrationBank, FusedDemonstrations
from modeling_aim.demonstrations_aim import FUSED_FILE, kind_of

REMOTE = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
given = json.loads(sys.argv[1])
options = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(given["repo"], **options)
processor = AutoProcessor.from_pretrained(given["repo"], **options)
assert "modeling_aim" not in sys.modules and type(model).__module__.startswith("transformers_modules")
from modeling_aim import DemonstrationBank

bank = DemonstrationBank.build(model, given["demos"], given["bank"], batch_size=2, keep_states=True)
inputs = processor(images=given["image"], text=processor.prompt(given["question"]), return_tensors="pt")

def answer(demos, **options):
    output = model.generate(**inputs, demos=demos, max_new_tokens=6, do_sample=False, **options)
    return output[0, inputs["input_ids"].shape[1] :].tolist()

found = {"whole": answer(bank), "slice": answer(bank[1:3]), "prefix": answer(model.prefill(bank))}
for by in ("random", "image", "text", "fused", "mmices"):
    found[by] = answer(bank, shots=2, select=by)
found["list"] = answer(bank, shots=2, select=[3, 0])
again = DemonstrationBank.from_pretrained(given["bank"], model)
found["opened"] = [number for number, _ in again.choose({"image": given["image"]}, 3, by="image")]
print(json.dumps(found))
"""

FUSED = """
from transformers import AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_class_from_dynamic_module

model = AutoModelForImageTextToText.from_pretrained(given["repo"], trust_remote_code=True)
Fused = get_class_from_dynamic_module("demonstrations_aim.FusedDemonstrations", given["repo"])
kept = Fused.from_pretrained(given["fused"])
model.read(kept).save_pretrained(given["again"])
print(json.dumps([repr(kept), type(kept).__module__.split(".")[0], kept.texts]))
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-contained repository of a plug-in on LLaVA."""
    folder = tmp_path_factory.mktemp("repo")
    plugin("llava").model.save_pretrained(folder, include_backbone=True)
    return folder


def test_a_bank_serves_a_model_that_was_loaded_as_remote_code(repo: Path, tmp_path: Path, llava: Plugin) -> None:
    given = {"repo": str(repo), "bank": str(tmp_path / "bank"), **on_disk(tmp_path / "images")}
    done = run_python(["-c", REMOTE, json.dumps(given)])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    bank = DemonstrationBank.from_pretrained(tmp_path / "bank", llava.model)  # the installed class takes it too
    inputs = llava.query()

    def answer(demos: Any, **options: Any) -> list[int]:
        return llava.answer(inputs, demos, **options)[0].tolist()

    assert found["whole"] == found["prefix"] == answer(bank) and found["slice"] == answer(bank[1:3])
    assert found["list"] == answer(bank[[3, 0]])
    for by in ("random", "image", "text", "fused", "mmices"):
        assert found[by] == answer(bank, shots=2, select=by), by
    chosen = bank.choose({"image": given["image"]}, 3, by="image")
    assert found["opened"] == [number for number, _ in chosen]


def test_the_shipped_files_do_not_have_banks(repo: Path) -> None:
    assert not [path.name for path in repo.glob("*.py") if "bank" in path.name]


def test_a_kept_prefix_is_no_bank(llava: Plugin) -> None:
    prefix, fused = llava.model.prefill(list(DEMOS)), llava.model.read(DEMOS)
    bank = DemonstrationBank(fused)
    kinds = [kind_of(value) for value in (bank, prefix, fused, DEMOS, DEMOS[0], None)]
    assert kinds == ["bank", "prefix", "fused", None, "demonstration", None]
    with pytest.raises(ValueError, match="choose from a DemonstrationBank, but demos is"):
        llava.answer(llava.query(), prefix, shots=2)
    with pytest.raises(ValueError, match="choose from a DemonstrationBank, but demos is"):
        llava.answer(llava.query("What?", "Who?"), [prefix, bank], shots=2)
    with pytest.raises(ValueError, match="for 3 rows, but the batch has 2 rows"):
        llava.answer(llava.query("What?", "Who?"), [bank, bank, None], shots=2)


# --- fused demonstrations on disk, without a bank


def test_fused_demonstrations_are_the_same_after_saving(aim: Plugin, tmp_path: Path) -> None:
    fused = aim.model.read(DEMOS)
    fused.save_pretrained(tmp_path)
    fused[:2].save_pretrained(tmp_path)  # replaces it
    fused.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FUSED_FILE]
    kept = FusedDemonstrations.from_pretrained(tmp_path)
    assert torch.equal(kept.vectors, fused.vectors) and kept.vectors.dtype == fused.vectors.dtype
    assert (kept.lengths, kept.keys, kept.texts) == (fused.lengths, fused.keys, fused.texts)
    assert dict(kept.source) == dict(fused.source)
    assert torch.equal(aim.answer(aim.query(), kept), aim.answer(aim.query(), DEMOS))
    width = fused.vectors.shape[1]
    assert repr(kept) == f"FusedDemonstrations(5 demonstrations, {fused.num_tokens} tokens, width {width})"


def test_fused_demonstrations_are_kept_without_the_package(repo: Path, tmp_path: Path, llava: Plugin) -> None:
    fused = llava.model.read(DEMOS)
    fused.save_pretrained(tmp_path / "fused")
    given = {"repo": str(repo), "fused": str(tmp_path / "fused"), "again": str(tmp_path / "again")}
    assert run_without_package(FUSED, given) == [repr(fused), "transformers_modules", list(fused.texts)]
    again = FusedDemonstrations.from_pretrained(tmp_path / "again")
    assert torch.equal(again.vectors, fused.vectors) and dict(again.source) == dict(fused.source)


def test_fused_demonstrations_of_another_model_are_refused(tmp_path: Path, llava: Plugin) -> None:
    llava.model.read(DEMOS).save_pretrained(tmp_path)
    other = plugin("llava", projector_form="mlp")
    with pytest.raises(ValueError, match=r"another model: .*projector"):
        other.answer(other.query(), FusedDemonstrations.from_pretrained(tmp_path))


def test_any_damage_to_fused_demonstrations_is_an_error(tmp_path: Path, llava: Plugin) -> None:
    llava.model.read(DEMOS[:2]).save_pretrained(tmp_path)
    path = tmp_path / FUSED_FILE
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for at in [*range(header), *range(header, len(raw), 97)]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            FusedDemonstrations.from_pretrained(tmp_path)
    for content in (b"", raw[:-3], raw + b"more", b"nonsense" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            FusedDemonstrations.from_pretrained(tmp_path)
    path.write_bytes(raw)
    save_file(load_file(path), path)  # the same tensors, without what is said of them
    with pytest.raises(ValueError, match=r"holds no fused demonstrations.*model\.read"):
        FusedDemonstrations.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=FUSED_FILE):
        FusedDemonstrations.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        llava.model.read(DEMOS[:2]).save_pretrained(tmp_path / "file")
