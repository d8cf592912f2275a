"""`aim answer --repo hub_configs/aim-tiny --demos demos.jsonl --image q.png --question "..."`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from ..data.jsonl import read_demonstrations
from .loading import LoadingSettings
from .options import check_least, command
from .terminal import print_json, safe, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(LoadingSettings):
    """What `aim answer` takes.

    Args:
        repo: AIM repository: a folder or a Hub id.
        demos: file with one demonstration a line: image, and text, label or question and answer.
        question: question about the query.
        image: image of the query: a file or a URL. Without it the question is asked as text alone.
        max_new_tokens: most tokens of the answer.
        as_json: print one JSON object instead of a table.
    """

    repo: str
    demos: Path
    question: str
    image: str | None = None
    max_new_tokens: int = 32
    as_json: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "max_new_tokens")


@command(app, "aim answer")
def answer(settings: AnswerSettings) -> None:
    """Answer a question, about an image or as text alone, from demonstrations of your own."""
    result = answered(settings, list(read_demonstrations(settings.demos)))
    if settings.as_json:
        print_json(result)
        return
    table = Table("answer", "demonstrations", "prompt tokens", "of them fused", "read ms", "answer ms")
    table.add_row(safe(result["answer"]), *(str(result[key]) for key in list(result)[1:]))
    wide_console().print(table)


def answered(settings: AnswerSettings, demos: list[dict[str, Any]]) -> dict[str, Any]:
    """Load, read the demonstrations, answer; with tokens and milliseconds."""
    from ..images_aim import open_image

    model: Any = settings.load(settings.repo)
    processor = model.processor
    images = None if settings.image is None else [open_image(settings.image)]
    prompt = processor.prompt(settings.question, images=0 if images is None else 1)
    inputs = processor(images=images, text=prompt, return_tensors="pt").to(model.device, model.dtype)
    start = time.perf_counter()
    fused = model.read(demos)
    read = time.perf_counter()
    ids = model.generate(**inputs, demos=fused, max_new_tokens=settings.max_new_tokens, do_sample=False)
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
