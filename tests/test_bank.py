"""A bank: kept, opened, sliced, re-projected, on the Hub, and with its good part readable when damaged."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, plugin
from forked import run_python
from hub_server import HubServer
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_aim import DemonstrationBank
from modeling_aim.bank.manifest import BANK_MANIFEST, read_manifest, write_manifest
from modeling_aim.bank.shards import VERSION
from modeling_aim.files_aim import write_whole


@pytest.fixture
def saved(llava: Plugin, tmp_path: Path) -> Path:
    """The folder of a bank of two shards."""
    DemonstrationBank.build(llava.model, DEMOS, tmp_path / "bank", batch_size=3, shard_bytes=1)
    return tmp_path / "bank"


def shards_of(folder: Path) -> list[Path]:
    return [folder / listed["file"] for listed in read_manifest(folder / BANK_MANIFEST)["shards"]]


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


def test_a_built_bank_is_what_was_read(aim: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank.build(aim.model, DEMOS, tmp_path / "bank", batch_size=2, shard_bytes=1, keep_states=True)
    fused = aim.model.read(DEMOS)
    assert len(bank._shards) == 3
    assert (bank.fused.lengths, bank.fused.keys, bank.fused.texts) == (fused.lengths, fused.keys, fused.texts)
    torch.testing.assert_close(bank.fused.vectors, fused.vectors, rtol=1e-4, atol=1e-4)
    for kept, states in zip(bank.states(), aim.model.read_states(list(map(aim_demo, DEMOS))), strict=True):
        torch.testing.assert_close(kept, states, rtol=1e-4, atol=1e-4)
    mixed = bank[[4, 0, 3, 0]]
    assert mixed.texts == tuple(fused.texts[i] for i in (4, 0, 3, 0))
    assert torch.equal(mixed[1].vectors, bank[0].vectors)
    bank.save_pretrained(tmp_path / "copy", shard_bytes=10**9)
    again = DemonstrationBank.from_pretrained(tmp_path / "copy", aim.model)
    assert torch.equal(again.fused.vectors, bank.fused.vectors) and again.features == bank.features
    assert again.thumbnails() == bank.thumbnails() and [bool(t) for t in bank.thumbnails()] == [1, 1, 0, 1, 1]
    assert bank.labels() == ["dax", None, None, None, "blicket"]
    again.verify()


def aim_demo(demo: Any) -> Any:
    from modeling_aim import Demonstration

    return Demonstration.of(demo)


def test_a_slice_is_a_bank_again(llava: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank(llava.model.read(DEMOS))
    DemonstrationBank(bank[2:] + bank[0]).save_pretrained(tmp_path)
    loaded = DemonstrationBank.from_pretrained(tmp_path)
    assert loaded.fused.texts == (*bank.fused.texts[2:], bank.fused.texts[0])
    assert [one.texts for one in loaded] == [(text,) for text in loaded.fused.texts]
    for wrong in (bank, loaded):
        with pytest.raises(IndexError):
            wrong[5]


def test_saving_again_replaces_the_bank_and_leaves_no_old_file(saved: Path, llava: Plugin) -> None:
    loaded = DemonstrationBank.from_pretrained(saved)
    vectors = loaded.fused.vectors.clone()
    DemonstrationBank(llava.model.read(DEMOS[:2])).save_pretrained(saved)
    assert len(DemonstrationBank.from_pretrained(saved)) == 2
    assert {path.name for path in saved.iterdir()} == {BANK_MANIFEST, "README.md", shards_of(saved)[0].name}
    assert torch.equal(loaded.fused.vectors, vectors)  # one that is open stays what it is


def test_the_card_is_of_the_bank_that_is_there_unless_somebody_wrote_it(tmp_path: Path, llava: Plugin) -> None:
    card = tmp_path / "README.md"
    DemonstrationBank.build(llava.model, DEMOS[:2], tmp_path)
    assert "2 demonstrations" in card.read_text()
    DemonstrationBank.build(llava.model, DEMOS, tmp_path)
    assert "5 demonstrations" in card.read_text()
    DemonstrationBank(llava.model.read(DEMOS[:3])).save_pretrained(tmp_path)
    assert "3 demonstrations" in card.read_text()
    card.write_text("My own words.")
    DemonstrationBank.from_pretrained(tmp_path, llava.model)[:1]
    DemonstrationBank(llava.model.read(DEMOS[:1])).save_pretrained(tmp_path)
    assert card.read_text() == "My own words."


def test_numbers_from_the_end_are_taken_everywhere(saved: Path) -> None:
    bank = DemonstrationBank.from_pretrained(saved)
    for what in (bank.keys, bank.texts, bank.labels, bank.thumbnails):
        assert what([-1, 0]) == [what()[4], what()[0]]
        with pytest.raises(IndexError):
            what([5])


def test_opening_a_bank_touches_nothing_of_its_columns(saved: Path) -> None:
    """They are mapped, not read: of the files' pages none is in memory until something is used."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("only Linux says what is in memory")

    def resident() -> int:
        found, ours = 0, False
        for line in maps.read_text().splitlines():
            if line.split()[0].count("-") == 1:
                ours = str(saved) in line
            elif ours and line.startswith("Rss:"):
                found += int(line.split()[1])
        return found

    bank = DemonstrationBank.from_pretrained(saved)
    assert resident() == 0
    bank[0]
    assert resident() > 0


def test_a_bank_in_half_precision(tmp_path: Path) -> None:
    aim = plugin("llava")
    aim.model.to(torch.bfloat16)
    fused = aim.model.read(DEMOS)
    DemonstrationBank(fused).save_pretrained(tmp_path / "read")
    loaded = DemonstrationBank.from_pretrained(tmp_path / "read")
    assert loaded.fused.vectors.dtype == torch.bfloat16 and torch.equal(loaded.fused.vectors, fused.vectors)
    built = DemonstrationBank.build(aim.model, DEMOS, tmp_path / "built", batch_size=5)
    assert built.fused.vectors.dtype == torch.bfloat16 and torch.equal(built.fused.vectors, fused.vectors)


@pytest.mark.parametrize(
    ("storage", "kept", "worst"), [("bfloat16", torch.bfloat16, 2**-8), ("int8", torch.int8, 1 / 127)]
)
def test_smaller_storage_is_within_its_precision(
    llava: Plugin, tmp_path: Path, storage: str, kept: torch.dtype, worst: float
) -> None:
    full = DemonstrationBank.build(llava.model, DEMOS, tmp_path / "full")
    built = DemonstrationBank.build(llava.model, DEMOS, tmp_path / "built", storage=storage)
    full.save_pretrained(tmp_path / "copied", storage=storage)
    for small in (built, DemonstrationBank.from_pretrained(tmp_path / "copied", llava.model)):
        assert small._shards[0].columns["vectors"].dtype == kept
        gap = (small.fused.vectors.float() - full.fused.vectors).abs().amax(dim=1)
        assert bool((gap <= worst * full.fused.vectors.abs().amax(dim=1)).all())
        assert llava.answer(llava.query(), small).shape == (1, 6)
    assert torch.equal(
        built.fused.vectors, DemonstrationBank.from_pretrained(tmp_path / "copied", llava.model).fused.vectors
    )


def test_a_bank_holds_no_code_and_no_pickle(saved: Path) -> None:
    shards = shards_of(saved)
    assert {path.name for path in saved.iterdir()} == {path.name for path in shards} | {BANK_MANIFEST, "README.md"}
    for shard in shards:
        assert "vectors" in load_file(shard)
    package = Path(sys.modules["modeling_aim"].__file__ or "").parent
    for path in package.glob("*.py"):
        code = path.read_text()
        assert "import pickle" not in code and "torch.load" not in code and "torch.save" not in code, path


def test_a_bank_of_another_plug_in_is_refused_and_the_difference_named(saved: Path) -> None:
    other = plugin("llava", projector_form="mlp")
    for use in (
        lambda: other.model.generate(**other.query(), demos=DemonstrationBank.from_pretrained(saved)),
        lambda: DemonstrationBank.from_pretrained(saved, other.model),
        lambda: other.model.generate(**other.query(), demos=DemonstrationBank.from_pretrained(saved), shots=2),
    ):
        with pytest.raises(ValueError, match=r"another model: .*projector [0-9a-f]{12} \(this model: .*model\.read"):
            use()
    other = plugin("llava", read_span="answer")
    other.model.projector.load_state_dict(plugin("llava").model.projector.state_dict())
    with pytest.raises(ValueError, match=r"another model: read layers \[\d+\], text,"):
        DemonstrationBank.from_pretrained(saved, other.model)
    other = plugin("llava")
    other.processor.label_template = "That is {label}."
    with pytest.raises(ValueError, match=r"another model: label template This is .* \(this model: That is"):
        DemonstrationBank.from_pretrained(saved, other.model)
    other = plugin("llava")
    other.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="another model: image settings"):
        DemonstrationBank.from_pretrained(saved, other.model)


def test_a_bank_of_another_backbone_is_refused_and_the_backbone_named(saved: Path) -> None:
    other = plugin("qwen2_5_vl")
    bank = DemonstrationBank.from_pretrained(saved)
    for use in (
        lambda: DemonstrationBank.from_pretrained(saved, other.model),
        lambda: other.model.generate(**other.query(), demos=bank),
        lambda: other.model.generate(**other.query(), demos=bank, shots=2),
        lambda: other.model.generate(**other.query(), demos=bank, shots=2, select="image"),
        lambda: other.model.prefill(bank),
    ):
        with pytest.raises(ValueError, match=r"another model: backbone llava.* \(this model: qwen2_5_vl"):
            use()


def test_what_binds_a_bank_is_the_same_after_saving_the_model(aim: Plugin, self_contained: Path) -> None:
    from modeling_aim import AimForConditionalGeneration

    assert AimForConditionalGeneration.from_pretrained(self_contained).source == aim.model.source


def test_hidden_states_take_a_new_projector_without_reading(saved: Path, llava: Plugin, tmp_path: Path) -> None:
    new = plugin("llava", projector_form="mlp")
    with pytest.raises(ValueError, match="keep_states=True"):
        DemonstrationBank.from_pretrained(saved, llava.model).reproject(new.model, tmp_path / "no")
    for storage in ("auto", "int8"):
        folder = tmp_path / storage
        bank = DemonstrationBank.build(
            llava.model, DEMOS, folder, batch_size=2, shard_bytes=1, keep_states=True, storage=storage
        )
        seen: list[Any] = []
        handle = new.backbone.get_input_embeddings().register_forward_hook(lambda *args, seen=seen: seen.append(args))
        again = bank.reproject(new.model, tmp_path / f"{storage} again", batch_size=2)
        handle.remove()
        assert not seen
        wanted = DemonstrationBank.build(new.model, DEMOS, tmp_path / f"{storage} read", batch_size=2, storage=storage)
        torch.testing.assert_close(again.fused.vectors, wanted.fused.vectors, rtol=1e-4, atol=0.02)
        assert dict(again.source) == new.model.source and again.has_states
        found, expected = (one.similarity("fused").rows(range(5)) for one in (again, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        assert new.model.source["projector"] in (tmp_path / f"{storage} again" / "README.md").read_text()
    other = plugin("qwen2_5_vl")
    with pytest.raises(ValueError, match="another model: backbone llava"):
        bank.reproject(other.model, tmp_path / "no")


def test_a_bank_says_what_is_in_it(saved: Path, llava: Plugin) -> None:
    info = DemonstrationBank.from_pretrained(saved, llava.model).info()
    assert info["demonstrations"] == 5 and info["labels"] == {"blicket": 1, "dax": 1} and info["shards"] == 2
    assert info["bytes"] > 0 and info["source"] == llava.model.source and info["features"]["image"] == 64
    card = (saved / "README.md").read_text()
    assert "5 demonstrations" in card and "dax" in card and llava.model.source["projector"] in card


# --- the Hub


def test_a_bank_on_the_hub(hub: HubServer, saved: Path, llava: Plugin) -> None:
    sha = hub.add_repo("user/bank", saved, private=True)
    hub.commit("user/bank", {BANK_MANIFEST: "moved"})
    bank = DemonstrationBank.from_pretrained("user/bank", revision=sha, token=hub.token)
    assert torch.equal(bank.fused.vectors, DemonstrationBank.from_pretrained(saved, llava.model).fused.vectors)
    assert {revision for revision, _ in hub.asked("user/bank")} == {sha}
    for missing in ({"revision": "nowhere", "token": hub.token}, {"token": False}):
        with pytest.raises(FileNotFoundError, match=f"(?s){BANK_MANIFEST} was not found in user/bank.*Check"):
            DemonstrationBank.from_pretrained("user/bank", **missing)
    HfApi(token=hub.token).upload_folder(repo_id="user/bank", folder_path=saved)
    assert len(DemonstrationBank.from_pretrained("user/bank", token=hub.token)) == 5


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pushed_bank_is_the_bank_with_a_card(hub: HubServer, saved: Path, llava: Plugin) -> None:
    (saved / "notes.txt").write_text("not of the bank")
    DemonstrationBank.from_pretrained(saved, llava.model).push_to_hub("user/mine", token=hub.token, private=True)
    bank = DemonstrationBank.from_pretrained("user/mine", llava.model, token=hub.token)
    assert torch.equal(bank.fused.vectors, DemonstrationBank.from_pretrained(saved, llava.model).fused.vectors)
    bank.verify()
    files = set(HfApi(token=hub.token).list_repo_files("user/mine"))
    assert "README.md" in files and "notes.txt" not in files
    DemonstrationBank(llava.model.read(DEMOS[:2])).push_to_hub("user/two", token=hub.token)
    assert len(DemonstrationBank.from_pretrained("user/two", llava.model, token=hub.token)) == 2


# --- damage


def rewritten(folder: Path, **changes: Any) -> None:
    """Change entries of the manifest, as somebody who also corrects its sha256; `None` drops one."""
    manifest = json.loads((folder / BANK_MANIFEST).read_text()) | changes
    write_manifest(folder, {name: value for name, value in manifest.items() if value is not None})


def edited(folder: Path, old: str, new: str) -> None:
    text = (folder / BANK_MANIFEST).read_text()
    assert old in text
    (folder / BANK_MANIFEST).write_text(text.replace(old, new))


def first_listed(folder: Path, **changes: Any) -> None:
    shards = read_manifest(folder / BANK_MANIFEST)["shards"]
    rewritten(folder, shards=[{**shards[0], **changes}, *shards[1:]])


def overwritten(path: Path, at: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(content)] = content
    path.write_bytes(raw)


def foreign(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, shards_of(folder)[0])
    first_listed(folder, bytes=shards_of(folder)[0].stat().st_size)


def huge_header(folder: Path, size: int) -> None:
    overwritten(shards_of(folder)[0], 0, size.to_bytes(8, "little"))


def older_shard(folder: Path) -> None:
    path = shards_of(folder)[0]
    now, then = (rf"\"version\": {number}".encode() for number in (VERSION, VERSION - 1))
    assert now in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(now, then))


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str, int]] = {
    # what happens, the error, its message, and how many of the five demonstrations can still be read
    "no manifest": (
        lambda f: (f / BANK_MANIFEST).unlink(), FileNotFoundError, f"{BANK_MANIFEST} was not found in", 5,
    ),
    "half a manifest": (
        lambda f: write_whole(f / BANK_MANIFEST, (f / BANK_MANIFEST).read_bytes()[:80]), ValueError,
        f"{BANK_MANIFEST} is not a manifest of a demonstration bank", 5,
    ),
    "another manifest": (lambda f: (f / BANK_MANIFEST).write_text('["a"]'), ValueError, "is not a manifest", 5),
    "an edited manifest": (
        lambda f: edited(f, '"duplicates": 0', '"duplicates": 3'), ValueError, "was changed after it was written", 5,
    ),
    "an older version": (
        lambda f: rewritten(f, version=VERSION - 1), ValueError,
        f"is of version {VERSION - 1} of .* reads version {VERSION}. Build the bank again", 5,
    ),
    "a later version": (
        lambda f: rewritten(f, version=VERSION + 1), ValueError, f"is of version {VERSION + 1} of .*{VERSION}", 5,
    ),
    "a shard of an older version": (
        older_shard, ValueError, f"aim_bank-00001.* is of version {VERSION - 1} of .* reads version {VERSION}", 2,
    ),
    "an entry missing": (lambda f: rewritten(f, shards=None), ValueError, "is not a manifest.*shards", 5),
    "a shard listed twice": (
        lambda f: rewritten(f, shards=[read_manifest(f / BANK_MANIFEST)["shards"][0]] * 2), ValueError,
        "lists aim_bank-00001.* twice", 5,
    ),
    "a shard outside": (lambda f: first_listed(f, file="../other"), ValueError, "is not a manifest.*the shard", 5),
    "no shard": (lambda f: shards_of(f)[0].unlink(), ValueError, "aim_bank-00001.* is missing.*damaged='skip'", 2),
    "half a shard": (
        lambda f: write_whole(shards_of(f)[0], shards_of(f)[0].read_bytes()[:500]), ValueError,
        "has 500 bytes, its manifest says .*cut short", 2,
    ),
    "foreign safetensors": (foreign, ValueError, "does not belong to a demonstration bank", 2),
    "no safetensors at all": (
        lambda f: overwritten(shards_of(f)[0], 8, b"nonsense"), ValueError, "does not belong to a demonstration", 2,
    ),
    "an absurd header": (lambda f: huge_header(f, 2**62), ValueError, "header claims 4611686018427387904", 2),
    "an empty header": (lambda f: huge_header(f, 0), ValueError, "does not belong to a demonstration bank", 2),
    "another header": (
        lambda f: first_listed(f, header_sha256="0" * 64), ValueError, "another sha256 than the manifest says", 2,
    ),
    "other counts": (lambda f: first_listed(f, demonstrations=4), ValueError, "has 3 demonstrations.*says 4", 2),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bank_is_refused_and_its_good_part_opened(
    saved: Path, llava: Plugin, listing: Any, damage: str
) -> None:
    harm, error, message, left = DAMAGE[damage]
    whole = DemonstrationBank.from_pretrained(saved, llava.model)
    wanted = {key: whole[i].vectors.clone() for i, key in enumerate(whole.keys())}
    harm(saved)
    before = listing(saved.parent)
    with pytest.raises(error, match=message):
        DemonstrationBank.from_pretrained(saved)
    rest = DemonstrationBank.from_pretrained(saved, damaged="skip")
    assert len(rest) == left
    for i, key in enumerate(rest.keys()):
        assert torch.equal(rest[i].vectors, wanted[key])
    assert listing(saved.parent) == before


def place_of(path: Path, name: str, row: int = 0) -> int:
    """Where a tensor (or a row of it) begins in a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    with safe_open(path, framework="pt") as file:
        width = file.get_tensor(name)[0].numel() * file.get_tensor(name).element_size()
    return 8 + length + entry["data_offsets"][0] + row * width


@pytest.mark.parametrize(
    "name",
    ["vectors", "texts", "thumbnails", "keys", "lengths", "vectors.digest", "feature.image", "has_question"],
)
def test_one_changed_byte_is_found_when_it_is_used(saved: Path, llava: Plugin, name: str) -> None:
    path = shards_of(saved)[0]
    at = place_of(path, name)
    overwritten(path, at, bytes([path.read_bytes()[at] ^ 64]))
    with pytest.raises(ValueError, match=f"(?s){name.removesuffix('.digest')}.* damaged"):
        bank = DemonstrationBank.from_pretrained(saved)
        bank[:], bank.thumbnails(), bank.choose({"image": torch.ones(64)}, 1, "image")
    with pytest.raises(ValueError, match=r"damaged|header|sha256"):
        DemonstrationBank.from_pretrained(saved).verify()


def test_of_a_shard_with_one_damaged_demonstration_the_others_are_read(saved: Path) -> None:
    path = shards_of(saved)[0]
    overwritten(path, place_of(path, "vectors") + 3, b"\x00\xff")
    bank = DemonstrationBank.from_pretrained(saved)
    assert len(bank[1:]) == 4
    with pytest.raises(
        ValueError, match=r"vectors of demonstration 0 of aim_bank-00001.*the others can still be used"
    ):
        bank[:2]


def test_a_full_disk_leaves_the_old_bank(saved: Path, listing: Any) -> None:
    before = listing(saved)
    code = """
import resource, signal, sys
from modeling_aim import DemonstrationBank
import torch
from modeling_aim import FusedDemonstrations
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit is then an error, as on a full disk
bank = DemonstrationBank(FusedDemonstrations(torch.randn(5000, 64), (5,) * 1000, torch.arange(5000)))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    bank.save_pretrained(sys.argv[1])
except OSError as error:
    print("refused", error)
"""
    done = run_python(["-c", code, str(saved)])
    assert "refused" in done.stdout, done.stderr
    assert listing(saved) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_an_unknown_storage_or_way_with_damage_is_refused(saved: Path, tmp_path: Path) -> None:
    bank = DemonstrationBank.from_pretrained(saved)
    with pytest.raises(ValueError, match="storage='int4': expected one of auto, float32"):
        bank.save_pretrained(tmp_path / "other", storage="int4")
    with pytest.raises(ValueError, match="damaged='ignore'"):
        DemonstrationBank.from_pretrained(saved, damaged="ignore")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        bank.save_pretrained(tmp_path / "file")
