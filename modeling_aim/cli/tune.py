"""`aim tune`: the depth at which states enter, found on demonstrations of your own.

aim tune --repo my-aim --demos demos.jsonl --picture depth.png
aim tune --backbone llava-hf/llava-1.5-7b-hf --demos demos.jsonl --output my-aim --load-in-4bit
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..choice_aim import DepthChoice
from ..data.demonstrations import read_demonstrations
from ..data.jsonl import read_json
from ..files_aim import write_whole
from ..image_settings import tokens_line
from ..progress import show_progress
from .loading import LoadingSettings
from .options import check_least, command
from .terminal import errors, print_json, safe, wide_console

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration

BAR = 16  # characters of the longest bar


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class TuneSettings(LoadingSettings):
    """What `aim tune` takes.

    Args:
        demos: demonstrations, a jsonl file or a folder with a folder for each label; several times for several tasks.
        repo: AIM repository without weights, a folder or a Hub id.
        backbone: instead of a repository, a backbone.
        output: folder of a new repository with the depth; by default the configuration of the repository is changed.
        picture: picture of the likelihood by depth (PNG).
        depths: depths to compare, such as 8,12,16; by default up to a dozen.
        most: most demonstrations of a task that are used.
        prompts: how questions are written: chat or plain.
        seed: decides which demonstrations are used where there are more.
        dry_run: show the result and write no configuration.
        as_json: print one JSON object instead of a table.
    """

    demos: tuple[Path, ...]
    repo: str | None = None
    backbone: str | None = None
    output: Path | None = None
    picture: Path | None = None
    depths: tuple[int, ...] | None = None
    most: int = 32
    prompts: str = "chat"
    seed: int = 0
    dry_run: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        check_least(self, 2, "most")


@command(app, "aim tune")
def tune(settings: TuneSettings) -> None:
    """Find the depth at which states should enter: leave each demonstration out, and ask the others for its answer."""
    repo, output = settings.repo, settings.output
    _check(repo, settings.backbone, settings.revision, output, settings.picture, settings.dry_run)
    tasks = [list(read_demonstrations(path)) for path in settings.demos]
    model = _load(settings)
    errors.print(tokens_line(model.processor), soft_wrap=True, highlight=False)
    if settings.backbone is not None and output is None and not settings.dry_run:
        errors.print("Nothing will be written: --output DIR makes a repository with the depth.", highlight=False)
    before = model.config.read_layers
    with _progress() as report:
        choice = model.choose_depth(
            tasks, settings.depths, most=settings.most, prompts=settings.prompts, seed=settings.seed, progress=report
        )
    drawn = None if settings.picture is None else draw(choice, settings.picture)
    kept = "Nothing was written (--dry-run)." if settings.dry_run else _keep(choice, model, repo, output, before)
    if settings.as_json:
        print_json({**choice.to_dict(), "picture": None if drawn is None else str(drawn), "config": kept})
        return
    console = wide_console()
    console.print(_table(choice))
    for line in (choice.verdict, *choice.notes, kept, *([] if drawn is None else [str(drawn)])):
        console.print(safe(line), soft_wrap=True, highlight=False)


def _check(
    repo: str | None,
    backbone: str | None,
    revision: str | None,
    output: Path | None,
    picture: Path | None,
    dry_run: bool,
) -> None:
    """Raise `ValueError` before anything is loaded for what cannot end well."""
    from ..configuration_aim import AimConfig
    from ..depth_aim import check_weightless
    from ..evaluation.subject import has_aim

    if (repo is None) == (backbone is None):
        raise ValueError("Give --repo or --backbone, one of them.")
    if output is not None and not dry_run and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; give a new folder with --output.")
    if picture is not None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ValueError('--picture needs matplotlib: pip install "modeling-aim[demo]"') from error
    if repo is not None:
        if not has_aim(repo, revision):
            raise ValueError(f"{repo} is not an AIM repository. Choose a depth for a backbone with --backbone {repo}.")
        check_weightless(AimConfig.from_pretrained(repo, revision=revision or "main"))


def _load(settings: TuneSettings) -> Any:
    from .. import AimForConditionalGeneration

    if settings.repo is not None:
        return settings.load(settings.repo)
    return settings.with_images(
        AimForConditionalGeneration.from_backbone(str(settings.backbone), **settings.options())
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """What `choose_depth` reports to."""
    with ExitStack() as stack:
        report: Callable[[int, str], None] | None = None
        before = 0

        def so_far(done: int, total: int) -> None:
            nonlocal report, before
            if report is None:
                report = stack.enter_context(show_progress("tune", "prompts", total))
            report(done - before, "")
            before = done

        yield so_far


def _keep(
    choice: DepthChoice, model: AimForConditionalGeneration, repo: str | None, output: Path | None, before: list[int]
) -> str:
    """Write the depth where it belongs; what was done, in a sentence."""
    if output is not None:
        choice.apply(model).save_pretrained(output)
        return f"{output}: an AIM repository that reads and puts back states at {[choice.depth]}."
    if not choice.beats_words:
        return "The configuration was left as it is."
    if repo is None or not os.path.isdir(repo):
        return f"Nothing was written. Give --output DIR for a repository with the depth {choice.depth}."
    path = Path(repo) / "config.json"
    if before == [choice.depth]:
        return f"{path} has this depth already."
    write_depth(path, choice.depth)
    card = path.with_name("README.md")
    named = " The model card names it too." if write_depth_on_card(card, before, choice.depth) else ""
    return f"{path}: read_layers and entry_layers are {[choice.depth]} now; they were {before}.{named}"


def write_depth(path: Path, depth: int) -> None:
    """Change the depth in the config.json of an AIM repository; everything else stays as it is.

    Args:
        path: of the file, which is replaced as a whole.
        depth: the new one.
    """
    config = read_json(path)
    config |= {"read_layers": [depth], "entry_layers": [depth]}
    write_whole(path, (json.dumps(config, indent=2) + "\n").encode())


def write_depth_on_card(path: Path, before: list[int], depth: int) -> bool:
    """Change the depth where the model card names it; everything else stays as it is.

    Args:
        path: of the card, which is replaced as a whole.
        before: the depth that it names.
        depth: the new one.

    Returns:
        Whether it named the depth.
    """
    if not path.is_file():
        return False
    card = path.read_text(encoding="utf-8")
    changed = card
    for words in ("| read | states after {} layers", "| enter | input of decoder layer {}, where"):
        changed = changed.replace(words.format(before), words.format([depth]))
    if changed != card:
        write_whole(path, changed.encode())
    return changed != card


def _table(choice: DepthChoice) -> Table:
    """The rows of a choice, with bars from the least likely to the most likely."""
    table = Table("", "log-likelihood", "", "over words only", "exact")
    lowest, highest = (pick(row.log_likelihood for row in choice.rows) for pick in (min, max))
    for row in choice.rows:
        length = (row.log_likelihood - lowest) / max(highest - lowest, 1e-9)
        chosen = choice.beats_words and row.depth == choice.depth
        over = "" if row.depth == 0 else f"{row.over_words:+.3f} ± {row.over_words_error:.3f}"
        table.add_row(
            f"[bold]{row.name}[/]" if chosen else row.name,
            f"{row.log_likelihood:.3f} ± {row.error:.3f}",
            f"[{'green' if chosen else 'blue'}]{'█' * round(BAR * length)}[/]",
            over,
            f"{row.accuracy:.2f}",
        )
    return table


def draw(choice: DepthChoice, path: Path) -> Path:
    """Draw the likelihood of the left-out answers, and how many were exact, by depth; needs matplotlib.

    Args:
        choice: what was found.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    zero, words, *deep = choice.rows
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    depths = [row.depth for row in deep]
    for axes, figure_of in zip(panels, ("log_likelihood", "accuracy"), strict=True):
        spread = [row.error for row in deep] if figure_of == "log_likelihood" else None
        axes.errorbar(depths, [getattr(row, figure_of) for row in deep], spread, marker="o", capsize=3, label="AIM")
        axes.axhline(getattr(words, figure_of), color="tab:orange", linestyle="--", label="words only")
        axes.axhline(getattr(zero, figure_of), color="tab:gray", linestyle=":", label="zero-shot")
        if choice.beats_words:
            axes.axvline(choice.depth, color="tab:green", alpha=0.4, label=f"chosen: {choice.depth}")
        axes.set_xlabel("depth: decoder layers below")
        axes.set_xticks(depths[:: -(-len(depths) // 16)])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("log-likelihood of a token (nats)")
    panels[1].set(ylabel="answers with every token likeliest", ylim=(-0.02, 1.02))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
    return path
