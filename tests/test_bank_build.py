"""Building a bank: streamed, each content once, killed at counted events, on a full disk, from datasets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from backbones import Plugin, picture, plugin
from killed_builds import MANY, OPTIONS, UNIQUE, KilledBuilds

from modeling_aim import DemonstrationBank
from modeling_aim.bank.manifest import BANK_MANIFEST, PARTS_FOLDER, only_writer, read_manifest
from modeling_aim.bank.rows import open_rows


def reads(aim: Plugin) -> list[int]:
    """How many demonstrations each reading of the plug-in takes from now on."""
    found: list[int] = []
    read = aim.model.read_fully

    def counted(demos: Any, features: bool = True) -> Any:
        found.append(len(demos))
        return read(demos, features)

    aim.model.read_fully = counted  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank built in one go."""
    folder = tmp_path_factory.mktemp("whole") / "bank"
    DemonstrationBank.build(plugin("llava").model, MANY, folder, **OPTIONS)
    return folder


def test_equal_contents_are_read_once_and_counted(whole: Path, tmp_path: Path, listing: Any) -> None:
    aim = plugin("llava")
    counted = reads(aim)
    bank = DemonstrationBank.build(aim.model, iter(MANY), tmp_path / "bank", **OPTIONS)
    assert len(bank) == sum(counted) == UNIQUE and max(counted) == 2
    assert bank.duplicates == len(MANY) - UNIQUE == 3
    assert len(bank._shards) > 3 and not (tmp_path / "bank" / PARTS_FOLDER).exists()
    assert listing(tmp_path / "bank") == listing(whole)
    assert DemonstrationBank.build(aim.model, MANY, tmp_path / "bank", **OPTIONS).duplicates == 3
    assert sum(counted) == UNIQUE and listing(tmp_path / "bank") == listing(whole)


def test_more_demonstrations_are_added(tmp_path: Path) -> None:
    aim = plugin("llava")
    first = DemonstrationBank.build(aim.model, MANY[:5], tmp_path, **OPTIONS)
    vectors = first.fused.vectors.clone()
    counted = reads(aim)
    bank = DemonstrationBank.build(aim.model, MANY[:9], tmp_path, **OPTIONS)
    assert len(bank) == 9 and sum(counted) == 4
    assert torch.equal(bank[:5].vectors, vectors)


@pytest.mark.timeout(900)
def test_killed_at_counted_events_it_ends_in_the_same_files(whole: Path, tmp_path: Path, listing: Any) -> None:
    with KilledBuilds() as builds:
        for attempt, events in enumerate(([1, 2, 3, 4, 5], [9, 8, 7, 6], [21, 34, 13])):
            folder, log = tmp_path / f"bank{attempt}", tmp_path / f"log{attempt}"
            for event in events:
                assert builds.killed(folder, log, event), f"the build has fewer than {event} events left"
                if (folder / BANK_MANIFEST).exists() and read_manifest(folder / BANK_MANIFEST)["shards"]:
                    assert len(DemonstrationBank.from_pretrained(folder)) > 0  # what is in shards can be used
            aim = plugin("llava")
            counted = reads(aim)
            DemonstrationBank.build(aim.model, MANY, folder, **OPTIONS)
            assert listing(folder) == listing(whole)
            read = sum(map(int, log.read_text().split())) if log.exists() else 0
            assert read + sum(counted) <= UNIQUE + 2 * len(events)  # at most the batch in work is read again


def test_a_damaged_part_is_read_again(whole: Path, tmp_path: Path, listing: Any) -> None:
    def until_broken() -> Iterator[Any]:
        yield from MANY[:9]
        raise RuntimeError("the stream broke")

    aim = plugin("llava")
    with pytest.raises(RuntimeError, match="the stream broke"):
        DemonstrationBank.build(aim.model, until_broken(), tmp_path / "bank", **{**OPTIONS, "shard_bytes": 10**9})
    parts = sorted((tmp_path / "bank" / PARTS_FOLDER).iterdir())
    assert len(parts) == 4
    parts[1].write_bytes(parts[1].read_bytes()[:-7])
    bank = DemonstrationBank.from_pretrained(tmp_path / "bank")
    assert bank.texts() == [text for _, text in MANY[:2]]  # what lies before the damage
    counted = reads(aim)
    DemonstrationBank.build(aim.model, MANY, tmp_path / "bank", **OPTIONS)
    assert sum(counted) == UNIQUE - 2
    assert listing(tmp_path / "bank").keys() == listing(whole).keys()
    assert listing(tmp_path / "bank") == listing(whole)


def test_a_bad_demonstration_is_named_and_what_came_before_is_kept(tmp_path: Path, llava: Plugin) -> None:
    wrong = [*MANY[:5], (tmp_path / "missing.png", "a dax"), *MANY[5:]]
    with pytest.raises(ValueError, match=r"Row 5: Cannot read the image .*missing\.png.* kept in the bank"):
        DemonstrationBank.build(llava.model, wrong, tmp_path / "bank", **OPTIONS, on_bad_row="raise")
    with pytest.raises(ValueError, match=r"Row 0: .*\('a dax'\) has None for its image"):
        lost = [{"image": None, "label": "a dax"}]
        DemonstrationBank.build(llava.model, lost, tmp_path / "lost", **OPTIONS, on_bad_row="raise")
    aim = plugin("llava")
    counted = reads(aim)
    assert len(DemonstrationBank.build(aim.model, MANY[:6], tmp_path / "bank", **OPTIONS)) == 6
    assert sum(counted) == 2
    for wrong_setting, message in (
        ({"storage": "int4"}, "storage='int4': expected one of auto"),
        ({"batch_size": 0}, "batch_size=0: expected a whole number, 1 or more"),
        ({"thumbnails": -1}, "thumbnails=-1: expected a whole number, 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            DemonstrationBank.build(llava.model, MANY[:3], tmp_path / "none", **wrong_setting)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"built from a stream of demonstrations; got 'demos.*json\.loads"):
        DemonstrationBank.build(llava.model, "demos.jsonl", tmp_path / "other")


def test_a_full_disk_keeps_what_was_read(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from backbones import plugin
from test_bank_build import MANY, OPTIONS, DemonstrationBank
aim = plugin("llava")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit is then an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # parts are smaller, shards larger
try:
    DemonstrationBank.build(aim.model, MANY, sys.argv[1], **OPTIONS)
except OSError as error:
    print("refused", error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bank"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "demonstrations are safe there; make room" in done.stdout, done.stdout + done.stderr[-2000:]
    aim = plugin("llava")
    counted = reads(aim)
    assert len(DemonstrationBank.build(aim.model, MANY, tmp_path / "bank", **OPTIONS)) == UNIQUE
    assert sum(counted) < UNIQUE - 4


def test_a_bank_begun_otherwise_is_not_mixed(tmp_path: Path, listing: Any) -> None:
    aim = plugin("llava")
    DemonstrationBank.build(aim.model, MANY[:3], tmp_path, **OPTIONS)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"begun with storage 'float32' \(now: 'int8'\)"):
        DemonstrationBank.build(aim.model, MANY, tmp_path, **OPTIONS, storage="int8")
    with pytest.raises(ValueError, match=r"begun with .*projector "):
        DemonstrationBank.build(plugin("llava", projector_form="mlp").model, MANY, tmp_path, **OPTIONS)
    (tmp_path / BANK_MANIFEST).rename(tmp_path.parent / "manifest")
    with pytest.raises(ValueError, match=r"holds shards of a bank but no aim_bank\.json"):
        DemonstrationBank.build(aim.model, MANY, tmp_path, **OPTIONS)
    (tmp_path.parent / "manifest").rename(tmp_path / BANK_MANIFEST)
    assert listing(tmp_path) == before


def test_two_processes_do_not_build_the_same_bank(tmp_path: Path, llava: Plugin) -> None:
    with only_writer(tmp_path), pytest.raises(ValueError, match="Another process is writing a bank in"):
        DemonstrationBank.build(llava.model, MANY[:3], tmp_path)
    assert len(DemonstrationBank.build(llava.model, MANY[:3], tmp_path)) == 3


def test_columns_name_the_parts_of_a_demonstration(llava: Plugin, tmp_path: Path) -> None:
    rows = [{"img": picture(seed), "kind": name, "split": "train"} for seed, name in enumerate(("dax", "wug"))]
    bank = DemonstrationBank.build(llava.model, rows, tmp_path, columns={"image": "img", "label": "kind"})
    assert bank.labels() == ["dax", "wug"] and bank.texts() == ["This is dax.", "This is wug."]
    with pytest.raises(ValueError, match=r"Row 0: It has no column 'image'; it has \['img', 'kind', 'split'\]"):
        list(open_rows(rows, {"image": "image"}))
    with pytest.raises(
        ValueError, match=r"Row 0: A demonstration has no words.*\{'image': 'img'\} were taken; columns="
    ):
        list(open_rows(rows, {"image": "img"}))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_datasets_data_set(llava: Plugin, tmp_path: Path, streamed: bool) -> None:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["dax", "wug"]), number=datasets.Value("int32")
    )
    rows = {"image": [picture(0), picture(1), picture(2)], "label": [0, 1, 0], "number": [1, 2, 3]}
    data = datasets.Dataset.from_dict(rows, features=features)
    bank = DemonstrationBank.build(llava.model, data.to_iterable_dataset() if streamed else data, tmp_path)
    assert bank.labels() == ["dax", "wug", "dax"]
    with pytest.raises(ValueError, match=r"has the columns \['img', 'kind', 'number'\], none of .*columns="):
        list(open_rows(data.rename_columns({"image": "img", "label": "kind"}), None))
