"""`aim tune`: the depth at which states enter, found on demonstrations of your own.

aim tune --repo my-aim --demos demos.jsonl --picture depth.png
aim tune --backbone llava-hf/llava-1.5-7b-hf --demos demos.jsonl --output my-aim --load-in-4bit
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..data.jsonl import read_demonstrations, read_json
from .terminal import errors, reported, whole_numbers

if TYPE_CHECKING:
    from ..choice_aim import DepthChoice

BAR = 16  # characters of the longest bar


def tune(
    demos: Annotated[
        list[Path],
        typer.Option(help="Demonstrations: a jsonl file, or a folder with a folder a label; again for another task."),
    ],
    repo: Annotated[str | None, typer.Option(help="AIM repository without weights: a folder or a Hub id.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Instead of it: a backbone, a folder or a Hub id.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write a repository with the depth here, rather than into that of --repo.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the likelihood by depth (PNG).")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Depths to compare, e.g. 8,12,16; by default up to a dozen.")
    ] = None,
    most: Annotated[int, typer.Option(min=2, help="Most demonstrations of a task that are used.")] = 32,
    prompts: Annotated[str, typer.Option(help="How questions are put: chat or plain.")] = "chat",
    seed: Annotated[int, typer.Option(help="Decides which are used where there are more.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, and write no configuration.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the repository or backbone.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Backbone's precision: bfloat16, float16 or float32.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit backbone, for a laptop.")] = False,
    device_map: Annotated[str | None, typer.Option(help='Where the backbone goes, e.g. "auto" or "cuda".')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Find the depth at which states should enter: leave each demonstration out, and ask the others for its answer."""
    with reported("aim tune"):
        _check(repo, backbone, revision, output, picture, dry_run)
        tasks = [_demonstrations(path) for path in demos]
        model = _load(repo, backbone, revision, dtype, load_in_4bit, device_map)
        before = model.config.read_layers
        with _progress() as told:
            choice = model.choose_depth(
                tasks, whole_numbers("--depths", depths), most=most, prompts=prompts, seed=seed, progress=told
            )
        drawn = None if picture is None else draw(choice, picture)
        said = "Nothing was written (--dry-run)." if dry_run else _keep(choice, model, repo, output, before)
    if as_json:
        about = {**choice.to_dict(), "picture": None if drawn is None else str(drawn), "config": said}
        typer.echo(json.dumps(about, ensure_ascii=False))
        return
    console = Console()
    console.print(_table(choice))
    for line in (choice.verdict, *choice.notes, said, *([] if drawn is None else [str(drawn)])):
        console.print(escape(line), soft_wrap=True, highlight=False)


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
            raise ValueError(f"{repo} is no AIM repository. Choose a depth for a backbone with --backbone {repo}.")
        check_weightless(AimConfig.from_pretrained(repo, revision=revision or "main"))


def _demonstrations(path: Path) -> list[dict[str, Any]]:
    """Those of a jsonl file, or of a folder with images in a folder a label."""
    if not path.is_dir():
        return list(read_demonstrations(path))
    from ..data.link_context import class_folders

    return [{"image": image, "label": one.name} for one in class_folders(path) for image in one.images]


def _load(
    repo: str | None,
    backbone: str | None,
    revision: str | None,
    dtype: str | None,
    load_in_4bit: bool,
    device_map: str | None,
) -> Any:
    import torch

    from .. import AimForConditionalGeneration, laptop_quantization_config
    from ..runs import PRECISIONS

    if dtype is not None and dtype not in PRECISIONS:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(PRECISIONS)}.")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    options["device_map"] = device_map or ("cuda" if torch.cuda.is_available() else None)
    options |= {"dtype": PRECISIONS[dtype]} if dtype else {}
    options |= {"quantization_config": laptop_quantization_config()} if load_in_4bit else {}
    if repo is not None:
        return AimForConditionalGeneration.from_pretrained(repo, **options)
    return AimForConditionalGeneration.from_backbone(str(backbone), **options)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """What `choose_depth` reports to: a bar on a terminal, a line each tenth elsewhere."""
    if errors.is_terminal:
        with Progress(console=errors, transient=True) as bar:
            task = bar.add_task("prompts", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    tenth = 0

    def told(done: int, total: int) -> None:
        nonlocal tenth
        if 10 * done // total > tenth:
            tenth = 10 * done // total
            errors.print(f"{done} of {total} prompts", highlight=False)

    yield told


def _keep(choice: DepthChoice, model: Any, repo: str | None, output: Path | None, before: list[int]) -> str:
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
    return f"{path}: read_layers and entry_layers are {[choice.depth]} now; they were {before}."


def write_depth(path: Path, depth: int) -> None:
    """Change the depth in the config.json of an AIM repository; everything else stays as it is.

    Args:
        path: of the file, which is replaced as a whole.
        depth: the new one.
    """
    from ..files_aim import write_whole

    config = read_json(path)
    config |= {"read_layers": [depth], "entry_layers": [depth]}
    write_whole(path, (json.dumps(config, indent=2) + "\n").encode())


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
