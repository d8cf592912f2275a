"""docs/RECIPES.md: every command, in order, on the published configs in small and on files in the published layouts.

Commands that fetch data leave here what their scripts leave; all others run as they stand, but for smaller numbers.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pyarrow
import pytest
from backbones import picture
from eval_data import open_mi, operator_induction
from hub_server import HubServer
from pyarrow import parquet
from small_real import small_backbone
from typer.testing import CliRunner

from modeling_aim.cli import app
from modeling_aim.training.settings import TrainSettings

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "RECIPES.md").read_text(encoding="utf-8")
RECIPES = {"SmolVLM-256M": "SmolVLM-256M", "LLaVA-1.5-7B": "llava-1.5-7b", "Qwen2.5-VL-7B": "Qwen2.5-VL-7B"}
TRAIN = {"--steps": "2", "--batch-size": "1", "--accumulation": "2", "--shots": "2"}
EVAL = {"--shots": "0,2", "--seeds": "1", "--limit": "2"}
MORE = {"train": ["--eval-episodes", "2", "--held-out", "0.2", "--save-every", "1"], "eval": [], "publish": []}
OPTIONS = {field.name for field in fields(TrainSettings)}


def commands(section: str) -> list[list[str]]:
    """The commands of a section, split as a shell does."""
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


SECTIONS = {name: commands(next(part for part in PAGE.split("\n## ") if part.startswith(name))) for name in RECIPES}


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number, (40, 30)).save(file, "PNG")
    return file.getvalue()


def pack(path: str, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, png(number))


# --- what fetching leaves, by the beginning of a command


def mmc4_documents() -> None:
    """Four pages of three images, as in jmhessel/mmc4-core-ff."""
    folder = Path("mmc4-core")
    folder.mkdir()
    pages = []
    for page in range(8):
        info = [
            {"image_name": f"{page:08x}{n}.png", "raw_url": "https://example.org/", "matched_text_index": n,
             "matched_sim": 0.3, "face_detections": None}
            for n in range(3)
        ]  # fmt: skip
        pages.append(
            {"text_list": [f"a word {page}", "and more", "the end"], "image_info": info, "url": "https://a.org"}
        )
    (folder / "docs_no_face_shard_0_v3.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))


def mmc4_images() -> None:
    folder = Path("docs_no_face_shard_0_v3_images")  # ./<shard>_images/ of download_images.py
    folder.mkdir()
    rows = map(json.loads, (Path("mmc4-core") / "docs_no_face_shard_0_v3.jsonl").read_text().splitlines())
    names = [info["image_name"] for row in rows for info in row["image_info"]]
    for number, name in enumerate(names[:-1]):  # one URL is gone
        (folder / name).write_bytes(png(number))


def vl_icl() -> None:
    open_mi(Path("vl-icl"))
    operator_induction(Path("vl-icl"))


def llava_json() -> None:
    Path("llava").mkdir()
    names = [f"coco/train2017/{number:012d}.png" for number in range(8)] + ["gqa/images/1.png"]
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dax."}] * 2
    records: list[dict[str, object]] = [{"id": name, "image": name, "conversations": turns} for name in names]
    (Path("llava") / "llava_v1_5_mix665k.json").write_text(json.dumps([*records, {"id": "x", "conversations": turns}]))


def zips(name: str) -> None:
    if name == "train2017.zip":
        pack(name, *(f"train2017/{number:012d}.png" for number in range(8)))
    elif name == "Annotations.zip":
        with zipfile.ZipFile(name, "w") as archive:
            for split in ("train", "val"):
                answers = [{"answer": word, "answer_confidence": "yes"} for word in ["soap"] * 10]
                row = {"question": "What is this?", "answers": answers, "answer_type": "other", "answerable": 1}
                images = [f"VizWiz_{split}_{number:08d}.jpg" for number in range(4)]
                archive.writestr(
                    f"Annotations/{split}.json", json.dumps([{"image": image, **row} for image in images])
                )
    else:
        split = name.partition(".")[0]
        pack(name, *(f"{split}/VizWiz_{split}_{number:08d}.jpg" for number in range(4)))


def unzip(*arguments: str) -> None:
    quiet, *flat, archive, _, folder = arguments
    assert quiet == "-q" and flat in ([], ["-j"])
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if flat:
                member.filename = Path(member.filename).name
            opened.extract(member, folder)


def obelics() -> None:
    Path("obelics/data").mkdir(parents=True)
    images = [[f"https://example.org/{page}-{n}.png" if n % 2 == 0 else None for n in range(6)] for page in range(8)]
    texts = [[None if n % 2 == 0 else f"words {page} {n}" for n in range(6)] for page in range(8)]
    parquet.write_table(pyarrow.table({"images": images, "texts": texts}), "obelics/data/train-00000-of-01439.parquet")


def img2dataset(*arguments: str) -> None:
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert (given["--output_format"], given["--url_col"]) == ("files", "url")
    urls = parquet.read_table(given["--url_list"]).to_pydict()["url"]
    assert len(urls) == 24
    folder = Path(given["--output_folder"])
    (folder / "00000").mkdir(parents=True)
    keys = [f"0000{number:05d}" for number in range(len(urls))]
    for number, key in enumerate(keys[1:]):
        (folder / "00000" / f"{key}.jpg").write_bytes(png(number))
        (folder / "00000" / f"{key}.json").write_text("{}")
    status = ["failed_to_download", *["success"] * (len(urls) - 1)]
    parquet.write_table(pyarrow.table({"url": urls, "key": keys, "status": status}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


FETCHING: dict[str, Callable[[list[str]], None]] = {
    "git clone https://github.com/allenai/mmc4": lambda rest: None,
    "pip install": lambda rest: None,
    "hf download jmhessel/mmc4-core-ff": lambda rest: mmc4_documents(),
    "hf download ys-zong/VL-ICL": lambda rest: vl_icl(),
    "hf download liuhaotian/LLaVA-Instruct-150K": lambda rest: llava_json(),
    "hf download HuggingFaceM4/OBELICS": lambda rest: obelics(),
    "python mmc4/scripts/download_images.py": lambda rest: mmc4_images(),
    "wget": lambda rest: zips(rest[0].rpartition("/")[2]),
    "unzip": lambda rest: unzip(*rest),
    "img2dataset": lambda rest: img2dataset(*rest),
}


def smaller(command: list[str]) -> list[str]:
    """An `aim` command with small numbers, and the name of the tests' account."""
    name, *rest = command[1:]
    numbers = {"train": TRAIN, "eval": EVAL}.get(name, {})
    changed = [numbers.get(before, word) for before, word in zip([name, *rest], rest, strict=False)]
    changed = [re.sub(r"^dataloader_num_workers=\d+", "dataloader_num_workers=0", word) for word in changed]
    more = MORE.get(name, []) if not rest or rest[0] != "card" else []
    return [name, *(word.replace("YOUR_NAME", "user") for word in changed), *more]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_of_a_recipe_runs(
    recipe: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add_repo(small_backbone(RECIPES[recipe], tmp_path / "backbone"), tmp_path / "backbone")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for number in range(6):
        Path(f"{number}.png").write_bytes(png(number))
    rows = [{"image": f"{number}.png", "label": ("dax", "wug")[number % 2]} for number in range(6)]
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in SECTIONS[recipe]:
        line = " ".join(command)
        if command[:2] == ["python", "-c"]:
            subprocess.run([sys.executable, *command[1:]], check=True)
        elif command[0] != "aim":
            fetch = next((some for start, some in FETCHING.items() if line.startswith(start)), None)
            assert fetch is not None, f"{line} is neither run nor replaced by what it leaves"
            fetch(command[1:])
        else:
            given = smaller(command)
            if "image_settings" not in OPTIONS and "--image" in given:  # until aim train has them
                place = given.index("--image")
                del given[place : place + 2]
            if "dry_run" not in OPTIONS and given[0] == "train" and "--dry-run" in given:
                continue
            before = sorted(Path().iterdir())
            done = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
            assert done.exit_code == 0, f"{line}\n{done.output}"
            if "--dry-run" in given:
                assert sorted(Path().iterdir()) == before, "a dry run wrote something"
    (published,) = [name for name in hub.repos if name.startswith("user/")]
    files = hub.files(published)
    assert "aim_projector.safetensors" in files and b"## Few-shot evaluation" in files["README.md"]
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_the_recipes_lead_from_the_data_to_the_published_repository() -> None:
    assert list(SECTIONS) == list(RECIPES) and "estimate" in PAGE
    for some in SECTIONS.values():
        named = [command[1] for command in some if command[0] == "aim"]
        assert named[-4:] == ["train", "eval", "eval", "publish"]
        runs = [command for command in some if command[:2] == ["aim", "train"]]
        assert runs[0] == [*runs[1], "--dry-run"]  # the estimate is of the same run
        assert all(
            any(" ".join(c).startswith(start) for start in FETCHING) for c in some if c[0] not in ("aim", "python")
        )
