"""The `aim` command: `aim answer --repo hub_configs/aim-tiny --demos demos.jsonl --image q.png --question "..."`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..data.jsonl import read_demonstrations
from .attention import attention
from .bank import bank_app, export_prompt_embeds
from .bench import bench
from .eval import eval_app
from .terminal import errors, reported, whole_numbers
from .train import train

app = typer.Typer(
    help="Few-shot demonstrations for any vision-language model, at a few tokens each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bank_app, name="bank")
app.add_typer(eval_app, name="eval")
eval_app.command()(attention)
app.command()(export_prompt_embeds)
app.command()(train)
app.command()(bench)


@app.callback()
def main() -> None:
    """Few-shot demonstrations for any vision-language model, at a few tokens each."""


@app.command()
def answer(
    repo: Annotated[str, typer.Option(help="AIM repository: a folder or a Hub id.")],
    demos: Annotated[Path, typer.Option(help="One demonstration a line: image, and text, label or question+answer.")],
    question: Annotated[str, typer.Option(help="What is asked of the query.")],
    image: Annotated[str | None, typer.Option(help="The query's image: a file or a URL.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the repository.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit backbone, for a laptop.")] = False,
    device_map: Annotated[str | None, typer.Option(help='Where the backbone goes, e.g. "auto" or "cuda".')] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Answer a question about an image from demonstrations of your own."""
    with reported("aim answer"):
        examples = list(read_demonstrations(demos))
        result = _answer(repo, examples, question, image, revision, load_in_4bit, device_map, max_new_tokens)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    table = Table("answer", "demonstrations", "prompt tokens", "of them fused", "read ms", "answer ms")
    table.add_row(result["answer"], *(str(result[key]) for key in list(result)[1:]))
    Console().print(table)


@app.command()
def init(
    backbone: Annotated[str, typer.Argument(help="Backbone: a Hub id or a folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the new repository.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the backbone.")] = None,
    preset: Annotated[
        str, typer.Option(help="untrained (no weights), trained (a projector at depth) or paper.")
    ] = "untrained",
    read_layers: Annotated[
        str | None, typer.Option(help="Depths that are read, e.g. 13 or 12,24; by default two fifths of the layers.")
    ] = None,
    entry_layers: Annotated[
        str | None, typer.Option(help="Where states enter: 0 is the input; by default where they were read.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="identity, residual, residual_mlp; for the input also linear, linear_norm, mlp.")
    ] = None,
    max_fused_tokens: Annotated[int | None, typer.Option(help="Most fused tokens a demonstration.")] = None,
    include_backbone: Annotated[
        bool, typer.Option("--include-backbone", help="Copy the backbone too: a repository that needs no other.")
    ] = False,
) -> None:
    """Make an AIM repository for a backbone: without weights, or with a projector to train."""
    with reported("aim init"):
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} is not empty; give a new folder with --output.")
        from .. import AimForConditionalGeneration

        model = AimForConditionalGeneration.from_backbone(
            backbone,
            revision=revision,
            preset=preset,
            read_layers=whole_numbers("--read-layers", read_layers),
            entry_layers=whole_numbers("--entry-layers", entry_layers),
            projector_form=form,
            max_fused_tokens=max_fused_tokens,
        )
        model.save_pretrained(output, include_backbone=include_backbone)
        parameters = sum(p.numel() for p in model.projector.parameters())
        weights = f"an untrained projector of {parameters:,} parameters" if parameters else "no weights are needed"
        Console().print(f"{output}: AIM for {backbone}, read at {model.config.read_layers}; {weights}.")


@app.command()
def check(
    backbone: Annotated[str, typer.Argument(help="Backbone, or AIM repository: a Hub id or a folder.")],
    revision: Annotated[str | None, typer.Option(help="Its revision.")] = None,
    from_config: Annotated[
        bool, typer.Option("--from-config", help="Random weights and two layers, from its config: no weights needed.")
    ] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit backbone.")] = False,
    device_map: Annotated[str | None, typer.Option(help='Where the backbone goes, e.g. "auto" or "cuda".')] = None,
) -> None:
    """Try what AIM promises on a backbone, before any training, and print what holds."""
    from ..checks import check_model, run_checks

    failed = 0
    with reported("aim check"):
        model = check_model(backbone, revision, from_config, load_in_4bit, device_map)
        table = Table("", "property", "", title=f"{backbone} ({model.backbone.config.model_type})")
        for statement, problem in track(run_checks(model), description="checking", transient=True, console=errors):
            failed += problem is not None
            table.add_row("[red]no[/]" if problem else "[green]yes[/]", statement, escape(problem or ""))
        Console().print(table)
    if failed:
        errors.print(f"{failed} properties do not hold on {backbone}.")
        raise typer.Exit(1)


def _answer(
    repo: str,
    demos: list[dict[str, Any]],
    question: str,
    image: str | None,
    revision: str | None,
    load_in_4bit: bool,
    device_map: str | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Load, read the demonstrations, answer; with what it cost."""
    from transformers.image_utils import load_image

    from .. import AimForConditionalGeneration, AimProcessor, laptop_quantization_config

    place = {"revision": revision} if revision else {}
    options: dict[str, Any] = {**place, "quantization_config": laptop_quantization_config() if load_in_4bit else None}
    options["device_map"] = device_map
    processor = AimProcessor.from_pretrained(repo, **place)
    model = AimForConditionalGeneration.from_pretrained(repo, **options)
    pictures = None if image is None else [load_image(image).convert("RGB")]
    prompt = processor.prompt(question, images=0 if image is None else 1)
    inputs = processor(images=pictures, text=prompt, return_tensors="pt").to(model.device, model.dtype)
    start = time.perf_counter()
    fused = model.read(demos)
    read = time.perf_counter()
    ids = model.generate(**inputs, demos=fused, max_new_tokens=max_new_tokens, do_sample=False)
    done = time.perf_counter()
    length = inputs["input_ids"].shape[1]
    return {
        "answer": processor.decode(ids[0, length:], skip_special_tokens=True).strip(),
        "demonstrations": len(fused),
        "prompt_tokens": length + fused.num_tokens,
        "fused_tokens": fused.num_tokens,
        "read_ms": round(1000 * (read - start), 1),
        "answer_ms": round(1000 * (done - read), 1),
    }
