"""Damaged banks, by the thousand: an error of ours or a right answer; never a crash, a hang or wrong content."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modeling_aim import DemonstrationBank, FusedDemonstrations
from modeling_aim.bank.manifest import PARTS_FOLDER, new_manifest, part_path, write_manifest, write_numbered
from modeling_aim.bank.shard_files import shard_content
from modeling_aim.bank.shards import VERSION, BankDamaged, Shard, as_bytes, blob, fused_columns, make_shard
from modeling_aim.demonstrations_aim import FusedDemonstrations as Fused

NAMES = ("aim_bank.json", "0", "1")  # the manifest and the two shards


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """Thousands of files are written here; what a power cut does to them is not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def used(bank: DemonstrationBank) -> None:
    """Everything that is done with a bank, each ending in a result or in an error that names the file."""
    query = {kind: torch.ones(width) for kind, width in bank.features.items()}
    with tempfile.TemporaryDirectory() as copy:
        for use in (
            bank.info,
            bank.card,
            bank.verify,
            bank.thumbnails,
            bank.states,
            lambda: bank.choose(query, 2, "image"),
            lambda: bank.choose(query, 2, "mmices"),
            lambda: bank.choose({"fused": torch.ones(bank.width)}, 1, "fused"),
            lambda: bank.choose(k=3),
            lambda: bank[[0, -1]],
            lambda: bank.save_pretrained(copy, storage="int8"),
            lambda: bank.save_pretrained(copy, storage="float16", shard_bytes=1),
            lambda: pickle.loads(pickle.dumps(bank)),
        ):
            with suppress(ValueError, OSError, IndexError if not len(bank) else ValueError):
                use()


def content(bank: DemonstrationBank) -> list[tuple[Any, ...]]:
    """All that a bank holds of each demonstration."""
    seen = torch.cat([shard.feature("image") for shard in bank._shards]) if "image" in bank.features else [None] * 9
    rows = zip(bank, bank.keys(), bank.labels(), bank.thumbnails(), seen, strict="image" in bank.features)
    return [
        (one.vectors.float().numpy().tobytes(), one.texts, dict(one.source), key, label, picture, str(features))
        for one, key, label, picture, features in rows
    ]


def demonstration_bank() -> DemonstrationBank:
    """A bank with every kind of column."""
    generator = torch.Generator().manual_seed(0)
    shards = []
    for start in (0, 3):
        vectors = torch.randn(9, 4, generator=generator)
        texts = tuple(f"the text {start + i}" for i in range(3))
        keys = tuple(f"{start + i:064x}" for i in range(3))
        columns, about = fused_columns(
            Fused(vectors, (2, 4, 3), torch.arange(9), keys, texts, {"backbone": "tiny", "read": "last"})
        )
        columns["labels"], columns["label_lengths"] = blob([b"dax", b"", b"wug"])
        columns["thumbnails"], columns["thumbnail_lengths"] = blob([b"one", b"two", b""])
        columns["feature.image"] = torch.randn(3, 4, generator=generator).half()
        columns["feature.text"] = torch.randn(3, 4, generator=generator).half()
        columns["has_question"] = torch.tensor([1, 0, 1], dtype=torch.uint8)
        shards.append(make_shard(columns, about))
    return DemonstrationBank.of_shards(shards, shards[0].about["source"])


@pytest.fixture(scope="module", params=["auto", "int8"])
def bank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bank on disk and what it holds."""
    folder = tmp_path_factory.mktemp("bank")
    demonstration_bank().save_pretrained(folder, storage=request.param)
    return folder, content(DemonstrationBank.from_pretrained(folder))


@st.composite
def harm(draw: Any) -> tuple[str, Any]:
    """One way to damage a file."""
    where = st.floats(0, 1)
    return draw(
        st.one_of(
            st.tuples(st.just("flip"), st.tuples(where, st.integers(1, 255))),
            st.tuples(st.just("cut"), where),
            st.tuples(st.just("insert"), st.tuples(where, st.binary(min_size=1, max_size=9))),
            st.tuples(st.just("remove"), st.tuples(where, st.integers(1, 40))),
            st.tuples(st.just("zero"), st.tuples(where, st.integers(1, 64))),
            st.tuples(st.just("append"), st.binary(min_size=1, max_size=20)),
            st.tuples(st.just("replace"), st.binary(max_size=300)),
            st.tuples(st.just("size"), st.integers(0, 2**64 - 1)),
            st.tuples(
                st.just("number"), st.tuples(where, st.sampled_from(["-1", "0", "99999999999999999999", "1e9"]))
            ),
        )
    )


def harmed(raw: bytes, kind: str, how: Any) -> bytes:
    """`raw` after one kind of damage."""
    at = int((how[0] if isinstance(how, tuple) else how if isinstance(how, float) else 0) * len(raw))
    if kind == "flip" and raw:
        at = min(at, len(raw) - 1)
        return raw[:at] + bytes([raw[at] ^ how[1]]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + how[1] + raw[at:]
    if kind == "remove":
        return raw[:at] + raw[at + how[1] :]
    if kind == "zero":
        return raw[:at] + bytes(min(how[1], len(raw) - at)) + raw[at + how[1] :]
    if kind == "append":
        return raw + how
    if kind == "replace":
        return how
    if kind == "size":
        return how.to_bytes(8, "little") + raw[8:]
    digits = [i for i, byte in enumerate(raw) if chr(byte).isdigit()]
    if not digits:
        return raw
    place = digits[min(int(how[0] * len(digits)), len(digits) - 1)]
    return raw[:place] + how[1].encode() + raw[place + 1 :]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_bank_is_an_error_or_right(bank: tuple[Path, Any], data: st.DataObject) -> None:
    folder, wanted = bank
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bank"
        shutil.copytree(folder, copy)
        shards = sorted(copy.glob("*.safetensors"))
        for name, (kind, how) in data.draw(
            st.lists(st.tuples(st.sampled_from(NAMES), harm()), min_size=1, max_size=3)
        ):
            path = copy / name if name.endswith("json") else shards[int(name)]
            path.write_bytes(harmed(path.read_bytes(), kind, how))
        try:
            found = content(DemonstrationBank.from_pretrained(copy))
        except (BankDamaged, FileNotFoundError):
            pass
        else:
            assert found == wanted
        try:
            if data.draw(st.integers(0, 4)) == 0:  # a dear one
                used(DemonstrationBank.from_pretrained(copy, damaged="skip"))
            rest = content(DemonstrationBank.from_pretrained(copy, damaged="skip"))
        except (BankDamaged, FileNotFoundError):
            return
        assert all(one in wanted for one in rest)


def test_a_shard_without_its_manifest_vouches_for_itself(bank: tuple[Path, Any], tmp_path: Path) -> None:
    """Whichever byte of its header is another: the shard is left out, or right."""
    folder, wanted = bank
    shutil.copytree(folder, tmp_path / "bank")
    (tmp_path / "bank" / NAMES[0]).write_text("{")
    shard, other = sorted((tmp_path / "bank").glob("*.safetensors"))
    raw, refused = shard.read_bytes(), 0
    shard.write_bytes(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:])
    assert content(DemonstrationBank.from_pretrained(tmp_path / "bank", damaged="skip")) == wanted[3:]
    other.unlink()  # so that only what was damaged is opened, thousands of times
    for at in range(8 + int.from_bytes(raw[:8], "little")):
        shard.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            rest = content(DemonstrationBank.from_pretrained(tmp_path / "bank", damaged="skip"))
        except BankDamaged:
            refused += 1
        else:
            assert all(one in wanted for one in rest), f"byte {at} of {shard.name}"
    assert refused > 1000


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_edited_manifest_is_an_error_or_right(bank: tuple[Path, Any], data: st.DataObject) -> None:
    """Edited with its sha256 corrected, as somebody might who knows how."""
    folder, wanted = bank
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bank"
        shutil.copytree(folder, copy)
        manifest = json.loads((copy / "aim_bank.json").read_text())
        junk = st.one_of(st.none(), st.integers(-5, 2**70), st.text(max_size=5), st.lists(st.integers(), max_size=2))
        junk = st.one_of(junk, st.dictionaries(st.text(max_size=3), junk, max_size=2))
        if data.draw(st.booleans()):
            manifest[data.draw(st.sampled_from([k for k in manifest if k != "source"]))] = data.draw(junk)
        else:
            shard = manifest["shards"][data.draw(st.integers(0, 1))]
            shard[data.draw(st.sampled_from(sorted(shard)))] = data.draw(junk)
        manifest.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (copy / "aim_bank.json").write_text(json.dumps({**manifest, "sha256": digest}))
        try:
            found = content(DemonstrationBank.from_pretrained(copy))
        except (BankDamaged, FileNotFoundError):
            return
        assert found == wanted


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(demonstration_bank()._shards[0].columns)),
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.int32, torch.uint8, torch.float16, torch.float32, torch.bfloat16, torch.int64]),
    fill=st.integers(-1, 3),
)
def test_a_column_of_any_other_shape_or_type_is_refused(
    tmp_path: Path, name: str, shape: list[int], dtype: torch.dtype, fill: int
) -> None:
    """Written by somebody who corrects all digests, in a folder without a manifest."""
    shard = demonstration_bank()._shards[0]
    columns = {**shard.columns, name: torch.full(shape, fill % 256 if dtype == torch.uint8 else fill, dtype=dtype)}
    digests = {k: hashlib.sha256(as_bytes(v)).hexdigest() for k, v in columns.items()}
    about = {**shard.facts, "format": "aim_bank", "version": VERSION, "digests": digests}
    save_file(columns, tmp_path / "aim_bank-1.safetensors", metadata={"aim_bank": json.dumps(about)})
    if shape == list(shard.columns[name].shape) and dtype == shard.columns[name].dtype:
        return
    try:
        found = DemonstrationBank.from_pretrained(tmp_path, damaged="skip")
    except BankDamaged:
        return
    used(found)
    widths = {"vectors": found.width, **{f"feature.{kind}": width for kind, width in found.features.items()}}
    assert widths[name] == shape[1], "only widths may be others"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_content_of_a_stranger_is_an_error_or_used(data: st.DataObject) -> None:
    """Two shards of the right layout, with any values in any column and every digest right."""
    shards = []
    for number in range(2):
        shard = demonstration_bank()._shards[number]
        columns, about = shard.content, dict(shard.facts)
        for name in data.draw(st.lists(st.sampled_from(sorted(columns)), max_size=3, unique=True)):
            column = columns[name]
            if column.is_floating_point():
                value = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, 65_504.0, -1.0]))
            else:
                limits = torch.iinfo(column.dtype)
                value = data.draw(st.integers(limits.min, limits.max))
            columns[name] = column.clone()
            columns[name].view(-1)[data.draw(st.integers(0, column.numel() - 1))] = value
        change = data.draw(st.sampled_from(["", "", "drop", "narrow", "dtype", "source"]))
        if change == "drop":
            columns.pop(data.draw(st.sampled_from(["feature.image", "thumbnails", "has_question", "labels", "ids"])))
        elif change == "narrow":
            name = data.draw(st.sampled_from(["vectors", "feature.image", "feature.text"]))
            columns[name] = columns[name][:, : data.draw(st.integers(0, 3))]
        elif change == "dtype":
            about["dtype"] = data.draw(st.sampled_from(["float16", "bfloat16", "int64", 3, None]))
        elif change == "source":
            about["source"] = data.draw(st.sampled_from([{"backbone": "other"}, {"backbone": 1}, [], None, "tiny"]))
        shards.append((columns, about))
    with tempfile.TemporaryDirectory() as scratch:
        folder, listed = Path(scratch), []
        for number, (columns, about) in enumerate(shards, 1):
            try:
                shard = make_shard(columns, about)
            except (ValueError, LookupError, RuntimeError):  # no such shard can be made
                continue
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Shard, "check_finite", lambda self: None)
                listed.append(write_numbered(shard, folder, number))
        manifest = new_manifest({"backbone": "tiny", "read": "last"}, shards=listed, complete=True, duplicates=0)
        for complete in (True, False):
            write_manifest(folder, {**manifest, "complete": complete})
            for damaged in ("raise", "skip"):
                try:
                    bank = DemonstrationBank.from_pretrained(folder, damaged=damaged)
                except (ValueError, OSError):
                    continue
                used(bank)
        (folder / "aim_bank.json").unlink()
        with suppress(ValueError, OSError):
            used(DemonstrationBank.from_pretrained(folder, damaged="skip"))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_parts_of_a_build_are_an_error_or_right(data: st.DataObject) -> None:
    """A build that was stopped: what is whole is opened, in order, and nothing else."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, shards = Path(scratch), demonstration_bank()._shards
        wanted = content(demonstration_bank())
        manifest = new_manifest(dict(shards[0].about["source"]), shards=[], complete=False, duplicates=0)
        write_manifest(folder, manifest)
        (folder / PARTS_FOLDER).mkdir()
        for number, shard in enumerate(shards):
            part_path(folder, number).write_bytes(shard_content(shard)[0])
        assert content(DemonstrationBank.from_pretrained(folder)) == wanted
        for _ in range(data.draw(st.integers(1, 2))):
            path = part_path(folder, data.draw(st.integers(0, 1)))
            kind, how = data.draw(harm())
            path.write_bytes(harmed(path.read_bytes(), kind, how))
        bank = DemonstrationBank.from_pretrained(folder)
        found = content(bank) if len(bank) else []
        assert found == wanted[: len(found)]
        used(bank)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), max_size=6),
    width=st.integers(1, 5),
    storage=st.sampled_from(["auto", "bfloat16", "float16", "int8"]),
    size=st.integers(1, 400),
    words=st.text(max_size=8),
)
def test_any_bank_is_the_same_after_a_round_trip(
    lengths: list[int], width: int, storage: str, size: int, words: str
) -> None:
    words = words.encode("utf-8", "ignore").decode()
    vectors = torch.randn(sum(lengths), width).round(decimals=1)
    texts = tuple(f"{words}{i}" for i in range(len(lengths)))
    keys, ids = tuple(f"{i:064x}" for i in range(len(lengths))), torch.randint(0, 2**31 - 1, (sum(lengths),))
    fused = FusedDemonstrations(vectors, tuple(lengths), ids, keys, texts)
    with tempfile.TemporaryDirectory() as folder:
        DemonstrationBank(fused).save_pretrained(folder, storage=storage, shard_bytes=size)
        found = DemonstrationBank.from_pretrained(folder)
        found.verify()
        assert (found.fused.lengths, found.fused.keys, found.fused.texts) == (fused.lengths, fused.keys, texts)
        torch.testing.assert_close(found.fused.vectors.float(), vectors, rtol=0.01, atol=0.04)
        assert list(found.fused.vectors.shape) == list(vectors.shape) and torch.equal(found.fused.ids, ids)
