"""`aim export-chat`: demonstrations for the chat completions of vLLM.

aim export-chat --repo REPOSITORY --bank my-bank --shots 8 --output for-vllm
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ..data.demonstrations import read_demonstrations
from .loading import LoadingSettings
from .options import check_least, command
from .terminal import safe

MESSAGE_FILE, TEMPLATE_FILE = "demonstrations.json", "chat_template.jinja"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class ExportChatSettings(LoadingSettings):
    """What `aim export-chat` takes.

    Args:
        repo: AIM repository: a folder or a Hub id.
        output: folder for demonstrations.json and chat_template.jinja.
        bank: a bank: a folder or a Hub id.
        demos: instead of --bank, a file with one demonstration a line.
        shots: demonstrations to take at random, labels in turn; by default all.
        seed: decides which.
    """

    repo: str
    output: Path
    bank: str | None = None
    demos: Path | None = None
    shots: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "shots")
        if (self.bank is None) == (self.demos is None):
            raise ValueError("Give --bank BANK or --demos FILE, one of them.")


@command(app, "aim export-chat")
def export_chat(settings: ExportChatSettings) -> None:
    """Write the chat message that gives demonstrations to vLLM, and the chat template that places them.

    It works for LLaVA, Qwen2-VL and Qwen2.5-VL with a projector for the input; docs/SERVING.md has the versions and a
    request. vLLM trusts the embeddings that it is sent: let only callers you trust send them.
    """
    from .. import DemonstrationBank
    from ..files_aim import write_whole
    from ..serving.vllm import begins_with_bos, chat_message, chat_template, check_exportable

    model: Any = settings.load(settings.repo)
    check_exportable(model)
    template = chat_template(model.processor, begins_with_bos(model))
    if settings.bank is not None:
        bank = DemonstrationBank.from_pretrained(settings.bank, model)
    else:
        bank = DemonstrationBank(model.read(list(read_demonstrations(Path(str(settings.demos))))))
    fused = bank.fused if settings.shots is None else bank.select(k=settings.shots, seed=settings.seed)
    settings.output.mkdir(parents=True, exist_ok=True)
    message = json.dumps(chat_message(fused)) + "\n"
    write_whole(settings.output / MESSAGE_FILE, message.encode())
    write_whole(settings.output / TEMPLATE_FILE, template.encode())
    console = Console()
    console.print(
        f"{safe(settings.output / MESSAGE_FILE)}: {len(fused)} demonstrations, {fused.num_tokens} tokens of width "
        f"{fused.vectors.shape[1]}, {len(message) / 1e6:.1f} MB. Put it before the messages of a request.",
        soft_wrap=True,
    )
    console.print(
        f"vllm serve {safe(model.config.backbone_name_or_path or 'BACKBONE')} --enable-prompt-embeds "
        f"--chat-template {safe(settings.output / TEMPLATE_FILE)} --chat-template-content-format openai",
        soft_wrap=True,
        highlight=False,
    )
