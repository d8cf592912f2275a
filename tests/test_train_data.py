"""Sources of training data: each published format, what is left out and counted, order by seed, and their names."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from modeling_aim.data.images import DatasetImage, Stretch
from modeling_aim.data.pairs import opened, size_of
from modeling_aim.training.episodes import Episode, Mixture, ShotLaw, Source
from modeling_aim.training.interleaved import Mmc4, Obelics
from modeling_aim.training.sources import EpisodeFile, LlavaConversations, Pairs, open_source

MISSING, BELOW = "unreadable or missing image", "image below the similarity floor"


def picture(number: int) -> Image.Image:
    """A picture of one colour, which gives its number back (lossless)."""
    return Image.new("RGB", (6, 5), (number, 100, 200))


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def save(folder: Path, names: Sequence[str]) -> None:
    """Pictures number 0, 1, ... under these names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def said(pair: Any) -> tuple[Any, ...]:
    """What a pair holds: numbers of its pictures, text, question."""
    return tuple(image.getpixel((0, 0))[0] for image in pair.images), pair.text, pair.question


def contents(source: Source, seed: int = 0) -> list[list[tuple[Any, ...]]]:
    """Documents of one pass with their images opened, sorted; what is left out is in `source.skipped`."""
    return sorted([said(pair) for pair in opened(one, source.skipped)] for one in source.documents(seed))


def texts(episodes: Sequence[Episode]) -> list[list[str]]:
    return [[pair.text for pair in one.opened().pairs] for one in episodes]


def episodes_of(source: Source, law: ShotLaw, seed: int = 0) -> list[Episode]:
    """Episodes of one pass with their images opened, those that something is left of."""
    return [one for light in source.episodes(law, seed) if (one := light.opened()).targets]


def left_out(source: Source) -> Counter[str]:
    """All that one pass leaves out, whether or not an episode takes it along."""
    source.skipped.clear()
    taken = sum((one.opened().skipped for one in source.episodes(ShotLaw(2), 0)), Counter[str]())
    return taken + source.skipped


# --- MMC4


def page(texts: Sequence[str], *images: tuple[str, int, float]) -> dict[str, Any]:
    """A document as MMC4 publishes it."""
    info = [
        {
            "face_detections": None,
            "image_name": name,
            "matched_sim": similarity,
            "matched_text_index": place,
            "raw_url": f"http://example.org/{name}",
        }
        for name, place, similarity in images
    ]
    return {"image_info": info, "text_list": list(texts), "url": "http://example.org", "could_have_url_duplicate": 0}


PAGE = page(["zero", "one", "two"], ("2.png", 2, 0.3), ("0.png", 0, 0.24), ("1.png", 2, 0.5), ("3.png", 1, 0.2399))


def test_mmc4_pairs_follow_the_text(tmp_path: Path) -> None:
    save(tmp_path, [f"{number}.png" for number in range(4)])
    shard = lines(tmp_path / "docs_shard_0_v2.jsonl", [PAGE])
    source = Mmc4(str(shard))
    assert contents(source) == [[((0,), "zero", None), ((2, 1), "two", None)]]
    assert source.skipped == {BELOW: 1}
    assert contents(Mmc4(str(shard), min_similarity=0.2))[0][1] == ((3,), "one", None)
    assert contents(Mmc4(str(shard), min_similarity=0.4)) == [[((1,), "two", None)]]
    (episode,) = source.episodes(ShotLaw(4, "fixed"), 0)
    assert episode.targets == (1,) and episode.source == "mmc4 docs_shard_0_v2.jsonl"


def test_mmc4_leaves_out_what_is_broken(tmp_path: Path) -> None:
    save(tmp_path / "pictures", [f"{number}.png" for number in range(5)])
    (tmp_path / "pictures" / "1.png").write_bytes(png(1)[:40])  # truncated
    (tmp_path / "pictures" / "2.png").write_text("<html>404</html>")
    rows: list[Any] = [
        page("ab", ("0.png", 0, 0.9), ("1.png", 1, 0.9)),
        page("abc", ("2.png", 0, 0.9), ("3.png", 1, 0.9), ("gone.png", 1, 0.9), ("4.png", 2, 0.9)),
        page(["", "b"], ("3.png", 0, 0.9), ("4.png", 1, 0.9)),
        page("a", ("0.png", 7, 0.9)),
        {"text_list": None},
        '{"text_list": ["cut sho',
        "[1, 2]",
        "",
    ]
    source = Mmc4(str(lines(tmp_path / "a.jsonl", rows)), images=str(tmp_path / "pictures"))
    assert texts(episodes_of(source, ShotLaw(4))) == [["b", "c"]]
    assert left_out(source) == {
        MISSING: 3,
        "no text": 1,
        "image that is matched to no sentence": 1,
        "line without text_list and image_info": 1,
        "line that is not a JSON object": 2,
        "document with fewer than two pairs": 1,
        "episode with fewer than two pairs that can be read": 2,
    }


def test_compressed_shards_and_where_images_lie(tmp_path: Path) -> None:
    one, two = (json.dumps(page("ab", (f"{n}.png", 0, 0.9), (f"{n + 1}.png", 1, 0.9))) for n in (0, 2))
    with zipfile.ZipFile(tmp_path / "docs_no_face_shard_0_v3.jsonl.zip", "w") as archive:
        archive.writestr("docs_no_face_shard_0_v3.jsonl", one + "\n")
    (tmp_path / "docs_no_face_shard_1_v3.jsonl.gz").write_bytes(gzip.compress(two.encode()))
    save(tmp_path, [f"docs_no_face_shard_0_v3_images/{n}.png" for n in range(2)])  # as the download script puts them
    save(tmp_path, [f"{n}.png" for n in range(4)])
    expected = [[((n,), "a", None), ((n + 1,), "b", None)] for n in (0, 2)]
    for path in (tmp_path, tmp_path / "docs_*_v3.jsonl.*"):
        assert contents(Mmc4(str(path))) == expected
    packed = (tmp_path / "docs_no_face_shard_1_v3.jsonl.gz").read_bytes()
    (tmp_path / "docs_no_face_shard_1_v3.jsonl.gz").write_bytes(packed[:-12])
    (tmp_path / "docs_no_face_shard_2_v3.jsonl.zip").write_bytes(b"no archive")
    source = Mmc4(str(tmp_path))
    assert expected[0] in contents(source)
    assert source.skipped["damaged file"] == 2


# --- OBELICS


def obelics(path: Path, images: list[Any], texts: list[Any]) -> Path:
    parquet.write_table(pyarrow.table({"images": images, "texts": texts}), path)
    return path


def test_obelics_runs_of_images_and_the_text_behind_them(tmp_path: Path) -> None:
    save(tmp_path, [f"{number}.png" for number in range(6)])
    images = [[None, "0.png", "1.png", None, None, "2.png", None, "3.png"], ["4.png", None], ["5.png"]]
    words = [["lead", None, None, "both", "alone", None, "one", None], [None, "single"], [None, "other length"]]
    source = Obelics(str(obelics(tmp_path / "train-0.parquet", images, words)))
    assert contents(source) == [[], [((0, 1), "both", None), ((2,), "one", None)], [((4,), "single", None)]]
    assert source.skipped == {"image without a text after it": 1, "document with lists of different lengths": 1}
    assert texts(list(source.episodes(ShotLaw(4, "fixed"), 0))) == [["both", "one"]]


def test_obelics_urls_are_found_by_name_or_digest_and_else_left_out(tmp_path: Path) -> None:
    urls = [f"https://example.org/{n}.png?w=300" for n in range(3)]
    digest = hashlib.sha256(urls[1].encode()).hexdigest()
    save(tmp_path / "pictures", ["0.png", f"{digest}.png"])
    shard = obelics(
        tmp_path / "a.parquet", [[urls[0], None, urls[1], None, urls[2], None]], [[None, "a", None, "b", None, "c"]]
    )
    source = Obelics(str(shard), images=str(tmp_path / "pictures"))
    assert contents(source) == [[((0,), "a", None), ((1,), "b", None)]]
    assert source.skipped == {MISSING: 1}
    fetched = Obelics(str(shard), images=str(tmp_path / "pictures"), download=True)  # tests cannot reach the network
    assert contents(fetched) == contents(source) and fetched.skipped[MISSING] == 1
    assert [pair["images"] for one in fetched.documents(0) for pair in one][2] == [urls[2]]


def test_obelics_needs_its_columns(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"columns \['image', 'text'\]; OBELICS has 'images' and 'texts'"):
        Obelics(str(tmp_path))


# --- pairs


def test_pairs_of_a_jsonl_file(tmp_path: Path) -> None:
    save(tmp_path / "p", [f"{number}.png" for number in range(5)])
    rows: list[Any] = [
        {"image": "p/0.png", "text": " a caption "},
        {"images": ["p/1.png", "p/2.png"], "question": "Which?", "answer": "both", "id": 7},
        {"image": "p/3.png", "label": "dax", "text": None},
        {"image": "p/4.png"},
        {"image": None, "text": "nothing to see"},
        {"image": "p/5.png", "text": "gone"},
        {"image": "p/4.png", "text": "  "},
        "{",
    ]
    source = Pairs(str(lines(tmp_path / "a.jsonl", rows)))
    assert contents(source) == [[], [], *([one] for one in EXPECTED)]
    assert source.skipped == {MISSING: 2, "no text": 2, "line that is not a JSON object": 1}
    labels = [pair.is_label for one in source.documents(0) for pair in opened(one, Counter())]
    assert sorted(labels) == [False, False, True]
    pickle.loads(pickle.dumps(source))  # workers of a DataLoader that are spawned get it so


EXPECTED = [((0,), "a caption", None), ((1, 2), "both", "Which?"), ((3,), "dax", None)]


def test_pairs_with_columns_of_other_names(tmp_path: Path) -> None:
    save(tmp_path / "p", ["0.png"])
    row = {"pic": "0.png", "prompt": "What?", "answers": ["no", "yes", {"answer": "yes"}, ""], "text": "other"}
    path = str(lines(tmp_path / "a.jsonl", [row]))
    asked = Pairs(path, image="pic", question="prompt", images=str(tmp_path / "p"))
    assert contents(asked) == [[((0,), "yes", "What?")]]
    with pytest.raises(ValueError, match=r"columns \['answers', 'pic', 'prompt', 'text'\].*needs an image.*image="):
        Pairs(path)
    with pytest.raises(ValueError, match=r"you asked for image=pic, text=words.*A pair needs"):
        Pairs(path, image="pic", text="words")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_pairs_of_an_image_folder_with_metadata(tmp_path: Path, ending: str) -> None:
    save(tmp_path, ["train/0.png", "train/deep/1.png"])
    rows = [("0.png", "zero, with a comma"), ("deep/1.png", "one"), ("2.png", "gone"), ("0.png", "")]
    if ending == "csv":
        cells = "".join(f'{name},"{text}"\n' for name, text in rows)
        (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\n" + cells)
    else:
        lines(tmp_path / "train" / "metadata.jsonl", [{"file_name": name, "caption": text} for name, text in rows])
    source = Pairs(str(tmp_path))
    assert [one for one in contents(source) if one] == [[((0,), "zero, with a comma", None)], [((1,), "one", None)]]
    assert source.skipped == {MISSING: 1, "no text": 1}


def test_pairs_of_class_folders_are_shuffled_over_all_classes(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in ("dax", "wug") for number in range(20)]
    save(tmp_path, [*names, "no_class.png"])
    (tmp_path / "dax" / "notes.txt").write_text("no image")
    source = Pairs(str(tmp_path), shuffle_buffer=1)
    pairs = [pair for one in source.documents(0) for pair in opened(one, source.skipped)]
    assert all(pair.is_label for pair in pairs)
    assert Counter((pair.text, said(pair)[0][0] // 20) for pair in pairs) == {("dax", 0): 20, ("wug", 1): 20}
    assert {pair.text for pair in pairs[:10]} == {"dax", "wug"} and not source.skipped


def test_pairs_of_webdataset_shards(tmp_path: Path) -> None:
    members = [
        ("a/0.png", png(0)), ("a/0.txt", b"zero"),
        ("a/1.json", json.dumps({"caption": "one", "image": "where it was.jpg"}).encode()), ("a/1.webp", png(1)),
        ("a/2.png", png(2)), ("a/2.json", b'{"question": "Which?", "answer": "two"}'), ("a/2.seg.png", b"mask"),
        ("a/3.png", png(3)), ("a/3.json", b"{"),
        ("a/4.txt", b"no image"),
        ("b/4.png", b"no image either"), ("b/4.caption", b"four"),
    ]  # fmt: skip
    for number, some in enumerate((members[:4], members[4:])):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for name, content in some:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = Pairs(str(tmp_path))
    found = [[((0,), "zero", None)], [((1,), "one", None)], [((2,), "two", "Which?")]]
    assert [one for one in contents(source) if one] == found
    assert source.skipped == {MISSING: 2, "no text": 1, "member that is not a JSON object": 1}
    assert all(isinstance(pair["image"], Stretch) for one in source.documents(0) for pair in one)  # not read
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00001.tar").read_bytes()[:1546])  # inside the second member
    cut = Pairs(str(tmp_path / "*.tar"))
    assert [one for one in contents(cut) if one] == found[:2] and cut.skipped["damaged file"] == 1


def test_pairs_of_data_sets(tmp_path: Path) -> None:
    features = datasets.Features(picture=datasets.Image(), label=datasets.ClassLabel(names=["dax", "wug"]))
    numbers = list(range(6))
    rows = {"picture": [{"bytes": png(n), "path": None} for n in numbers], "label": [0, 1, 1, 0, -1, None]}
    rows["picture"][3] = {"bytes": b"no image", "path": None}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "splits")
    data.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    data.select([0]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    found = [[((0,), "dax", None)], [((1,), "wug", None)], [((2,), "wug", None)]]
    for path in ("saved", "splits", "", "train-*.parquet"):
        source = Pairs(str(tmp_path / path), image="picture")
        assert [one for one in contents(source) if one] == found, path
        assert source.skipped == {MISSING: 1, "no text": 2}
        if path in ("saved", "splits"):  # mapped into memory: neither images nor their bytes are held
            assert all(isinstance(pair["image"], DatasetImage) for one in source.documents(0) for pair in one)
    assert contents(Pairs(str(tmp_path), image="picture", split="test")) == found[:1]
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\], but not 'val'"):
        Pairs(str(tmp_path / "splits"), image="picture", split="val")
    with pytest.raises(ValueError, match=r"columns \['label', 'picture'\].*needs an image"):
        Pairs(str(tmp_path / "saved"))


def test_data_sets_are_shuffled_by_seed(tmp_path: Path) -> None:
    rows = {"image": ["x.png"] * 40, "text": [str(n) for n in range(40)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")

    def order(seed: int) -> list[str]:
        return [one[0]["text"] for one in Pairs(str(tmp_path), shuffle_buffer=20).documents(seed)]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted(rows["text"])


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.parquet").touch()
    for path in (str(tmp_path), "some-user/some-data"):
        with pytest.raises(ImportError, match=r"pip install modeling-aim\[train\]"):
            open_source(f"pairs:{path}")


def test_a_first_row_without_a_text_is_no_reason_to_stop(tmp_path: Path) -> None:
    save(tmp_path, ["0.png"])
    rows = [{"image": "0.png", "text": None}, {"text": "alone"}, {"image": "0.png", "text": "zero"}]
    source = Pairs(str(lines(tmp_path / "a.jsonl", rows)))
    assert contents(source) == [[((0,), "zero", None)]]
    assert source.skipped == {MISSING: 1, "no text": 1}


def test_a_name_that_is_neither_here_nor_on_the_hub() -> None:
    with pytest.raises(FileNotFoundError, match="some-user/some-data is not a file or folder here, and from the Hub"):
        open_source("pairs:some-user/some-data")


# --- LLaVA


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def test_llava_conversations(tmp_path: Path) -> None:
    save(tmp_path / "coco", ["0.png", "1.png", "2.png"])
    records = [
        {"id": "0", "image": "0.png", "conversations": turns("<image>\nWhat?", "A dax.", "And where?", "Here.")},
        {"id": "1", "image": "1.png", "conversations": turns("<image>", "a caption")},
        {"id": "2", "image": "2.png", "conversations": turns("Describe it.\n<image>", "a wug", "Why?")},
        {"id": "3", "conversations": turns("Hello", "Hi")},
        {"id": "4", "image": "gone.png", "conversations": turns("<image>", "nothing")},
        {"id": "5", "image": "0.png", "conversations": None},
        "none",
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    source = LlavaConversations(str(tmp_path / "llava.json"), images=str(tmp_path / "coco"))
    assert [one[0] for one in contents(source) if one] == [
        ((0,), "A dax.", "What?"),
        ((0,), "Here.", "And where?"),
        ((1,), "a caption", None),
        ((2,), "a wug", "Describe it."),
    ]
    assert source.skipped == {
        MISSING: 1,
        "record without an image": 1,
        "record without a conversation": 2,
        "turn without its question or answer": 1,
    }
    plain = LlavaConversations(str(tmp_path / "llava.json"), images=str(tmp_path / "coco"), captions=True)
    assert {pair[0][2] for pair in contents(plain) if pair} == {None}
    for content, match in (('[{"id"', "is not JSON"), ('{"id": 1}', "holds a JSON dict")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=match):
            LlavaConversations(str(tmp_path / "bad.json"))


def test_a_large_conversations_file_is_never_in_memory(tmp_path: Path) -> None:
    """6 MB of records in pretty-printed JSON with letters of several bytes, and what is drawn of them is right."""
    save(tmp_path, ["0.png"])
    talk = [[f"Frage {n} \u00e4 \U0001f600?" + " ja" * 400, f"Antwort {n}", "Und?", f"{n}"] for n in range(4000)]
    records = [{"id": str(n), "image": "0.png", "conversations": turns(*words)} for n, words in enumerate(talk)]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8-sig")
    del records
    tracemalloc.start()
    source = LlavaConversations(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20 < path.stat().st_size
    drawn = list(islice(source.episodes(ShotLaw(4), 0), 1000))
    opened = [pair for episode in drawn for pair in episode.opened().pairs]
    assert len({(pair.text, pair.question) for pair in opened}) == len(opened)
    wanted = {(answer, asked) for words in talk for asked, answer in zip(words[::2], words[1::2], strict=True)}
    assert {(pair.text, pair.question) for pair in opened} <= wanted
    assert [len(pair.text) + len(pair.question or "") for pair in opened[:50]] == [
        size_of(pair)[0] for episode in drawn for pair in episode.pairs
    ][:50]
    held, rest = ({dict(pair)["answer"] for one in part.documents(0) for pair in one} for part in source.split(0.2))
    assert not held & rest and len(held | rest) == 8000
    numbers = [{words.rpartition(" ")[2] for words in part} for part in (held, rest)]
    assert not numbers[0] & numbers[1]  # a conversation is in one part, with all its turns


# --- ready-made episodes


def test_ready_made_episodes(tmp_path: Path) -> None:
    save(tmp_path / "p", [f"{number}.png" for number in range(6)])

    def demo(number: int, label: str) -> dict[str, str]:
        return {"image": f"p/{number}.png", "label": label}

    rows: list[Any] = [
        {"demos": [demo(0, "dax"), demo(1, "wug"), demo(2, "fep")], "queries": [demo(3, "wug"), demo(9, "gone")]},
        {"demos": [demo(0, "zup"), demo(9, "gone")], "queries": [demo(3, "zup")]},
        {"demos": [demo(4, "blick")], "queries": [demo(5, "blick"), demo(3, "blick")]},
        {"demos": [], "queries": [demo(3, "wug")]},
        {"demos": ["dax"], "queries": [demo(3, "wug")]},
    ]
    source = EpisodeFile(str(lines(tmp_path / "a.jsonl", rows)))
    episodes = episodes_of(source, ShotLaw(2))
    assert sorted([said(pair)[0][0] for pair in one.pairs] for one in episodes) == [[1, 2, 3], [4, 3], [4, 5]]
    assert all(one.targets == (len(one.pairs) - 1,) for one in episodes)
    assert left_out(source) == {
        MISSING: 2,
        "episode with a demonstration that cannot be read": 1,
        "demonstration beyond the largest number of shots": 1,
        "line without demos and queries": 2,
    }
    assert texts(list(source.episodes(ShotLaw(8), 1))) != texts(episodes)
    assert max(len(one.pairs) for one in episodes_of(source, ShotLaw(8))) == 4
    assert sorted(map(len, source.documents(0))) == [3, 3, 5]


# --- order, numbers of demonstrations, mixtures


@pytest.fixture
def counted(tmp_path: Path) -> Callable[..., Pairs]:
    """A source of numbered pairs in three shards."""

    def make(name: str = "pairs", count: int = 60, **settings: Any) -> Pairs:
        save(tmp_path, ["x.png"])
        for shard in range(3):
            rows = [{"image": "../x.png", "text": str(n)} for n in range(shard, count, 3)]
            lines(tmp_path / name / f"{shard}.jsonl", rows)
        return Pairs(str(tmp_path / name), **settings)

    return make


def test_the_same_seed_gives_the_same_episodes(counted: Callable[..., Pairs]) -> None:
    source, law = counted(shuffle_buffer=10), ShotLaw(4)
    first = texts(list(source.episodes(law, 0)))
    assert texts(list(source.episodes(law, 0))) == texts(list(counted(shuffle_buffer=10).episodes(law, 0))) == first
    assert texts(list(source.episodes(law, 1))) != first
    shown = [text for one in first for text in one]
    assert len(set(shown)) == len(shown) >= 59  # each at most once a pass; the last one may be left alone
    assert shown != sorted(shown, key=int)


def test_the_order_does_not_depend_on_where_data_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        save(tmp_path / place, ["x.png"])
        lines(tmp_path / place / "a.jsonl", [{"image": "x.png", "text": str(n)} for n in range(30)])
    here, there = (list(Pairs(str(tmp_path / one / "a.jsonl")).episodes(ShotLaw(3), 5)) for one in ("here", "there"))
    assert texts(here) == texts(there)


@pytest.mark.parametrize("law", ["uniform", "exponential", "fixed"])
def test_numbers_of_demonstrations(counted: Callable[..., Pairs], law: str) -> None:
    mixture = Mixture([counted()], [1.0], ShotLaw(4, law))
    episodes = list(islice(mixture, 150))
    shots = Counter(len(one.pairs) - 1 for one in episodes)
    assert all(one.targets == tuple(range(1, len(one.pairs))) for one in episodes)
    if law == "fixed":
        assert shots[4] > 140  # but for the end of a pass
    else:
        assert set(shots) == {1, 2, 3, 4} and min(shots.values()) > 12
        assert law == "uniform" or shots[4] > shots[1]


def test_a_long_document_is_cut_and_never_mixed_with_the_next(tmp_path: Path) -> None:
    save(tmp_path, ["x.png"])
    pages = [page([f"{p}.{n}" for n in range(7)], *[("x.png", n, 0.9) for n in range(7)]) for p in range(5)]
    episodes = episodes_of(Mmc4(str(lines(tmp_path / "a.jsonl", pages))), ShotLaw(2, "fixed"))
    assert len(episodes) == 10  # 3 + 3 pairs of each, and the last pair of a page is alone
    for one in episodes:
        assert len({pair.text[0] for pair in one.pairs}) == 1
        assert [pair.text for pair in one.pairs] == sorted(pair.text for pair in one.pairs)


def test_sources_are_mixed_by_weight(counted: Callable[..., Pairs]) -> None:
    sources = [counted("a", 12), counted("b", 30), counted("c", 9)]
    drawn = Counter(one.source for one in islice(Mixture(sources, [1, 2, 1], ShotLaw(2), seed=3), 400))
    assert abs(drawn["pairs b"] - 200) < 40 and abs(drawn["pairs a"] - 100) < 35  # four standard deviations
    assert sum(drawn.values()) == 400 and len(drawn) == 3


def test_passes_differ_and_what_is_left_out_is_reported(tmp_path: Path) -> None:
    save(tmp_path, ["x.png"])
    rows = [{"image": "x.png", "text": str(n)} for n in range(8)] + ["{", {"image": "gone.png", "text": "gone"}]
    source = Pairs(str(lines(tmp_path / "a.jsonl", rows)))
    episodes = list(islice(Mixture([source], [1.0], ShotLaw(1)), 12))  # three passes of four episodes
    assert texts(episodes[:4]) != texts(episodes[4:8])
    taken = sum((one.opened().skipped for one in episodes), Counter[str]()) + source.skipped
    lost = "episode with fewer than two pairs that can be read"
    assert taken == {MISSING: 3, "line that is not a JSON object": 3, lost: 3}


def test_data_without_an_episode(tmp_path: Path) -> None:
    save(tmp_path, ["x.png"])
    one_pair = lines(tmp_path / "one.jsonl", [page("a", ("x.png", 0, 0.9)), page("b", ("gone.png", 0, 0.9))])
    empty = lines(tmp_path / "empty.jsonl", [])
    for source, reasons in (
        (Mmc4(str(one_pair)), f"document with fewer than two pairs: 2, {MISSING}: 1"),
        (Pairs(str(empty)), "nothing"),
        (EpisodeFile(str(empty)), "nothing"),
    ):
        with pytest.raises(ValueError, match=f"{source.name} gave no episode.*Left out: {reasons}"):
            next(iter(Mixture([source], [1.0], ShotLaw(4))))


# --- sources by name


def test_a_source_of_one_line_of_text(tmp_path: Path) -> None:
    save(tmp_path, ["x.png"])
    path = lines(tmp_path / "a,b.jsonl", [page("a", ("x.png", 0, 0.5))])
    source, weight = open_source(f"mmc4:{path},min_similarity=0.5,weight=2.5,images={tmp_path},shuffle_buffer=7")
    assert isinstance(source, Mmc4) and weight == 2.5
    assert (source.min_similarity, source.images, source.shuffle_buffer) == (0.5, tmp_path, 7)
    assert open_source(f"episodes:{path}")[1] == 1.0
    save(tmp_path / "classes", ["dax/0.png", "wug/1.png"])
    linked = open_source(f"link-context:{tmp_path / 'classes'},neighbours=random,shots=1,policy=2way_uniform")[0]
    assert linked.name == "link-context classes"


@pytest.mark.parametrize(
    ("spec", "kind", "match"),
    [
        ("coco:{path}", ValueError, r"'coco:.*' is not a source.*'link-context', 'llava', 'mmc4', 'obelics', 'pairs'"),
        ("{path}", ValueError, "Expected KIND:PATH"),
        ("mmc4:", ValueError, "Expected KIND:PATH"),
        ("mmc4:{path},floor=1", ValueError, r"has no setting 'floor'; it has \['images', 'min_similarity'"),
        ("mmc4:{path},min_similarity=high", ValueError, "min_similarity=high: expected a number"),
        ("mmc4:{path},shuffle_buffer=1.5", ValueError, "shuffle_buffer=1.5: expected a whole number"),
        ("mmc4:{path},shuffle_buffer=0", ValueError, "mmc4:.*shuffle_buffer=0: expected at least 1"),
        ("llava:{path},captions=yes", ValueError, "captions=yes: expected true or false"),
        ("link-context:{path},polcy=mix", ValueError, r"no setting 'polcy'; it has \[.*'ordinary', 'policy'.*'ways'"),
        ("mmc4:{folder}/no/*.jsonl", FileNotFoundError, r"mmc4:.*/no/\*\.jsonl was not found"),
        ("pairs:{folder}/no/such", FileNotFoundError, "/no/such was not found"),
        ("llava:{folder}/no.json", FileNotFoundError, "no.json was not found"),
        ("mmc4:{path},images={folder}/no", FileNotFoundError, "/no was not found"),
        ("mmc4:{folder}/empty", FileNotFoundError, "holds no file that ends in"),
        ("pairs:{folder}/empty", ValueError, "holds no pairs: expected metadata.jsonl"),
        ("pairs:{folder}/a.txt", ValueError, "is not a file of pairs: expected"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(tmp_path: Path, spec: str, kind: type[Exception], match: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    path = lines(tmp_path / "a.jsonl", [page("a", ("x.png", 0, 0.5))])
    with pytest.raises(kind, match=match):
        open_source(spec.format(path=path, folder=tmp_path))
