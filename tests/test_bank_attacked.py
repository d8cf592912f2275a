"""Banks under attack: two writers, values that are not finite, bad rows, links, pictures and labels of a stranger."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import stat
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, picture, plugin
from hub_server import HubServer
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from modeling_aim import DemonstrationBank, FusedDemonstrations
from modeling_aim.bank import build, shard_files
from modeling_aim.bank.manifest import (
    BANK_MANIFEST,
    PARTS_FOLDER,
    new_manifest,
    read_manifest,
    write_manifest,
)
from modeling_aim.bank.pictures import MAX_PIXELS, open_thumbnail, thumbnail
from modeling_aim.bank.shards import FORMAT, VERSION, Shard
from modeling_aim.cli.main import app
from modeling_aim.cli.terminal import safe
from modeling_aim.demonstrations_aim import Demonstration

TEXTS = [{"text": f"the thing number {number} lies here."} for number in range(12)]
OPTIONS: dict[str, Any] = {"batch_size": 2, "shard_bytes": 8_000}


def fused(*values: float, dtype: torch.dtype = torch.float32) -> FusedDemonstrations:
    """One demonstration for each value, of a token with that value in it."""
    vectors = torch.ones(len(values), 4, dtype=dtype)
    vectors[:, 1] = torch.tensor(values)
    return FusedDemonstrations(vectors, (1,) * len(values), torch.arange(len(values)), source={"backbone": "tiny"})


# --- one writer at a time


@pytest.mark.parametrize("what", ["save", "reproject", "build"])
def test_nobody_writes_where_somebody_else_writes(llava: Plugin, tmp_path: Path, listing: Any, what: str) -> None:
    kept = DemonstrationBank.build(llava.model, TEXTS[:3], tmp_path / "kept", keep_states=True, **OPTIONS)
    begun: list[Any] = []

    def stream() -> Iterator[Any]:
        yield from TEXTS[:5]
        before = listing(tmp_path / "bank")
        with pytest.raises(ValueError, match="Another process is writing a bank in"):
            {
                "save": lambda: kept.save_pretrained(tmp_path / "bank"),
                "reproject": lambda: kept.reproject(llava.model, tmp_path / "bank"),
                "build": lambda: DemonstrationBank.build(llava.model, TEXTS, tmp_path / "bank", **OPTIONS),
            }[what]()
        assert listing(tmp_path / "bank") == before
        begun.append(before)
        yield from TEXTS[5:]

    bank = DemonstrationBank.build(llava.model, stream(), tmp_path / "bank", **OPTIONS)
    assert begun and len(bank) == len(TEXTS)
    bank.verify()
    whole = DemonstrationBank.build(llava.model, TEXTS, tmp_path / "whole", **OPTIONS)
    assert listing(tmp_path / "bank") == listing(tmp_path / "whole") and bank.keys() == whole.keys()


def test_of_many_savers_one_at_a_time_gets_in(tmp_path: Path) -> None:
    banks = [DemonstrationBank(fused(*range(1, count + 1))) for count in (3, 5, 8)]
    start, refused = threading.Barrier(len(banks)), []

    def keep(bank: DemonstrationBank) -> None:
        start.wait()
        for _ in range(20):
            try:
                bank.save_pretrained(tmp_path, shard_bytes=1)
            except Exception as error:
                refused.append(repr(error))

    threads = [threading.Thread(target=keep, args=(bank,)) for bank in banks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("ValueError(" in error and "Another process is writing" in error for error in refused), refused
    bank = DemonstrationBank.from_pretrained(tmp_path)
    bank.verify()
    assert len(bank) in (3, 5, 8) and torch.equal(bank.fused.vectors, banks[(3, 5, 8).index(len(bank))].fused.vectors)
    listed = {one["file"] for one in read_manifest(tmp_path / BANK_MANIFEST)["shards"]}
    assert {path.name for path in tmp_path.iterdir()} == listed | {BANK_MANIFEST, "README.md"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(llava: Plugin, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        DemonstrationBank.build(llava.model, TEXTS[:3], tmp_path / "built", **OPTIONS).save_pretrained(
            tmp_path / "kept"
        )
        llava.model.read(TEXTS[:2]).save_pretrained(tmp_path / "fused")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


# --- values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    bank = DemonstrationBank(fused(1.0, value, 2.0))
    for storage in ("auto", "bfloat16", "float16", "int8"):
        with pytest.raises(ValueError, match=r"not finite|hold NaN or infinite"):
            bank.save_pretrained(tmp_path / "bank", storage=storage)
    assert not (tmp_path / "bank" / BANK_MANIFEST).exists()
    with pytest.raises(ValueError, match="hold NaN or infinite"):
        bank.verify()


def test_what_a_precision_cannot_hold_is_refused_with_the_way_out(tmp_path: Path) -> None:
    large = DemonstrationBank(fused(1.0, 70_000.0))
    with pytest.raises(ValueError, match=r"reach 7e\+04, but float16 holds no more than 6\.55e\+04.*bfloat16"):
        large.save_pretrained(tmp_path, storage="float16")
    for storage in ("bfloat16", "int8", "float32"):
        large.save_pretrained(tmp_path, storage=storage)
        assert float(DemonstrationBank.from_pretrained(tmp_path).fused.vectors.max()) == pytest.approx(
            70_000, rel=0.01
        )
    largest = DemonstrationBank(fused(65_504.0, dtype=torch.float16))
    largest.save_pretrained(tmp_path, storage="int8")
    assert float(DemonstrationBank.from_pretrained(tmp_path).fused.vectors.max()) == 65_504.0


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_build_that_overflows_is_refused(tmp_path: Path, storage: str) -> None:
    aim = plugin("llava")
    aim.model.to(torch.float16)
    with torch.no_grad():
        aim.model.projector.float().layers[-1].weight.mul_(1e6)
    with pytest.raises(ValueError, match="float16 holds no more than"):
        DemonstrationBank.build(aim.model, TEXTS, tmp_path / "bank", storage=storage, **OPTIONS)


def test_a_projector_of_nan_builds_no_bank(tmp_path: Path) -> None:
    aim = plugin("llava")
    with torch.no_grad():
        aim.model.projector.layers[-1].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"All 12 rows are bad; row 0: Its fused tokens are not finite"):
        DemonstrationBank.build(aim.model, TEXTS, tmp_path / "bank", **OPTIONS)


def planted(folder: Path, column: str, value: float) -> None:
    """Write a bank again with one value changed and every digest right, as a stranger or an older release may have."""
    bank = DemonstrationBank.from_pretrained(folder)
    columns = {name: part.clone() for name, part in bank._shards[0].content.items()}
    columns[column].view(-1)[1] = value
    shard = build.make_shard(columns, bank._shards[0].facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "check_finite", lambda self: None)
        payload, listed = shard_files.shard_content(shard)
    listed["file"] = "aim_bank-00001-00000000.safetensors"
    (folder / listed["file"]).write_bytes(payload)
    write_manifest(folder, new_manifest(bank.source, shards=[listed], complete=True, duplicates=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["vectors", "feature.image", "scales"])
def test_a_bank_with_one_bad_value_decides_nothing(llava: Plugin, tmp_path: Path, column: str, value: float) -> None:
    demos = [{"image": picture(seed), "text": f"the thing number {seed} lies here."} for seed in range(4)]
    DemonstrationBank.build(llava.model, demos, tmp_path, storage="int8" if column == "scales" else "auto")
    planted(tmp_path, column, value)
    bank = DemonstrationBank.from_pretrained(tmp_path, llava.model)
    with pytest.raises(ValueError, match=f"{column} of aim_bank-00001.* hold NaN or infinite"):
        bank.verify()
    with pytest.raises(ValueError, match="hold NaN or infinite"):
        bank.save_pretrained(tmp_path / "copy")
    if column == "feature.image":
        for by in ("image", "mmices"):
            with pytest.raises(ValueError, match=r"image features of .* are not finite"):
                bank.choose((picture(1), "What is this?"), 2, by=by)
        assert len(bank.choose(k=2, near_duplicate=None)) == 2 and len(bank.choose(k=1)) == 1
        assert torch.isfinite(bank.fused.vectors).all()
    else:
        with pytest.raises(ValueError, match=r"Fused tokens of demonstration 0 of .* not finite"):
            bank[0]  # the value lies in the first demonstration
        with pytest.raises(ValueError, match=r"Fused tokens of demonstration 0 of .* not finite"):
            llava.answer(llava.query(), bank)
        assert len(bank[1:]) == 3


def test_a_query_that_is_not_finite_chooses_nothing(llava: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank.build(llava.model, DEMOS, tmp_path)
    width = bank.feature_width("image")
    for query in (torch.full((width,), torch.nan), torch.ones(width + 1), torch.ones(1, width)):
        with pytest.raises(ValueError, match=rf"compares image features of the shape \({width},\), all finite"):
            bank.choose({"image": query}, 2, by="image")
    with pytest.raises(ValueError, match="compares image features"):
        bank.choose({"text": torch.ones(width)}, 2, by="image")
    inputs = llava.query()
    inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
    with pytest.raises(ValueError, match="features of the queries are not finite"):
        llava.answer(inputs, bank, shots=2, select="image")


# --- bad rows


BAD = {
    "no text": {"image": picture(1)},
    "no image": ("missing.png", "a dax"),
    "a lone surrogate": {"text": "a dax \ud800 lies here."},
    "no demonstration": 7,
    "a placeholder": {"text": "a <image> of a dax lies here."},
    "too long": {"text": "a dax lies here and there. " * 400},
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_row_is_named_counted_and_left_out(llava: Plugin, tmp_path: Path, kind: str, at: int) -> None:
    rows: list[Any] = [*TEXTS[:at], BAD[kind], *TEXTS[at:]]
    bank = DemonstrationBank.build(llava.model, iter(rows), tmp_path / "bank", **OPTIONS)
    assert [row.number for row in bank.bad_rows] == [at] and bank.bad_rows[0].reason
    assert bank.texts() == [row["text"] for row in TEXTS]
    assert not (tmp_path / "bank" / PARTS_FOLDER).exists()
    again = DemonstrationBank.build(llava.model, iter(rows), tmp_path / "bank", **OPTIONS)
    assert [row.number for row in again.bad_rows] == [at] and again.keys() == bank.keys()
    with pytest.raises(ValueError, match=f"Row {at}: .*What came before it is kept in the bank"):
        DemonstrationBank.build(llava.model, iter(rows), tmp_path / "raise", on_bad_row="raise", **OPTIONS)
    with pytest.raises(ValueError, match=f"1 rows are bad, more than max_bad_rows=0; the last is row {at}"):
        DemonstrationBank.build(llava.model, iter(rows), tmp_path / "none", max_bad_rows=0, **OPTIONS)
    if at:
        assert DemonstrationBank.from_pretrained(tmp_path / "none").texts() == [row["text"] for row in TEXTS[:2]]


def test_rows_that_are_all_bad_are_an_error(llava: Plugin, tmp_path: Path) -> None:
    rows = [{"img": "a.png", "kind": "dax"}] * 3
    with pytest.raises(ValueError, match="All 3 rows are bad; row 0: It has no column 'label'"):
        DemonstrationBank.build(llava.model, rows, tmp_path, columns={"label": "label"})
    with pytest.raises(ValueError, match="on_bad_row='ignore': expected one of skip, raise"):
        DemonstrationBank.build(llava.model, rows, tmp_path, on_bad_row="ignore")
    for wrong in ({"batch_size": 2.5}, {"thumbnails": "96"}, {"shard_bytes": 0}, {"max_bad_rows": -1}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"{name}=.*: expected a whole number"):
            DemonstrationBank.build(llava.model, TEXTS, tmp_path, **wrong)


def test_a_build_with_bad_rows_that_is_stopped_ends_in_the_same_files(tmp_path: Path, listing: Any) -> None:
    """A bad row within a batch changes what is read together; resumed after any part, the batches are the same."""
    rows: list[Any] = [*TEXTS[:3], BAD["too long"], *TEXTS[3:6], BAD["no text"], {"text": "b " * 3000}, *TEXTS[6:]]
    aim = plugin("llava")
    options = {"batch_size": 3, "shard_bytes": 8_000}
    whole = DemonstrationBank.build(aim.model, rows, tmp_path / "whole", **options)
    assert [row.number for row in whole.bad_rows] == [3, 7, 8] and len(whole) == len(TEXTS)

    class Stopped(BaseException):
        pass

    write_whole = build.write_whole
    for stop in (1, 2, 4, 5):
        folder, written = tmp_path / f"stopped{stop}", 0

        def counted(path: Path, payload: bytes, stop: int = stop) -> None:
            nonlocal written
            written += path.name.startswith("part-")
            if written == stop:
                raise Stopped
            write_whole(path, payload)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "write_whole", counted)
            try:
                DemonstrationBank.build(aim.model, rows, folder, **options)
            except Stopped:
                found = DemonstrationBank.from_pretrained(folder)
                assert found.texts() == whole.texts()[: len(found)], "what was read before it was stopped"
                assert len(found) == 0 if stop == 1 else len(found) >= 2
        bank = DemonstrationBank.build(aim.model, rows, folder, **options)
        assert listing(folder) == listing(tmp_path / "whole")
        assert [row.number for row in bank.bad_rows] == [3, 7, 8]


def test_a_bank_whose_extension_is_stopped_opens_with_both(tmp_path: Path, llava: Plugin, hub: HubServer) -> None:
    def broken() -> Iterator[Any]:
        yield from TEXTS[:9]
        raise RuntimeError("the stream broke")

    DemonstrationBank.build(llava.model, TEXTS[:4], tmp_path, batch_size=2)
    with pytest.raises(RuntimeError, match="the stream broke"):
        DemonstrationBank.build(llava.model, broken(), tmp_path, batch_size=2)
    bank = DemonstrationBank.from_pretrained(tmp_path, llava.model)
    assert bank.texts() == [row["text"] for row in TEXTS[:8]]
    bank.verify()
    assert llava.answer(llava.query(), bank[6:]).shape == (1, 6)
    bank.push_to_hub("user/unfinished", token=hub.token)  # pushed as it is open, parts and all
    assert DemonstrationBank.from_pretrained("user/unfinished", token=hub.token).keys() == bank.keys()
    bank.save_pretrained(tmp_path)
    assert not (tmp_path / PARTS_FOLDER).exists()
    assert DemonstrationBank.from_pretrained(tmp_path).keys() == bank.keys()


# --- links


@pytest.mark.parametrize("kind", ["folder", "file", "nowhere"])
def test_a_parts_folder_that_is_a_link_is_refused(llava: Plugin, tmp_path: Path, listing: Any, kind: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "part-0000000.safetensors").write_bytes(b"precious")
    (theirs / ".writing-1").write_bytes(b"precious")
    target = {"folder": theirs, "file": theirs / ".writing-1", "nowhere": tmp_path / "nowhere"}[kind]
    bank = DemonstrationBank.build(llava.model, TEXTS[:3], tmp_path / "bank", **OPTIONS)
    (tmp_path / "bank" / PARTS_FOLDER).symlink_to(target)
    before = listing(theirs)
    with pytest.raises(ValueError, match="is a link or a file, not the folder of a build"):
        DemonstrationBank.build(llava.model, TEXTS, tmp_path / "bank", **OPTIONS)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / PARTS_FOLDER).symlink_to(target)
    with pytest.raises(ValueError, match="is a link or a file"):
        DemonstrationBank.build(llava.model, TEXTS, tmp_path / "new", **OPTIONS)
    bank.save_pretrained(tmp_path / "bank")
    assert listing(theirs) == before and not (tmp_path / "nowhere").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_nothing_is_pushed_through_a_link(hub: HubServer, llava: Plugin, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the password is 1234")
    bank = DemonstrationBank.build(llava.model, TEXTS[:3], tmp_path / "bank", **OPTIONS)
    (tmp_path / "bank" / "README.md").unlink()
    (tmp_path / "bank" / "README.md").symlink_to(tmp_path / "secret")
    bank.push_to_hub("user/links", token=hub.token)
    card = Path(HfApi(token=hub.token).hf_hub_download("user/links", "README.md", local_dir=tmp_path / "down"))
    assert "3 demonstrations" in card.read_text() and "password" not in card.read_text()
    again = DemonstrationBank.from_pretrained("user/links", llava.model, token=hub.token)  # in the cache as links
    again.push_to_hub("user/again", token=hub.token)
    assert DemonstrationBank.from_pretrained("user/again", token=hub.token).keys() == bank.keys()


def test_a_manifest_names_nothing_but_shards(llava: Plugin, tmp_path: Path) -> None:
    DemonstrationBank.build(llava.model, TEXTS[:3], tmp_path / "bank")
    manifest = read_manifest(tmp_path / "bank" / BANK_MANIFEST)
    for name in ("*", "README.md", "[a-z]*", "../secret", "aim_bank-1\x1b[2J.safetensors", ".aim_bank_parts"):
        write_manifest(tmp_path / "bank", {**manifest, "shards": [{**manifest["shards"][0], "file": name}]})
        with pytest.raises(ValueError, match="is not a manifest of a demonstration bank"):
            DemonstrationBank.from_pretrained(tmp_path / "bank")


def test_a_manifest_is_read_in_linear_time(tmp_path: Path) -> None:
    one = {"bytes": 1, "sha256": "0" * 64, "header_sha256": "0" * 64, "demonstrations": 1, "tokens": 1}
    shards = [{**one, "file": f"aim_bank-{number:05d}-00000000.safetensors"} for number in range(40_000)]
    write_manifest(tmp_path, new_manifest({}, shards=shards, complete=True, duplicates=0))
    start = time.process_time()
    assert len(read_manifest(tmp_path / BANK_MANIFEST)["shards"]) == 40_000
    assert time.process_time() - start < 4, "comparing each name with each other takes a dozen seconds"


# --- pictures and labels of a stranger


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_only_small_jpegs_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: decoded.append("Ghostscript"))
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: [decoded.append(self.size), load(self)][1])
    small = thumbnail(Demonstration.of((picture(1, (400, 200)), "a dax")), 96)
    decoded.clear()
    assert open_thumbnail(small).size == (96, 48)
    side = int(MAX_PIXELS**0.5) + 1
    huge = encoded(Image.new("RGB", (side, side)), "JPEG")
    eps, png = encoded(picture(1), "EPS"), encoded(picture(1), "PNG")
    decoded.clear()
    for content in (eps, png, huge, b"", b"not a picture"):
        with pytest.raises(ValueError, match="not a small JPEG"):
            open_thumbnail(content)
    assert not decoded, "something was decoded before it was refused"
    with pytest.raises(ValueError, match="not a small JPEG"):
        open_thumbnail(small[: len(small) // 2])


LABEL = "dax\x1b[31m\x9b2J\u202e \U000e0041\x7f"


def test_what_a_bank_says_reaches_no_terminal_unread(tmp_path: Path) -> None:
    aim = plugin("llava")
    aim.model.save_pretrained(tmp_path / "repo", include_backbone=True)
    demos = [{"image": picture(seed), "label": LABEL if seed else "wug"} for seed in range(2)]
    bank = DemonstrationBank.build(aim.model, demos, tmp_path / "bank")
    assert LABEL in bank.labels()
    picture(1).save(tmp_path / "query.png")
    place = [str(tmp_path / "bank")]
    query = [*place, "--repo", str(tmp_path / "repo"), "--image", str(tmp_path / "query.png"), "--shots", "2"]
    for command in (
        ["inspect", *place],
        ["inspect", *place, "--json"],
        ["select", *query],
        ["select", *query, "--json"],
    ):
        done = CliRunner().invoke(app, ["bank", *command], env={"COLUMNS": "400", "TERM": "dumb"})
        assert done.exit_code == 0, done.output
        assert not set(done.output) & set("\x1b\x9b\u202e\U000e0041\x7f"), f"{command}: {done.output!r}"
        assert re.search(r"dax\\(u00|x)1b\[31m\\(u00|x)9b2J\\u202e", done.output)
        if "--json" in command:
            found = json.loads(done.output)
            assert LABEL in (found["labels"] if command[0] == "inspect" else [row["label"] for row in found])
    assert safe("Straße 日本 \u200d\n ok") == "Straße 日本 \u200d\n ok"


# --- arguments, copies


def test_numbers_that_are_not_whole_are_refused(llava: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank.build(llava.model, DEMOS, tmp_path)
    inputs = llava.query()
    for shots in (2.5, 2.0, "2", True, float("nan")):
        for call in (
            lambda shots=shots: llava.answer(inputs, bank, shots=shots),
            lambda shots=shots: llava.answer(inputs, bank, shots=shots, select="image"),
            lambda shots=shots: bank.choose(picture(1), shots, by="image"),
            lambda shots=shots: bank.select(k=shots),
        ):
            with pytest.raises(ValueError, match="demonstrations were asked for; expected a whole number"):
                call()
    for options, message in (
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"near_duplicate": "0.9"}, "near_duplicate='0.9': expected a cosine"),
        ({"near_duplicate": float("nan")}, "near_duplicate=nan: expected a cosine"),
        ({"by": [0, 1.5]}, "by lists 1.5; expected numbers or keys"),
        ({"by": [0, None]}, "by lists None; expected numbers or keys"),
        ({"by": b"ab"}, "by=b'ab': expected one of"),
        ({"by": {"by": "image"}}, "by=.*: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.choose(k=2, **options)
    assert len(bank.choose(k=torch.tensor(2), by=torch.tensor([3, 0]))) == 2


def test_a_bank_can_be_copied_and_pickled(llava: Plugin, tmp_path: Path) -> None:
    opened = DemonstrationBank.build(llava.model, DEMOS, tmp_path / "bank", **OPTIONS)
    for bank in (opened, DemonstrationBank(llava.model.read(DEMOS))):
        bank.choose(k=2)
        for copy in (pickle.loads(pickle.dumps(bank)), deepcopy(bank)):
            assert torch.equal(copy.fused.vectors, bank.fused.vectors) and copy.keys() == bank.keys()
            assert copy.model is None and copy.choose(k=3) == bank.choose(k=3)
    stale = pickle.dumps(opened)
    DemonstrationBank(llava.model.read(DEMOS[:1])).save_pretrained(tmp_path / "bank")
    with pytest.raises(ValueError, match="is missing"):
        pickle.loads(stale)


def test_a_stranger_who_corrects_every_digest_ends_in_our_error(tmp_path: Path) -> None:
    """What a shard says of itself is checked before it is used."""
    DemonstrationBank(fused(1.0, 2.0)).save_pretrained(tmp_path / "bank")
    columns = dict(DemonstrationBank.from_pretrained(tmp_path / "bank")._shards[0].columns)
    digests = {k: hashlib.sha256(shard_files.as_bytes(v)).hexdigest() for k, v in columns.items()}
    base = {
        "source": {"backbone": "tiny"},
        "dtype": "float32",
        "format": FORMAT,
        "version": VERSION,
        "digests": digests,
    }
    for wrong in ({"source": ["backbone"]}, {"source": {"backbone": 1}}, {"source": None}, {"unreadable": [1]}):
        about = {**base, **wrong}
        about["about_sha256"] = shard_files._seal(about, columns)
        (tmp_path / "bank" / "aim_bank-9.safetensors").write_bytes(save(columns, {FORMAT: json.dumps(about)}))
        with pytest.raises(ValueError, match="not a shard of a demonstration bank"):
            shard_files.open_shard(tmp_path / "bank" / "aim_bank-9.safetensors")
