"""`aim serve`: an OpenAI-compatible server whose requests take demonstrations.

aim serve hub_configs/aim-tiny --bank shapes=my-bank --port 8000
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import typer
from packaging.version import Version

from ..serving.requests import ServingLimits
from .loading import LoadingSettings
from .options import check_least, command
from .terminal import errors, safe

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration

OLDEST = "5.23"  # transformers whose server this subclasses
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class ServeSettings(LoadingSettings, ServingLimits):
    """What `aim serve` takes.

    Args:
        repo: AIM repository: a folder or a Hub id.
        bank: a bank for requests to name, PATH or NAME=PATH; several times for several.
        name: what clients call the model; by default the repository as it was given.
        host: address to listen on.
        port: its port; 0 takes a free one.
        stop_seconds: time for requests in progress when the server is stopped.
    """

    repo: str
    bank: tuple[str, ...] = ()
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    stop_seconds: int = 30

    def __post_init__(self) -> None:
        check_least(self, 1, "queue", "max_body_mb", "max_images", "max_image_pixels", "max_new_tokens")
        check_least(self, 0, "port", "stop_seconds")


@command(app, "aim serve", positional=("repo",))
def serve(settings: ServeSettings) -> None:
    """Answer OpenAI chat completions; earlier (image, answer) turns of a chat become demonstrations.

    docs/SERVING.md has the fields of a request. Nobody is asked who they are: listen on other addresses only behind
    something that asks.
    """
    check_installed()
    from ..serving.app import build_app
    from ..serving.app import serve as run

    model: Any = settings.load(settings.repo)
    banks = {name: _opened(place, model) for name, place in _named(settings.bank).items()}
    name = settings.name or settings.repo
    built = build_app(name, model, banks, settings)
    named = f", banks: {', '.join(banks)}" if banks else ""
    errors.print(f"The model is {safe(name)}{safe(named)}.", soft_wrap=True, highlight=False)
    run(built, settings.host, settings.port, settings.stop_seconds)


def check_installed() -> None:
    """Raise `ImportError` where what a server needs is missing or too old."""
    install = 'Run: pip install --upgrade "modeling-aim[serve]"'
    missing = [name for name in ("fastapi", "uvicorn", "openai", "prometheus-client") if not _installed(name)]
    if missing:
        raise ImportError(f"aim serve needs {', '.join(missing)}. {install}")
    if Version(version("transformers")).release < Version(OLDEST).release:
        raise ImportError(f"aim serve needs transformers>={OLDEST}; {version('transformers')} is installed. {install}")


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _named(banks: tuple[str, ...]) -> dict[str, str]:
    """Places of banks by name; the last part of a place where no name was given."""
    named: dict[str, str] = {}
    for bank in banks:
        name, equals, place = bank.partition("=")
        name, place = (name, place) if equals else (PurePath(bank).name, bank)
        if not name or not place or name in named:
            raise ValueError(f"--bank {bank!r}: expected PATH or NAME=PATH, each name once.")
        named[name] = place
    return named


def _opened(place: str, model: AimForConditionalGeneration) -> Any:
    from .. import DemonstrationBank

    return DemonstrationBank.from_pretrained(place, model)
