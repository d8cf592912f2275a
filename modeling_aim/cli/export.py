"""`aim export-prompt-embeds`: a prompt with its fused tokens as embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..data.demonstrations import read_demonstrations
from .loading import LoadingSettings
from .options import check_least, command
from .terminal import safe, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class ExportSettings(LoadingSettings):
    """What `aim export-prompt-embeds` takes.

    Args:
        repo: AIM repository: a folder or a Hub id.
        output: file to write (safetensors, with one tensor prompt_embeds).
        question: question about the query.
        demos: file with one demonstration a line.
        bank: instead of --demos, a bank: a folder or a Hub id.
        shots: demonstrations to select from the bank.
        select: selection strategy: random, image, text, fused or mmices.
        image: image of the query: a file or a URL.
    """

    repo: str
    output: Path
    question: str
    demos: Path | None = None
    bank: str | None = None
    shots: int = 8
    select: str = "random"
    image: str | None = None

    def __post_init__(self) -> None:
        check_least(self, 1, "shots")
        if self.demos is not None and self.bank is not None:
            raise ValueError("Give --demos FILE or --bank BANK, not both.")


@command(app, "aim export-prompt-embeds")
def export_prompt_embeds(settings: ExportSettings) -> None:
    """Write the assembled prompt as embeddings, for an engine that takes them (vLLM's prompt_embeds).

    Backbones whose decoder needs more than embeddings are refused; docs/BANK.md lists them. An engine trusts the
    embeddings that it is sent: let only callers you trust send them.
    """
    from safetensors.torch import save_file

    from .. import DemonstrationBank
    from ..images_aim import open_image

    model: Any = settings.load(settings.repo)
    image = None if settings.image is None else open_image(settings.image)
    query = {**({} if image is None else {"image": image}), "question": settings.question}
    demos: Any = None if settings.demos is None else list(read_demonstrations(settings.demos))
    if settings.bank is not None:
        demos = DemonstrationBank.from_pretrained(settings.bank, model).select(query, settings.shots, settings.select)
    embeddings = model.prompt_embeds(model.query_inputs(query), demos=demos)[0]
    save_file({"prompt_embeds": embeddings.cpu().contiguous()}, settings.output)
    wide_console().print(
        f"{safe(settings.output)}: {embeddings.shape[0]} positions of width {embeddings.shape[1]}", soft_wrap=True
    )
