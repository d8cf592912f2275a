"""Small datasets in the formats that those of evaluation are published in, with pictures that can be told apart."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from modeling_aim.evaluation.task import Shot, Task

NUMBERS = itertools.count()


def picture() -> bytes:
    """A picture in a colour of its own."""
    number, file = next(NUMBERS), io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def save(folder: Path, *names: str) -> None:
    """Pictures under these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())


def pack(archive: Path, *names: str) -> None:
    """Pictures in a zip archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(name, picture())


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def parquet(path: Path, rows: Sequence[Mapping[str, Any]], **kinds: Any) -> Path:
    """A parquet file with an undecoded `image` in each row, or none where it is `None`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    filled = [{"image": {"bytes": picture(), "path": None}, **row} for row in rows]
    data = datasets.Dataset.from_list(filled).cast_column("image", datasets.Image())
    for name, kind in kinds.items():
        data = data.cast_column(name, kind)
    data.to_parquet(path)
    return path


# --- the datasets


def flickr(root: Path) -> str:
    names = [f"{number}.jpg" for number in range(9)]
    rows = [
        {
            "caption": [f"a {name} one", f"number {name[0]} here"],
            "sentids": ["0", "1"],
            "img_id": name[0],
            "filename": name,
        }
        for name in names
    ]
    parquet(root / "data" / "test-00000-of-00001.parquet", rows)  # all of them, as published
    splits = ["train"] * 4 + ["test"] * 3 + ["val"] * 2
    csv = "".join(f'"[""a caption"", ""another""]","[1]",{s},{n},{n[0]}\n' for n, s in zip(names, splits, strict=True))
    (root / "karpathy.csv").write_text("raw,sentids,split,filename,img_id\n" + csv)
    return f"flickr30k:{root},karpathy={root / 'karpathy.csv'},tokenizer=plain"


def okvqa(root: Path) -> str:
    def rows(start: int) -> list[dict[str, Any]]:
        return [
            {"question_id": str(start + n), "question": f"What is {n}?", "answers": ["cat"] * 6 + ["dog"] * 4,
             "question_type": "one", "answer_type": "other"}
            for n in range(4)
        ]  # fmt: skip

    parquet(root / "data" / "val2014-00000-of-00001.parquet", rows(0))
    parquet(root / "training.parquet", rows(100))
    return f"okvqa:{root},support={root / 'training.parquet'}"


def vizwiz(root: Path) -> str:
    for split in ("train", "val"):
        names = [f"VizWiz_{split}_{number:08d}.jpg" for number in range(4)]
        save(root / split, *names)
        answers = [{"answer": word, "answer_confidence": "yes"} for word in ["unanswerable"] * 7 + ["soap"] * 3]
        row = {"question": "What is this?", "answers": answers, "answer_type": "unanswerable", "answerable": 0}
        written(root / "Annotations" / f"{split}.json", [{"image": name, **row} for name in names])
    return f"vizwiz:{root}"


def memes(root: Path) -> str:
    for split in ("train", "validation", "test"):
        rows = [{"text": f"meme {n}", "label": n % 2} for n in range(4)]
        parquet(root / "data" / f"{split}-00000-of-00001.parquet", rows)
    return f"hateful_memes:{root}"


def scienceqa(root: Path, splits: Sequence[str] = ("train", "validation", "test")) -> str:
    for split in splits:
        rows = [
            {"question": f"Which {n}?", "choices": ["iron", "oak", "salt"], "answer": n % 3, "hint": "" if n else "A."}
            | ({"image": None} if n % 2 else {})
            for n in range(4)
        ]  # fmt: skip
        parquet(root / "ScienceQA-FULL" / f"{split}-00000-of-00001.parquet", rows, answer=datasets.Value("int8"))
    files = "".join(f"  - split: {split}\n    path: ScienceQA-FULL/{split}-*\n" for split in splits)
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: ScienceQA-FULL\n  data_files:\n{files}---\n")
    return f"scienceqa:{root}"


def isekai(root: Path, place: Callable[..., None], **changes: Any) -> None:
    kinds = {"positive": "Octopus Vacuum", "negative": "octopus"}
    names = {kind: [f"{kind}/{number}.png" for number in range(5)] for kind in kinds}
    place(root, *names["positive"], *names["negative"])
    rows = [
        {"image_name": names[kind][0], "positive_list": names["positive"][1:], "negative_list": names["negative"][1:],
         "positive_promt": kinds["positive"], "negative_promt": kinds["negative"], "label_name": kinds[kind]} | changes
        for kind in kinds
    ]  # fmt: skip
    lines(root / "ISEKAI-10.json", rows)


def isekai_10(root: Path) -> str:
    isekai(root, save)
    return f"isekai-10:{root}"


def isekai_pair(root: Path) -> str:
    isekai(root, lambda folder, *names: pack(folder / "images.zip", *(f"ISEKAI-20/{name}" for name in names)))
    return f"isekai-pair:{root}"


def lcl(root: Path) -> str:
    rows = []
    for number, name in enumerate(("Kit Fox", "Fox")):
        row: dict[str, Any] = {"class_id": str(number), "class_name": name}
        for key, many in (("context_samples", 5), ("test_samples", 3)):
            row[key] = [f"n{number}/{key}{n}.JPEG" for n in range(many)]
            save(root / "imagenet", *row[key])
        rows.append(row)
    return f"lcl:{lines(root / 'test100_pairs.jsonl', rows)},images={root / 'imagenet'}"


def open_mi(root: Path) -> str:
    classes = {name: [f"open_mi/support/{name}{n}.jpg" for n in range(5)] for name in ("dax", "perpo", "slation")}
    pack(root / "open_mi" / "support.zip", *(f"support/{Path(one).name}" for some in classes.values() for one in some))
    save(root, "open_mi/query/q0.jpg", "open_mi/query/q1.jpg")
    support = {name: {"images": some, "real_name": f"real {name}"} for name, some in classes.items()}
    entry = {"question": "This is a", "classes": list(classes), "support": support}
    queries = [
        {"id": f"open_mi_{n}", "image": [f"open_mi/query/q{n}.jpg"], "answer": name, **entry}
        for n, name in enumerate(("dax", "perpo"))
    ]
    written(root / "open_mi" / "query.json", queries)
    written(root / "open_mi" / "support.json", [])
    return f"open_mi:{root}"


def operators(root: Path, kind: str, images: int) -> str:
    def some(part: str, n: int) -> list[str]:
        return [f"{kind}/{part}/{n}_{k}.png" for k in range(images)]

    for part in ("query", "support"):
        pack(root / kind / f"{part}.zip", *(Path(one).name for n in range(6) for one in some(part, n)))  # flat
    queries = [
        {
            "id": n,
            "image": some("query", n),
            "question": "What is the result?",
            "answer": n + 10,
            "operator": "+-x"[n % 3],
        }
        for n in range(3)
    ]
    support = [{"image": some("support", n), "question": "And?", "answer": [n + 1, n + 2, n + 3]} for n in range(6)]
    written(root / kind / "query.json", queries)
    written(root / kind / "support.json", support)
    return f"{kind}:{root}"


def operator_induction(root: Path) -> str:
    return operators(root, "operator_induction", 1)


def interleaved(root: Path) -> str:
    return operators(root, "operator_induction_interleaved", 2) + "/operator_induction_interleaved"  # its own folder


def vl_icl(root: Path, kind: str, answers: Sequence[Any]) -> str:
    for part, many in (("query", 2), ("support", 5)):
        names = [f"{kind}/{part}/{n}.png" for n in range(many)]
        save(root, *names)
        entries = [
            {"id": n, "image": [name], "question": "shape: cube", "answer": answers[n % len(answers)]}
            for n, name in enumerate(names)
        ]
        written(root / kind / f"{part}.json", entries)
    return f"{kind}:{root}"


def clevr(root: Path) -> str:
    return vl_icl(root, "clevr", [3, 5])


def textocr(root: Path) -> str:
    return vl_icl(root, "textocr", ["STOP", "Exit 7"])


def matching_mi(root: Path) -> str:
    def entry(name: str, answer: str) -> dict[str, Any]:
        images = [f"matching_mi/{name}{k}.jpg" for k in range(2)]
        save(root, *images)
        return {"image": images, "question": "Do they match?", "answer": answer}

    queries = [{"id": n, **entry(f"query/{n}", answer)} for n, answer in enumerate(("yes", "no"))]
    support = [{"same": entry(f"support/s{n}", "yes"), "diff": entry(f"support/d{n}", "no")} for n in range(4)]
    written(root / "matching_mi" / "query.json", queries)
    written(root / "matching_mi" / "support.json", support)
    return f"matching_mi:{root}"


def folder(root: Path) -> str:
    save(root, *(f"{name}/{n}.png" for name in ("cat", "dog", "owl") for n in range(6)))
    return f"folder:{root},queries=2"


def captions(root: Path) -> str:
    save(root / "p", *(f"{n}.png" for n in range(8)))
    rows = [{"image": f"p/{n}.png", "captions": [f"number {n} here", f"the {n}th one"]} for n in range(8)]
    return f"captions:{lines(root / 'a.jsonl', rows)},tokenizer=plain"


def questions(root: Path) -> str:
    save(root, *(f"p/{n}.png" for n in range(9)))
    rows: list[dict[str, Any]] = [{"image": f"p/{n}.png", "question": "Which?", "answer": f"no {n}"} for n in range(6)]
    rows.append({"images": ["p/6.png", "p/7.png"], "image": "p/8.png", "question": "Both?", "answer": 5, "id": None})
    rows[0] |= {"images": ["p/0.png"]}
    return f"jsonl:{lines(root / 'mine.jsonl', rows[1:])},image=image,share=0.4"


def episodes(root: Path) -> str:
    save(root, *(f"{n}.png" for n in range(12)))
    rows = [
        {
            "demos": [{"image": f"{6 * k + n}.png", "label": "dax" if n % 2 else "wug"} for n in range(4)],
            "queries": [
                {"image": f"{6 * k + 4 + n}.png", "question": "What is this?", "answer": "dax"} for n in range(2)
            ],
        }
        for k in range(2)
    ]
    return f"episodes:{lines(root / 'binding.jsonl', rows)}"


MAKERS: dict[str, Callable[[Path], str]] = {
    "flickr30k": flickr,
    "okvqa": okvqa,
    "vizwiz": vizwiz,
    "hateful_memes": memes,
    "scienceqa": scienceqa,
    "isekai-10": isekai_10,
    "isekai-pair": isekai_pair,
    "lcl": lcl,
    "open_mi": open_mi,
    "operator_induction": operator_induction,
    "operator_induction_interleaved": interleaved,
    "clevr": clevr,
    "matching_mi": matching_mi,
    "textocr": textocr,
    "folder": folder,
    "captions": captions,
    "jsonl": questions,
    "episodes": episodes,
}


def shots_of(task: Task, seed: int = 0, count: int = 4) -> Iterator[Shot]:
    """All demonstrations that may be shown."""
    yield from task.pool()
    if task.fixed:
        for example in task.examples(seed):
            yield from task.shots(example, count, seed)


def everything(task: Task) -> list[Shot]:
    """All demonstrations of a task, of which all files are read for it."""
    assert task.examples(0)
    return list(shots_of(task))
