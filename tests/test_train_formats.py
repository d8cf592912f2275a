"""Datasets in the layouts that their own scripts and archives leave: what is read, and what is refused with advice.

Layouts: allenai/mmc4 scripts/download_images.py, mlfoundations/open_flamingo scripts/convert_mmc4_to_wds.py, and
rom1504/img2dataset writer.py; COCO, Karpathy and Flickr30k as their archives are unpacked.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from eval_data import MAKERS, everything
from pyarrow import parquet
from test_train_data import MISSING, contents, lines, page, png, save, turns

from modeling_aim.data import layouts
from modeling_aim.data.images import Encoded, is_image
from modeling_aim.evaluation.tasks.registry import open_task
from modeling_aim.training.interleaved import Mmc4, Obelics
from modeling_aim.training.sources import Pairs, open_source


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def found_in(source: Any) -> list[list[Any]]:
    return [one for one in contents(source) if one]


# --- MMC4


def shard_page(number: int) -> dict[str, Any]:
    """A document of a shard with images of its own."""
    return page("ab", (f"s{number}a.png", 0, 0.9), (f"s{number}b.png", 1, 0.9))


def pair_of_shard(first: int) -> list[Any]:
    return [((first,), "a", None), ((first + 1,), "b", None)]


@pytest.mark.parametrize("shift", [0, -5, 3])
def test_mmc4_images_in_a_folder_for_each_place_in_the_list(tmp_path: Path, shift: int) -> None:
    """`--input_shards` numbers its folders by the place in the list, so shard 7 may lie in folder 2."""
    for number in (5, 7, 10):
        lines(tmp_path / "docs" / f"docs_no_face_shard_{number}_v2.jsonl", [shard_page(number)])
        folder = tmp_path / "images" / str(number + shift)
        save(folder, [f"s{number}a.png", f"s{number}b.png"])
    source = Mmc4(str(tmp_path / "docs"), images=str(tmp_path / "images"))
    assert contents(source) == [pair_of_shard(0)] * 3 and not source.skipped
    shutil.rmtree(tmp_path / "images" / str(7 + shift))  # one was not fetched: nobody else's images are taken for it
    assert sorted(map(len, contents(Mmc4(str(tmp_path / "docs"), images=str(tmp_path / "images"))))) == [0, 2, 2]


def test_mmc4_images_in_a_folder_named_by_the_shard(tmp_path: Path) -> None:
    for number, ending in enumerate(("", ".jsonl")):  # of --input_jsonl and of --input_zipped_jsonl
        name = f"docs_no_face_shard_{number}_v3"
        lines(tmp_path / "docs" / f"{name}.jsonl", [shard_page(number)])
        save(tmp_path / "here" / f"{name}{ending}_images", [f"s{number}a.png", f"s{number}b.png"])
    packed = tmp_path / "docs" / "docs_no_face_shard_1_v3.jsonl"
    with zipfile.ZipFile(f"{packed}.zip", "w") as archive:
        archive.write(packed, packed.name)
    packed.unlink()
    source = Mmc4(str(tmp_path / "docs"), images=str(tmp_path / "here"))
    assert contents(source) == [pair_of_shard(0)] * 2


def flamingo_shard(path: Path, documents: list[dict[str, Any]], as_text: bool = True) -> Path:
    """A tar as convert_mmc4_to_wds.py writes it: `str()` of the base64 bytes, or their text."""
    with tarfile.open(path, "w") as tar:
        for number, document in enumerate(documents):
            for place, info in enumerate(document["image_info"]):
                if not info["image_name"].startswith("gone"):
                    encoded = base64.b64encode(png(10 * number + place))
                    info["image_base64"] = encoded.decode() if as_text else str(encoded)
            content = json.dumps(document).encode()
            member = tarfile.TarInfo(f"{number:032x}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("as_text", [True, False])
def test_mmc4_in_shards_of_openflamingo(tmp_path: Path, as_text: bool) -> None:
    third = page("ab", ("gone.jpg", 0, 0.9), ("x.jpg", 1, 0.9))
    shard = flamingo_shard(tmp_path / "000000000.tar", [shard_page(0), shard_page(1), third], as_text)
    source = Mmc4(str(tmp_path))
    assert contents(source) == [pair_of_shard(0), pair_of_shard(10), [((21,), "b", None)]]
    assert source.skipped == {MISSING: 1}
    images = [image for one in source.documents(0) for pair in one for image in pair["images"]]
    assert all(isinstance(image, Encoded) for image in images)  # no bytes are held while documents are shuffled
    assert max(len(pickle.dumps(image)) for image in images) < 1000
    with tarfile.open(shard) as tar:
        second = tar.getmembers()[1]
    with shard.open("r+b") as file:
        file.truncate(second.offset_data + second.size // 2)
    assert contents(source) == [pair_of_shard(0)] and source.skipped["damaged file"] == 1


def test_mmc4_says_what_a_tar_must_hold(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard_0_images_v3.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(png(0))
        tar.addfile(member, io.BytesIO(png(0)))
    with pytest.raises(ValueError, match=r"holds no documents of MMC4.*unpack them and give.*images=FOLDER"):
        open_source(f"mmc4:{tmp_path / 'shard_0_images_v3.tar'}")
    with pytest.raises(ValueError, match=r"a\.parquet is not a shard of MMC4: expected one that ends in"):
        open_source(f"mmc4:{written(tmp_path / 'a.parquet', 'x')}")


# --- captions


def coco(root: Path) -> Path:
    """`annotations_trainval2014.zip` and `train2014.zip`, unpacked in one folder."""
    save(root, [f"train2014/COCO_train2014_{number:012d}.png" for number in range(3)])
    save(root, ["val2014/COCO_val2014_000000000007.png"])
    images = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.png", "height": 5, "width": 6} for n in range(3)]
    captions = [{"image_id": n % 3, "id": n, "caption": f"caption {n}"} for n in range(6)]
    file = {"info": {}, "licenses": [], "images": images, "annotations": captions}
    return written(root / "annotations" / "captions_train2014.json", file)


def test_cocos_captions(tmp_path: Path) -> None:
    file = coco(tmp_path / "coco")
    wanted = sorted([((n % 3,), f"caption {n}", None)] for n in range(6))
    assert contents(Pairs(str(file))) == wanted  # images are found beside annotations/
    assert contents(Pairs(str(file), images=str(tmp_path / "coco" / "train2014"))) == wanted
    orders = [[one[0]["text"] for one in Pairs(str(file), shuffle_buffer=1).documents(seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    instances = written(tmp_path / "instances.json", {"images": [{"id": 1}], "annotations": [{"bbox": []}]})
    with pytest.raises(ValueError, match=r"expected COCO's captions .*, Karpathy's"):
        Pairs(str(instances))


def test_karpathys_captions(tmp_path: Path) -> None:
    coco(tmp_path)
    rows = [
        {"filepath": "train2014", "filename": f"COCO_train2014_{n:012d}.png", "split": split, "imgid": n,
         "sentences": [{"raw": f"{split} {n} {k}", "tokens": []} for k in range(2)]}
        for n, split in enumerate(("train", "restval", "test"))
    ]  # fmt: skip
    file = written(tmp_path / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    train = [[((0,), f"train 0 {k}", None)] for k in range(2)] + [[((1,), f"restval 1 {k}", None)] for k in range(2)]
    assert contents(Pairs(str(file))) == train
    assert contents(Pairs(str(file), split="test")) == [[((2,), f"test 2 {k}", None)] for k in range(2)]
    with pytest.raises(ValueError, match=r"splits \['restval', 'test', 'train'\], but not 'val'"):
        Pairs(str(file), split="val")


def test_flickr30ks_results(tmp_path: Path) -> None:
    root = tmp_path / "flickr30k_images"
    save(root / "flickr30k_images", ["0.png", "1.png"])
    rows = ['0.png| 0| Two "young" guys, here .', "0.png| 1| Hats .", "1.png| 0| A dog .", "1.png| 4   Runs ."]
    file = written(root / "results.csv", "\n".join(["image_name| comment_number| comment", *rows]))
    source = Pairs(str(file))
    assert found_in(source) == [
        [((0,), "Hats .", None)],
        [((0,), 'Two "young" guys, here .', None)],
        [((1,), "A dog .", None)],
    ]
    assert source.skipped == {"no text": 1}  # the published file has one such row
    with pytest.raises(ValueError, match=r"holds annotations.*pairs:.*results\.csv"):
        Pairs(str(root))


def test_a_json_list_of_objects_and_llavas(tmp_path: Path) -> None:
    save(tmp_path, ["0.png"])
    assert contents(Pairs(str(written(tmp_path / "a.json", [{"image": "0.png", "caption": "c"}])))) == [
        [((0,), "c", None)]
    ]
    chat = written(tmp_path / "chat.json", [{"id": "0", "image": "0.png", "conversations": turns("<image>", "c")}])
    with pytest.raises(ValueError, match=r"LLaVA's format. Give llava:.*chat\.json"):
        Pairs(str(chat))
    with pytest.raises(ValueError, match=r"is a folder; llava takes.*Give one of llava:.*chat\.json\."):
        open_source(f"llava:{tmp_path}")
    assert len(contents(open_source(f"llava:{chat}")[0])) == 1


# --- folders of images


def test_folders_of_images_without_labels_are_refused(tmp_path: Path) -> None:
    coco(tmp_path / "coco")
    with pytest.raises(ValueError, match=r"holds annotations.*pairs:.*captions_train2014\.json"):
        Pairs(str(tmp_path / "coco"))
    shutil.rmtree(tmp_path / "coco" / "annotations")
    with pytest.raises(ValueError, match=r"4 images in train2014, val2014, with no text and no label"):
        Pairs(str(tmp_path / "coco"))
    for name in ("0.png", "images/0.png", "images/00000/0.png"):
        save(tmp_path / name.replace("/", "_"), [name])
        with pytest.raises(ValueError, match=r"1 images .*two class folders at least.*llava:chat\.json"):
            Pairs(str(tmp_path / name.replace("/", "_")))
    pretrain = tmp_path / "LLaVA-Pretrain"
    save(pretrain / "images", ["00000/0.png", "00001/1.png"])
    written(pretrain / "blip.json", [{"image": "00000/0.png", "conversations": turns("<image>", "c")}])
    with pytest.raises(ValueError, match=r"holds annotations.*Give the file that has the texts: llava:.*blip\.json"):
        Pairs(str(pretrain))


def test_labels_of_class_folders_are_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts.logger, "propagate", True)
    save(tmp_path / "train", ["dax/0.png", "dax/1.png", "train/2.png"])  # a label may be called like a split
    Pairs(str(tmp_path / "train"))
    assert "3 images with the names of their folders as labels: dax (2), train (1)." in caplog.text
    save(tmp_path / "val", ["dax/0.png", "wug/1.png"])
    with pytest.raises(ValueError, match=r"the splits train, val, each with class folders.*split=train"):
        Pairs(str(tmp_path))
    assert found_in(Pairs(str(tmp_path), split="val")) == [[((0,), "dax", None)], [((1,), "wug", None)]]


def img2dataset(root: Path, form: str) -> None:
    """Two shards; the second image of the first was not fetched."""
    for shard in range(2):
        keys = [f"{shard:05d}{number:04d}" for number in range(2)]
        table = {
            "url": [f"https://example.org/{key}" for key in keys],
            "caption": [f"caption {key}" for key in keys],
            "key": keys,
            "status": ["success", "success" if shard else "failed_to_download"],
        }
        there = [number for number in range(2) if table["status"][number] == "success"]
        if form == "parquet":
            table["jpg"] = [png(number) if number in there else None for number in range(2)]
            table["txt"] = [table["caption"][number] if number in there else None for number in range(2)]
        root.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(table), root / f"{shard:05d}.parquet")
        written(root / f"{shard:05d}_stats.json", {"count": 2})
        members = {}
        for number in there:
            members[f"{keys[number]}.jpg"] = png(number)
            members[f"{keys[number]}.txt"] = table["caption"][number].encode()
            members[f"{keys[number]}.json"] = json.dumps({"key": keys[number], "url": table["url"][number]}).encode()
        if form == "webdataset":
            with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        elif form == "files":
            (root / f"{shard:05d}").mkdir()
            for name, content in members.items():
                (root / f"{shard:05d}" / name).write_bytes(content)


IMG2DATASET = [
    [((0,), "caption 000000000", None)],
    [((0,), "caption 000010000", None)],
    [((1,), "caption 000010001", None)],
]


@pytest.mark.parametrize("form", ["files", "webdataset", "parquet"])
def test_what_img2dataset_wrote(tmp_path: Path, form: str) -> None:
    img2dataset(tmp_path, form)
    assert found_in(Pairs(str(tmp_path))) == IMG2DATASET
    if form == "files":
        for file in tmp_path.rglob("*.txt"):  # fetched without a column of captions: shards are not labels
            file.unlink()
        with pytest.raises(ValueError, match=r"3 images beside one another, with no text and no label"):
            Pairs(str(tmp_path))


def test_obelics_finds_what_img2dataset_fetched(tmp_path: Path) -> None:
    img2dataset(tmp_path / "images", "files")
    urls = [f"https://example.org/{key}" for key in ("000000000", "000000001", "000010001")]
    rows = {"images": [[urls[0], None, urls[1], urls[2], None]], "texts": [[None, "a", None, None, "b"]]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    source = Obelics(str(tmp_path / "a.parquet"), images=str(tmp_path / "images"))
    assert contents(source) == [[((0,), "a", None), ((1,), "b", None)]] and source.skipped == {MISSING: 1}


# --- splits of jsonl


def memes(root: Path) -> Path:
    """Hateful Memes as it is published."""
    names = ("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen")
    save(root, [f"img/{number}.png" for number in range(len(names))])
    for number, name in enumerate(names):
        lines(root / f"{name}.jsonl", [{"id": number, "img": f"img/{number}.png", "label": number % 2, "text": name}])
    return root


def test_a_folder_of_jsonl_splits_asks_for_split_and_column(tmp_path: Path) -> None:
    root = memes(tmp_path / "memes")
    every = r"dev_seen, dev_unseen, test_seen, test_unseen, train"
    with pytest.raises(ValueError, match=rf"{every}: all of them.*split=train\. Its rows .*text=text or label=label"):
        open_source(f"pairs:{root}")
    for path in (f"{root},split=train", f"{root / 'train.jsonl'}"):
        with pytest.raises(ValueError, match=r"text=text or label=label, or both: question=text,answer=label"):
            open_source(f"pairs:{path}")
    with pytest.raises(ValueError, match=rf"{every}, but nothing of split=test_secret"):
        open_source(f"pairs:{root},split=test_secret")
    for settings, wanted in {
        "split=dev_seen,text=text": [[((1,), "dev_seen", None)]],
        "split=train,label=label": [[((0,), "0", None)]],
        "split=dev,question=text,answer=label": [[((1,), "1", "dev_seen")], [((2,), "0", "dev_unseen")]],
    }.items():
        assert contents(open_source(f"pairs:{root},{settings}")[0]) == wanted


def test_splits_in_folders_and_shards_of_one_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / "two" / split, ["0.png"])
        lines(tmp_path / "two" / split / "metadata.jsonl", [{"file_name": "0.png", "text": split}])
        lines(tmp_path / "one" / f"train-0000{len(split)}.jsonl", [{"image": "../two/train/0.png", "text": split}])
    with pytest.raises(ValueError, match=r"holds test, train: all of them together.*split=train"):
        Pairs(str(tmp_path / "two"))
    assert contents(Pairs(str(tmp_path / "two"), split="test")) == [[((0,), "test", None)]]
    assert len(contents(Pairs(str(tmp_path / "one")))) == 2


# --- tasks


def test_tasks_on_published_folders_say_what_to_give(tmp_path: Path) -> None:
    root = memes(tmp_path / "memes")
    with pytest.raises(ValueError, match=r"dev_unseen.*but not 'test'.*hateful_memes:.*,split=dev_seen"):
        open_task(f"hateful_memes:{root}").examples(0)
    assert len(open_task(f"hateful_memes:{root},split=dev_seen").examples(0)) == 1


@pytest.mark.parametrize("kind", MAKERS)
def test_a_task_at_a_relative_path(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    task = open_task(MAKERS[kind](Path("data")))
    shots = everything(task)
    images = [image for one in task.examples(0) for image in one.images]
    images += [image for shot in shots for image in shot.pair.get("images", [shot.pair.get("image")])]
    assert images and all(map(is_image, filter(None, images))) and not task.left_out
