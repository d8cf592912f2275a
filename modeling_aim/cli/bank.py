"""The `aim bank` commands.

aim bank build --repo hub_configs/aim-tiny --demos demos.jsonl --output my-bank
aim bank inspect my-bank
aim bank select my-bank --repo hub_configs/aim-tiny --image query.png --output chosen.png
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..data.jsonl import read_demonstrations
from .loading import LoadingSettings
from .options import check_least, command
from .terminal import errors, print_json, safe, wide_console

if TYPE_CHECKING:
    from PIL import Image

app = typer.Typer(
    help="Demonstrations read once: build, inspect and choose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True, kw_only=True)
class BuildSettings(LoadingSettings):
    """What `aim bank build` takes.

    Args:
        repo: AIM repository: a folder or a Hub id.
        output: folder of the bank; an interrupted build is resumed.
        demos: file with one demonstration a line: image, and text, label or question and answer.
        dataset: instead of --demos, a dataset of the Hub, streamed.
        split: split of the dataset.
        columns: columns of the dataset, such as image=img,label=fine_label.
        limit: most demonstrations to read.
        batch_size: demonstrations read and written together.
        storage: auto, float32, bfloat16, float16 or int8.
        keep_states: keep hidden states, to put another projector on them later.
        thumbnails: side of the small images that are kept, in pixels; 0 keeps none.
        on_bad_row: what to do with a bad row: skip (and name it) or raise.
        max_bad_rows: bad rows after which the build stops.
    """

    repo: str
    output: Path
    demos: Path | None = None
    dataset: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8
    storage: str = "auto"
    keep_states: bool = False
    thumbnails: int = 96
    on_bad_row: str = "skip"
    max_bad_rows: int = 100

    def __post_init__(self) -> None:
        check_least(self, 1, "limit", "batch_size")
        check_least(self, 0, "thumbnails", "max_bad_rows")
        if (self.demos is None) == (self.dataset is None):
            raise ValueError("Give --demos FILE or --dataset NAME, one of them.")


@command(app, "aim bank build")
def build(settings: BuildSettings) -> None:
    """Read demonstrations into a bank; rerun the same command to resume."""
    from .. import DemonstrationBank
    from ..image_settings import tokens_line

    stream: Iterable[Any]
    if settings.demos is None:
        stream = _streamed(settings.dataset, settings.split, settings.limit)
    else:
        stream = list(read_demonstrations(settings.demos))[: settings.limit]
    model: Any = settings.load(settings.repo)
    errors.print(tokens_line(model.processor), soft_wrap=True, highlight=False)
    bank = DemonstrationBank.build(
        model,
        stream,
        settings.output,
        columns=settings.columns or None,
        batch_size=settings.batch_size,
        storage=settings.storage,
        keep_states=settings.keep_states,
        thumbnails=settings.thumbnails,
        total=settings.limit,
        on_bad_row=settings.on_bad_row,
        max_bad_rows=settings.max_bad_rows,
    )
    wide_console().print(
        f"{safe(settings.output)}: {len(bank)} demonstrations, {bank.num_tokens} fused tokens, {_bytes(bank.nbytes)}"
        + (f", merged duplicates: {bank.duplicates}" if bank.duplicates else "")
        + (f", bad rows left out: {len(bank.bad_rows)}" if bank.bad_rows else ""),
        soft_wrap=True,
    )


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What `aim bank inspect` takes.

    Args:
        bank: the bank: a folder or a Hub id.
        verify: read every file whole and compare its sha256.
        skip_damaged: show what is left of a damaged bank.
        revision: revision of the bank.
        as_json: print one JSON object instead of a table.
    """

    bank: str
    verify: bool = False
    skip_damaged: bool = False
    revision: str | None = None
    as_json: bool = False


@command(app, "aim bank inspect", positional=("bank",))
def inspect(settings: InspectSettings) -> None:
    """Show what is in a bank: counts, labels, tokens, bytes, and what read it."""
    from .. import DemonstrationBank

    revision: dict[str, Any] = {"revision": settings.revision} if settings.revision else {}
    damaged = "skip" if settings.skip_damaged else "raise"
    opened = DemonstrationBank.from_pretrained(settings.bank, damaged=damaged, **revision)
    if settings.verify:
        opened.verify()
    info = opened.info()
    if settings.as_json:
        print_json(info)
        return
    table = Table("", "", title=safe(settings.bank), show_header=False)
    labels = info.pop("labels")
    for name, value in info.pop("source").items():
        table.add_row(safe(name), safe(str(value)))
    for name, value in info.items():
        table.add_row(name.replace("_", " "), _bytes(value) if name == "bytes" else safe(_shown(value)))
    more = ", ..." if len(labels) > 20 else ""
    table.add_row(f"labels ({len(labels)})", safe(_shown(dict(list(labels.items())[:20])) + more))
    wide_console().print(table)


@dataclass(frozen=True, kw_only=True)
class SelectSettings(LoadingSettings):
    """What `aim bank select` takes.

    Args:
        bank: the bank: a folder or a Hub id.
        repo: AIM repository: a folder or a Hub id.
        image: image of the query: a file or a URL.
        question: question about the query.
        shots: demonstrations to select.
        select: selection strategy: random, image, text, fused or mmices.
        seed: seed of random.
        balanced: take labels in turn.
        output: picture of the query and the selected demonstrations (PNG).
        as_json: print JSON instead of a table.
    """

    bank: str
    repo: str
    image: str | None = None
    question: str | None = None
    shots: int = 8
    select: str = "image"
    seed: int = 0
    balanced: bool = True
    output: Path | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "shots")


@command(app, "aim bank select", positional=("bank",))
def select(settings: SelectSettings) -> None:
    """Select demonstrations for a query, and show them."""
    from .. import DemonstrationBank
    from ..images_aim import open_image

    image = None if settings.image is None else open_image(settings.image)
    model: Any = settings.load(settings.repo)
    opened = DemonstrationBank.from_pretrained(settings.bank, model)
    query = {
        **({} if image is None else {"image": image}),
        **({"question": settings.question} if settings.question else {}),
    }
    chosen = opened.choose(query, settings.shots, settings.select, seed=settings.seed, balanced=settings.balanced)
    numbers = [number for number, _ in chosen]
    texts, labels = opened.texts(numbers), opened.labels(numbers)
    if settings.output is not None:
        captions = [f"{score:.2f}  {text}" for (_, score), text in zip(chosen, texts, strict=True)]
        contact_sheet(image, settings.question or "", opened.thumbnails(numbers), captions).save(settings.output)
    rows = [
        {"number": number, "score": round(score, 4), "label": label, "text": text}
        for (number, score), label, text in zip(chosen, labels, texts, strict=True)
    ]
    if settings.as_json:
        print_json(rows)
        return
    title = f"{len(rows)} of {len(opened)} by {settings.select}, most similar last"
    table = Table("number", "score", "label", "text", title=title)
    for row in rows:
        table.add_row(*(safe("" if value is None else str(value)) for value in row.values()))
    wide_console().print(table)


def _streamed(dataset: str | None, split: str, limit: int | None) -> Any:
    """A streamed dataset of the Hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("--dataset needs the datasets library: pip install datasets") from error
    data = load_dataset(dataset, split=split, streaming=True)
    return data if limit is None else data.take(limit)


def _shown(value: object) -> str:
    """A value of `bank.info()` for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items()) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def contact_sheet(
    query: Image.Image | None, question: str, thumbnails: Sequence[bytes], says: Sequence[str], side: int = 112
) -> Any:
    """A picture of the query and, row by row, of what was chosen for it, most similar last.

    Args:
        query: its image, or `None`.
        question: its words.
        thumbnails: JPEGs of the chosen demonstrations, empty where there is none.
        says: what stands under each.
        side: size of a picture in pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    from ..bank.pictures import open_thumbnail

    columns = min(6, max(len(thumbnails), 1))
    rows = -(-len(thumbnails) // columns)
    cell_width, cell_height, edge = side + 32, side + 46, 10
    sheet = Image.new("RGB", (columns * cell_width + edge, (rows + 1) * cell_height + edge), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)

    def place(picture: Image.Image | None, text: str, column: int, row: int, frame: str) -> None:
        x, y = edge + column * cell_width, edge + row * cell_height
        if picture is not None:
            small = picture.copy()
            small.thumbnail((side, side))
            sheet.paste(small, (x, y))
        draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=frame, width=2)
        for line in range(3):
            draw.text((x, y + side + 4 + 13 * line), text[22 * line : 22 * (line + 1)], fill="black", font=font)

    place(query, f"query  {question}", 0, 0, "#c03020")
    for i, (small, text) in enumerate(zip(thumbnails, says, strict=True)):
        picture = open_thumbnail(small) if small else None
        place(picture, text, i % columns, 1 + i // columns, "#b0b0b0")
    return sheet
