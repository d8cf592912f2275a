"""A bank of fused demonstrations: saved, loaded, sliced, from folders and the Hub, and refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, plugin
from hub_server import HubServer
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from modeling_aim import DemonstrationBank
from modeling_aim.demonstrations_aim import BANK_MANIFEST, BANK_WEIGHTS


@pytest.fixture
def saved(llava: Plugin, tmp_path: Path) -> Path:
    """The folder of a bank."""
    DemonstrationBank(llava.model.read(DEMOS)).save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def test_a_bank_is_the_same_after_saving_and_loading(aim: Plugin, tmp_path: Path) -> None:
    fused = aim.model.read(DEMOS)
    DemonstrationBank(fused).save_pretrained(tmp_path / "bank")
    bank = DemonstrationBank.from_pretrained(tmp_path / "bank")
    assert len(bank) == len(fused) == 5
    assert torch.equal(bank.fused.vectors, fused.vectors)
    assert (bank.fused.lengths, bank.fused.keys, bank.fused.texts) == (fused.lengths, fused.keys, fused.texts)
    assert dict(bank.fused.source) == dict(fused.source)
    inputs = aim.query()
    assert torch.equal(aim.answer(inputs, bank), aim.answer(inputs, DEMOS))
    assert torch.equal(aim.answer(inputs, bank[1:3]), aim.answer(inputs, DEMOS[1:3]))
    assert torch.equal(aim.answer(inputs, bank[[3, 0]]), aim.answer(inputs, [DEMOS[3], DEMOS[0]]))
    assert torch.equal(aim.answer(inputs, bank[-1]), aim.answer(inputs, DEMOS[-1:]))


def test_a_slice_is_a_bank_again(llava: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank(llava.model.read(DEMOS))
    DemonstrationBank(bank[2:] + bank[0]).save_pretrained(tmp_path)
    loaded = DemonstrationBank.from_pretrained(tmp_path)
    assert loaded.fused.texts == (*bank.fused.texts[2:], bank.fused.texts[0])
    with pytest.raises(IndexError):
        bank[5]


def test_a_bank_in_half_precision(tmp_path: Path) -> None:
    aim = plugin("llava")
    aim.model.to(torch.bfloat16)
    fused = aim.model.read(DEMOS)
    DemonstrationBank(fused).save_pretrained(tmp_path)
    loaded = DemonstrationBank.from_pretrained(tmp_path)
    assert loaded.fused.vectors.dtype == torch.bfloat16 and torch.equal(loaded.fused.vectors, fused.vectors)


def test_a_bank_holds_no_code_and_no_pickle(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {BANK_WEIGHTS, BANK_MANIFEST}
    assert load_file(saved / BANK_WEIGHTS).keys() == {"vectors"}


def test_a_bank_of_another_plug_in_is_refused(saved: Path) -> None:
    other = plugin("llava", projector_form="mlp")
    with pytest.raises(ValueError, match=r"another model.*projector.*model\.read\(demos\)"):
        other.model.generate(**other.query(), demos=DemonstrationBank.from_pretrained(saved))


def test_a_bank_on_the_hub(hub: HubServer, saved: Path, llava: Plugin) -> None:
    sha = hub.add_repo("user/bank", saved, private=True)
    hub.commit("user/bank", {BANK_MANIFEST: "moved"})
    bank = DemonstrationBank.from_pretrained("user/bank", revision=sha, token=hub.token)
    assert torch.equal(bank.fused.vectors, llava.model.read(DEMOS).vectors)
    assert {revision for revision, _ in hub.asked("user/bank")} == {sha}
    for missing in ({"revision": "nowhere", "token": hub.token}, {"token": False}):
        with pytest.raises(FileNotFoundError, match=f"(?s){BANK_MANIFEST} was not found in user/bank.*Check"):
            DemonstrationBank.from_pretrained("user/bank", **missing)
    HfApi(token=hub.token).upload_folder(repo_id="user/bank", folder_path=saved)
    assert len(DemonstrationBank.from_pretrained("user/bank", token=hub.token)) == 5


def rewritten(folder: Path, **changes: Any) -> None:
    """Change entries of the manifest; `None` drops one."""
    manifest = json.loads((folder / BANK_MANIFEST).read_text()) | changes
    kept = {name: value for name, value in manifest.items() if value is not None}
    (folder / BANK_MANIFEST).write_text(json.dumps(kept))


DAMAGE = {
    "no manifest": (lambda f: (f / BANK_MANIFEST).unlink(), FileNotFoundError, f"{BANK_MANIFEST} was not found in"),
    "no weights": (lambda f: (f / BANK_WEIGHTS).unlink(), FileNotFoundError, f"{BANK_WEIGHTS} was not found in"),
    "half a manifest": (
        lambda f: (f / BANK_MANIFEST).write_text((f / BANK_MANIFEST).read_text()[:80]),
        ValueError,
        f"{BANK_MANIFEST} is no manifest of a demonstration bank",
    ),
    "another manifest": (lambda f: (f / BANK_MANIFEST).write_text('["a"]'), ValueError, "is no manifest"),
    "a later version": (lambda f: rewritten(f, version=2), ValueError, "version 1.*version 2"),
    "an entry missing": (lambda f: rewritten(f, lengths=None), ValueError, "is no manifest.*lengths"),
    "other lengths": (
        lambda f: rewritten(f, lengths=[1] * 5),
        ValueError,
        rf"{BANK_MANIFEST}.*expected \(5, hidden size\).*again",
    ),
    "a negative length": (lambda f: rewritten(f, lengths=[-1, 2, 3, 4, 5]), ValueError, f"{BANK_MANIFEST}.*again"),
    "fewer texts than lengths": (lambda f: rewritten(f, texts=["a"]), ValueError, f"{BANK_MANIFEST}.*texts.*again"),
    "half the weights": (
        lambda f: (f / BANK_WEIGHTS).write_bytes((f / BANK_WEIGHTS).read_bytes()[:500]),
        ValueError,
        f"{BANK_WEIGHTS} does not belong to its manifest.*again",
    ),
    "other weights": (
        lambda f: save_file({"vectors": torch.zeros(71, 64)}, f / BANK_WEIGHTS),
        ValueError,
        f"{BANK_WEIGHTS} does not belong to its manifest",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bank_is_refused(saved: Path, listing: Any, damage: str) -> None:
    harm, error, message = DAMAGE[damage]
    harm(saved)
    before = listing(saved.parent)
    with pytest.raises(error, match=message):
        DemonstrationBank.from_pretrained(saved)
    assert listing(saved.parent) == before


def test_a_failed_save_leaves_the_old_bank(
    saved: Path, llava: Plugin, listing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(saved.parent)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        DemonstrationBank(llava.model.read(DEMOS[:1])).save_pretrained(saved)
    monkeypatch.undo()
    assert listing(saved.parent) == before
