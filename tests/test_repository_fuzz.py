"""Damaged repositories and banks, file by file: they end in a clear error, or load what they say.

`FUZZ_SEED` draws other damage; a failure names the case, which `FUZZ_CASE` runs alone. `test_bank_fuzz.py` has damage
to banks by somebody who corrects their digests.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import Plugin, picture, plugin
from safetensors.torch import load_file, save_file
from test_bank_fuzz import content

from modeling_aim import AimForConditionalGeneration, AimProcessor, DemonstrationBank, FusedDemonstrations
from modeling_aim.bank.manifest import BANK_MANIFEST, BANK_SHARDS
from modeling_aim.demonstrations_aim import FUSED_FILE
from modeling_aim.files_aim import safetensors_metadata
from modeling_aim.pretrained_aim import DIGEST_KEY, PROJECTOR_WEIGHTS

SEED = os.environ.get("FUZZ_SEED", "0")
ONE = os.environ.get("FUZZ_CASE")
CASES = {
    "configuration": 700, "weights": 600, "processor": 300, "tokenizer": 60, "generation settings": 100,
    "manifest": 300, "shards": 400, "fused demonstrations": 200,
}  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**63, 10**12, 1e308, -0.5, float("nan"), float("inf"), "", "x", "../..", "\ud800", "\x00",
    [], {}, [[]], [None], ["a", 1], {"a": {"b": []}}, "a" * 5000, [1] * 300, {"model_type": "llava"},
)  # fmt: skip
OWN = (
    "backbone_name_or_path", "backbone_revision", "backbone_subfolder", "backbone_fingerprint", "read_layers",
    "entry_layers", "read_span", "max_fused_tokens", "projector_form", "projector_intermediate_size",
    "projector_norm", "backbone_config", "model_type", "auto_map", "architectures", DIGEST_KEY, "dtype",
)  # fmt: skip


@pytest.fixture(scope="module")
def aim() -> Plugin:
    return plugin("llava", preset="trained")


@pytest.fixture(scope="module")
def whole(aim: Plugin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    aim.model.save_pretrained(folder)
    return folder


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def with_junk(value: Any, place: tuple[Any, ...], junk: Any, rng: random.Random) -> Any:
    """A JSON value with something else at a place, or without it."""
    if not place:
        return junk
    changed = copy.deepcopy(value)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    if rng.random() < 0.15:
        del holder[place[-1]]
    else:
        holder[place[-1]] = junk
    return changed


def damaged_json(raw: bytes, rng: random.Random, own: tuple[str, ...]) -> bytes:
    """A JSON file with a value replaced, or with bytes changed."""
    if rng.random() < 0.3:
        return damaged_bytes(raw, rng)
    value = json.loads(raw)
    known = [(name,) for name in own if name in value]
    place = rng.choice(known) if known and rng.random() < 0.6 else rng.choice(places(value))
    return json.dumps(with_junk(value, place, rng.choice(JUNK), rng)).encode()


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    kind, at = rng.randrange(6), rng.randrange(len(raw))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
    if kind == 2:
        return raw[:at] + rng.randbytes(rng.randrange(1, 40)) + raw[at:]
    if kind == 3:
        return raw[:at] + raw[at + rng.randrange(1, 40) :]
    if kind == 4:
        return rng.randbytes(rng.randrange(0, 200))
    return raw[:at] + bytes(min(64, len(raw) - at)) + raw[at + 64 :]


def damaged_weights(path: Path, rng: random.Random) -> None:
    """A safetensors file with bytes changed (its header half of the time), or with other tensors."""
    raw = path.read_bytes()
    if rng.random() < 0.6:
        header = 8 + int.from_bytes(raw[:8], "little")
        if rng.random() < 0.5:
            path.write_bytes(damaged_bytes(raw[:header], rng) + raw[header:])
        else:
            path.write_bytes(damaged_bytes(raw, rng))
        return
    tensors, metadata = load_file(path), safetensors_metadata(str(path))
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    tensors[name] = rng.choice(
        [value * float("nan"), value.half(), value[..., :-1], value[None], value.to(torch.int64), value + 1,
         value.to(torch.complex64), torch.zeros(0)]
    ).contiguous()  # fmt: skip
    if rng.random() < 0.2:
        tensors[rng.choice(["more", "projector.", "\u202e"])] = value.clone()
    if rng.random() < 0.2:
        metadata["aim_form"] = rng.choice(["", "[]", "{", "null", '{"read_layers": {}}', "[" * 5000])
    save_file(tensors, path, metadata=metadata)


def tried(name: str, action: Callable[[random.Random], Any], least: int = 10) -> None:
    """Each case, which may end in `ValueError` or `OSError` with words, or well; both happen at least so often."""
    ends: Counter[str] = Counter()
    for case in range(CASES[name]) if ONE is None else [int(ONE)]:
        rng = random.Random(f"{name} {SEED} {case}")
        try:
            action(rng)
            ends["well"] += 1
        except (ValueError, OSError) as error:
            assert len(str(error)) > 20, f"{name}: FUZZ_SEED={SEED} FUZZ_CASE={case}: {error!r} says nothing"
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}: FUZZ_SEED={SEED} FUZZ_CASE={case} ends in {error!r}") from error
    assert ONE or min(ends["well"], ends["refused"]) > least, ends


def test_there_are_thousands_of_cases() -> None:
    assert sum(CASES.values()) >= 2000


def test_a_damaged_configuration(aim: Plugin, whole: Path, tmp_path: Path) -> None:
    raw, weights = (whole / "config.json").read_bytes(), (whole / PROJECTOR_WEIGHTS).read_bytes()
    (tmp_path / PROJECTOR_WEIGHTS).write_bytes(weights)
    wanted = aim.model.projector.state_dict()

    def action(rng: random.Random) -> None:
        (tmp_path / "config.json").write_bytes(damaged_json(raw, rng, OWN))
        model = AimForConditionalGeneration.from_pretrained(tmp_path, backbone=aim.backbone, processor=aim.processor)
        assert model.config.projector_form == "identity" or all(
            torch.equal(value, wanted[name]) for name, value in model.projector.state_dict().items()
        )

    tried("configuration", action)


def test_damaged_weights(aim: Plugin, whole: Path, tmp_path: Path) -> None:
    path, raw = tmp_path / PROJECTOR_WEIGHTS, (whole / PROJECTOR_WEIGHTS).read_bytes()
    config = json.loads((whole / "config.json").read_bytes())
    wanted = aim.model.projector.state_dict()

    def action(rng: random.Random) -> None:
        bound = rng.random() < 0.5
        given = {key: value for key, value in config.items() if bound or key != DIGEST_KEY}
        (tmp_path / "config.json").write_text(json.dumps(given))
        path.write_bytes(raw)
        damaged_weights(path, rng)
        model = AimForConditionalGeneration.from_pretrained(tmp_path, backbone=aim.backbone, processor=aim.processor)
        found = model.projector.state_dict()
        assert all(bool(torch.isfinite(value).all()) for value in found.values())
        if bound:
            assert all(torch.equal(value, wanted[name]) for name, value in found.items())

    tried("weights", action)


def test_damaged_settings_of_a_processor(aim: Plugin, whole: Path, tmp_path: Path) -> None:
    for path in whole.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = (whole / "processor_config.json").read_bytes()
    own = ("aim", "backbone_processor_class", "processor_class", "auto_map", "backbone_name_or_path")

    def action(rng: random.Random) -> None:
        value = json.loads(raw)
        if rng.random() < 0.5:
            value["aim"] = with_junk(value["aim"], rng.choice(places(value["aim"])), rng.choice(JUNK), rng)
            (tmp_path / "processor_config.json").write_text(json.dumps(value))
        else:
            (tmp_path / "processor_config.json").write_bytes(damaged_json(raw, rng, own))
        processor = AimProcessor.from_pretrained(tmp_path, local_files_only=True)
        assert "{label}" in processor.label_template

    tried("processor", action)


def test_a_damaged_tokenizer(whole: Path, tmp_path: Path) -> None:
    for path in whole.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    files = [path for path in tmp_path.iterdir() if path.name.startswith(("tokenizer", "chat_template"))]
    raw = {path: path.read_bytes() for path in sorted(files)}
    assert len(raw) > 1

    def action(rng: random.Random) -> None:
        for path, whole_file in raw.items():
            path.write_bytes(whole_file)
        path = rng.choice(list(raw))
        json_file = path.suffix == ".json" and rng.random() < 0.5
        path.write_bytes(damaged_json(raw[path], rng, ()) if json_file else damaged_bytes(raw[path], rng))
        AimProcessor.from_pretrained(tmp_path, local_files_only=True)

    tried("tokenizer", action, least=5)


def test_damaged_generation_settings(aim: Plugin, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "generation_config.json"
    raw = json.dumps({**json.loads(path.read_bytes()), "max_new_tokens": 5, "do_sample": True, "top_k": 3}).encode()
    own = ("max_new_tokens", "do_sample", "top_k", "suppress_tokens", "eos_token_id", "transformers_version")

    def action(rng: random.Random) -> None:
        path.write_bytes(damaged_json(raw, rng, own))
        before = aim.backbone.generation_config
        try:
            AimForConditionalGeneration.from_pretrained(path.parent, backbone=aim.backbone, processor=aim.processor)
        finally:
            aim.backbone.generation_config = before

    tried("generation settings", action)


# --- banks and fused demonstrations


@pytest.fixture(scope="module")
def bank(aim: Plugin, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bank on disk, and what it holds."""
    folder = tmp_path_factory.mktemp("bank")
    demos = [{"image": picture(seed), "label": f"dax {seed}"} for seed in range(4)]
    built = DemonstrationBank.build(aim.model, demos, folder, batch_size=2, shard_bytes=1)
    assert len(built._shards) == 2
    return folder, content(built)


def test_a_damaged_manifest(bank: tuple[Path, Any], tmp_path: Path) -> None:
    folder, wanted = bank
    shutil.copytree(folder, tmp_path / "bank")
    path = tmp_path / "bank" / BANK_MANIFEST
    raw = path.read_bytes()
    own = tuple(name for name in json.loads(raw) if name != "source")

    def action(rng: random.Random) -> None:
        damaged = damaged_json(raw, rng, own)
        if rng.random() < 0.5:
            with suppress(ValueError, AttributeError, TypeError):  # its own digest corrected
                manifest = json.loads(damaged)
                manifest.pop("sha256", None)
                digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
                damaged = json.dumps({**manifest, "sha256": digest}).encode()
        path.write_bytes(damaged)
        assert content(DemonstrationBank.from_pretrained(path.parent)) == wanted

    tried("manifest", action)


def test_damaged_shards(bank: tuple[Path, Any], tmp_path: Path) -> None:
    folder, wanted = bank
    shutil.copytree(folder, tmp_path / "bank")
    shards = {path: path.read_bytes() for path in sorted((tmp_path / "bank").glob(BANK_SHARDS))}

    def action(rng: random.Random) -> None:
        for path, raw in shards.items():
            path.write_bytes(raw)
        path = rng.choice(list(shards))
        kind = rng.random()
        if kind < 0.3:
            damaged_weights(path, rng)
        elif kind < 0.4:
            path.unlink()
        elif kind < 0.5:  # nothing is damaged: one page more, which nobody reads, is refused; the same file is right
            path.write_bytes(shards[path] + bytes(rng.choice((0, 0, 1))))
        else:
            path.write_bytes(damaged_bytes(shards[path], rng))
        assert content(DemonstrationBank.from_pretrained(path.parent)) == wanted

    tried("shards", action)


def test_damaged_fused_demonstrations(aim: Plugin, tmp_path: Path) -> None:
    fused = aim.model.read([{"text": "a dax lies here."}, {"image": picture(1), "label": "wug"}])
    fused.save_pretrained(tmp_path)
    path = tmp_path / FUSED_FILE
    raw = path.read_bytes()

    def action(rng: random.Random) -> None:
        path.write_bytes(raw)
        if rng.random() < 0.5:
            damaged_weights(path, rng)
        elif rng.random() < 0.8:
            path.write_bytes(damaged_bytes(raw, rng))
        found = FusedDemonstrations.from_pretrained(tmp_path)
        assert torch.equal(found.vectors, fused.vectors) and torch.equal(found.ids, fused.ids)
        assert (found.texts, found.keys, found.source) == (fused.texts, fused.keys, fused.source)

    tried("fused demonstrations", action)
