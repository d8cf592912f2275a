"""The `aim bank` commands, and `aim export-prompt-embeds`.

aim bank build --repo hub_configs/aim-tiny --demos demos.jsonl --output my-bank
aim bank inspect my-bank
aim bank select my-bank --repo hub_configs/aim-tiny --image query.png --output chosen.png
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data.jsonl import read_demonstrations
from .terminal import printable, reported

bank_app = typer.Typer(help="Demonstrations read once: build, inspect and choose.", no_args_is_help=True)

Repo = Annotated[str, typer.Option(help="AIM repository: a folder or a Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the AIM repository.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="4-bit backbone, for a laptop.")]
DeviceMap = Annotated[str | None, typer.Option(help='Where the backbone goes, e.g. "auto" or "cuda".')]
Bank = Annotated[str, typer.Argument(help="The bank: a folder or a Hub id.")]


@bank_app.command()
def build(
    repo: Repo,
    output: Annotated[Path, typer.Option(help="Folder of the bank; an interrupted build is resumed.")],
    demos: Annotated[
        Path | None, typer.Option(help="One demonstration a line: image, and text, label or question+answer.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead of --demos: a dataset of the Hub, streamed.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    columns: Annotated[
        str | None, typer.Option(help="Columns of the dataset, e.g. image=img,label=fine_label.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read no more than this many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Demonstrations read and put on disk together.")] = 8,
    storage: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or int8.")] = "auto",
    keep_states: Annotated[
        bool, typer.Option("--keep-states", help="Keep hidden states, to put another projector on them later.")
    ] = False,
    thumbnails: Annotated[int, typer.Option(min=0, help="Side of the small pictures that are kept; 0: none.")] = 96,
    on_bad_row: Annotated[str, typer.Option(help="What becomes of a bad row: skip (and name it) or raise.")] = "skip",
    max_bad_rows: Annotated[int, typer.Option(min=0, help="With more bad rows than this the build stops.")] = 100,
    revision: Revision = None,
    load_in_4bit: FourBit = False,
    device_map: DeviceMap = None,
) -> None:
    """Read demonstrations into a bank. Rerun after an interrupt to resume."""
    with reported("aim bank build"):
        from .. import DemonstrationBank

        if (demos is None) == (dataset is None):
            raise ValueError("Give --demos FILE or --dataset NAME, one of them.")
        stream: Iterable[Any] = _rows(dataset, split, limit) if demos is None else read_demonstrations(demos)
        if demos is not None:
            stream = list(stream)[:limit]
        pairs = [pair.split("=", 1) for pair in columns.split(",")] if columns else []
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"--columns {columns}: expected pairs such as image=img,label=fine_label.")
        bank = DemonstrationBank.build(
            _load(repo, revision, load_in_4bit, device_map),
            stream,
            output,
            columns=dict(pairs) or None,
            batch_size=batch_size,
            storage=storage,
            keep_states=keep_states,
            thumbnails=thumbnails,
            total=limit,
            on_bad_row=on_bad_row,
            max_bad_rows=max_bad_rows,
        )
    Console().print(
        f"{output}: {len(bank)} demonstrations, {bank.num_tokens} fused tokens, {_bytes(bank.nbytes)}"
        + (f", merged duplicates: {bank.duplicates}" if bank.duplicates else "")
        + (f", bad rows left out: {len(bank.bad_rows)}" if bank.bad_rows else ""),
        soft_wrap=True,
    )


@bank_app.command()
def inspect(
    bank: Bank,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file whole and compare its sha256.")] = False,
    skip_damaged: Annotated[bool, typer.Option("--skip-damaged", help="Show what is left of a damaged bank.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the bank.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Show what is in a bank: counts, labels, tokens, bytes, and what read it."""
    with reported("aim bank inspect"):
        from .. import DemonstrationBank

        place = {"revision": revision} if revision else {}
        opened = DemonstrationBank.from_pretrained(bank, damaged="skip" if skip_damaged else "raise", **place)
        if verify:
            opened.verify()
        info = opened.info()
    if as_json:
        typer.echo(printable(json.dumps(info, ensure_ascii=False)))
        return
    table = Table("", "", title=_words(bank), show_header=False)
    labels = info.pop("labels")
    for name, value in info.pop("source").items():
        table.add_row(_words(name), _words(value))
    for name, value in info.items():
        table.add_row(name.replace("_", " "), _bytes(value) if name == "bytes" else _words(_shown(value)))
    more = ", ..." if len(labels) > 20 else ""
    table.add_row(f"labels ({len(labels)})", _words(_shown(dict(list(labels.items())[:20])) + more))
    Console().print(table)


@bank_app.command()
def select(
    bank: Bank,
    repo: Repo,
    image: Annotated[str | None, typer.Option(help="The query's image: a file or a URL.")] = None,
    question: Annotated[str | None, typer.Option(help="The query's words.")] = None,
    k: Annotated[int, typer.Option("-k", "--shots", min=1, help="How many.")] = 8,
    by: Annotated[str, typer.Option(help="random, image, text, fused or mmices.")] = "image",
    seed: Annotated[int, typer.Option(help="Seed of random.")] = 0,
    balanced: Annotated[bool, typer.Option(help="Take labels in turn.")] = True,
    output: Annotated[Path | None, typer.Option(help="Picture of the query and what was chosen (PNG).")] = None,
    revision: Revision = None,
    load_in_4bit: FourBit = False,
    device_map: DeviceMap = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Choose demonstrations for a query, and show them."""
    with reported("aim bank select"):
        from transformers.image_utils import load_image

        from .. import DemonstrationBank

        picture = None if image is None else load_image(image).convert("RGB")
        opened = DemonstrationBank.from_pretrained(bank, _load(repo, revision, load_in_4bit, device_map))
        query = {**({} if picture is None else {"image": picture}), **({"question": question} if question else {})}
        chosen = opened.choose(query, k, by, seed=seed, balanced=balanced)
        numbers = [number for number, _ in chosen]
        texts, labels = opened.texts(numbers), opened.labels(numbers)
        if output is not None:
            says = [f"{score:.2f}  {text}" for (_, score), text in zip(chosen, texts, strict=True)]
            contact_sheet(picture, question or "", opened.thumbnails(numbers), says).save(output)
    rows = [
        {"number": number, "score": round(score, 4), "label": label, "text": text}
        for (number, score), label, text in zip(chosen, labels, texts, strict=True)
    ]
    if as_json:
        typer.echo(printable(json.dumps(rows, ensure_ascii=False)))
        return
    table = Table("number", "score", "label", "text", title=f"{len(rows)} of {len(opened)} by {by}, most alike last")
    for row in rows:
        table.add_row(*(_words("" if value is None else value) for value in row.values()))
    Console().print(table)


def export_prompt_embeds(
    repo: Repo,
    output: Annotated[Path, typer.Option(help="File to write (safetensors, with one tensor prompt_embeds).")],
    question: Annotated[str, typer.Option(help="What is asked of the query.")],
    demos: Annotated[Path | None, typer.Option(help="One demonstration a line.")] = None,
    bank: Annotated[str | None, typer.Option(help="Instead of --demos: a bank, a folder or a Hub id.")] = None,
    shots: Annotated[int, typer.Option(min=1, help="How many to choose from the bank.")] = 8,
    by: Annotated[str, typer.Option(help="How: random, image, text, fused or mmices.")] = "random",
    image: Annotated[str | None, typer.Option(help="The query's image: a file or a URL.")] = None,
    revision: Revision = None,
    load_in_4bit: FourBit = False,
    device_map: DeviceMap = None,
) -> None:
    """Write the assembled prompt as embeddings, for an engine that takes them (vLLM's prompt_embeds).

    Backbones whose decoder needs more than embeddings are refused; docs/BANK.md says which. An engine
    believes what it is sent: let only callers you trust send embeddings.
    """
    with reported("aim export-prompt-embeds"):
        from safetensors.torch import save_file
        from transformers.image_utils import load_image

        from .. import DemonstrationBank

        if demos is not None and bank is not None:
            raise ValueError("Give --demos FILE or --bank BANK, not both.")
        model = _load(repo, revision, load_in_4bit, device_map)
        picture = None if image is None else load_image(image).convert("RGB")
        query = {**({} if picture is None else {"image": picture}), "question": question}
        given: Any = None if demos is None else list(read_demonstrations(demos))
        if bank is not None:
            given = DemonstrationBank.from_pretrained(bank, model).select(query, shots, by)
        embeddings = model.prompt_embeds(model.query_inputs(query), demos=given)[0]
        save_file({"prompt_embeds": embeddings.cpu().contiguous()}, output)
    Console().print(f"{output}: {embeddings.shape[0]} positions of width {embeddings.shape[1]}", soft_wrap=True)


def _load(repo: str, revision: str | None, load_in_4bit: bool, device_map: str | None) -> Any:
    from .. import AimForConditionalGeneration, laptop_quantization_config

    options: dict[str, Any] = {"revision": revision} if revision else {}
    if load_in_4bit:
        options["quantization_config"] = laptop_quantization_config()
    return AimForConditionalGeneration.from_pretrained(repo, device_map=device_map, **options)


def _rows(dataset: str | None, split: str, limit: int | None) -> Any:
    """A streamed dataset of the Hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("--dataset needs the datasets library: pip install datasets") from error
    data = load_dataset(dataset, split=split, streaming=True)
    return data if limit is None else data.take(limit)


def _shown(value: Any) -> str:
    """A value of `bank.info()` for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items()) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _words(value: Any) -> str:
    """A value of a bank, which anybody may have made, for a table."""
    return escape(printable(str(value)))


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def contact_sheet(query: Any, question: str, thumbnails: Sequence[bytes], says: Sequence[str], side: int = 112) -> Any:
    """A picture of the query and, row by row, of what was chosen for it, most alike last.

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

    def place(picture: Any, text: str, column: int, row: int, frame: str) -> None:
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
