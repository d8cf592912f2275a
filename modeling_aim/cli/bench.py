"""`aim bench`: what few-shot answers cost on a backbone, counted and measured."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from .terminal import errors, reported

ALL = "zero,full,prefix-kv,cold,bank,bank-kv,depth-cold,depth-bank,depth-bank-kv"


def bench(
    backbone: Annotated[str | None, typer.Option(help="Backbone, by its Hub id or folder.")] = None,
    shape: Annotated[str | None, typer.Option(help="Or random weights of a known size, e.g. smolvlm-256m.")] = None,
    shots: Annotated[str, typer.Option(help="Numbers of demonstrations.")] = "0,1,4,8,16,32",
    methods: Annotated[str, typer.Option(help="Which ways to answer; also cold-half and overhead.")] = ALL,
    demo_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a demonstration.")] = 30,
    query_tokens: Annotated[int, typer.Option(min=2, help="Text tokens of the query.")] = 40,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by the device if not given.")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit decoder layers.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each method is measured.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 9,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json, bench.md and bench.png.")] = None,
    count_only: Annotated[
        bool, typer.Option("--count-only", help="Count FLOPs and KV; no weights are needed.")
    ] = False,
) -> None:
    """What few-shot answers cost on a backbone: counted, and measured beside zero-shot and beside kept prefix KV."""
    with reported("aim bench"):
        numbers, names = _numbers(shots), _names(methods, count_only)
        if (backbone is None) == (shape is None):
            raise ValueError("Give one of --backbone and --shape.")
        about, rows = _run(
            backbone, shape, numbers, names, (demo_tokens, query_tokens), dtype, load_in_4bit, device, repeats, tokens,
            count_only,
        )  # fmt: skip
        from ..speed.report import notes, rich_table, save

        title = f"{backbone or shape}, {about['visual_tokens']} visual tokens an image"
        title += ", counted" if count_only else f", {about['dtype']} on {about['device_name']}"
        console = Console()
        console.print(rich_table(rows, title))
        for line in notes(rows):
            console.print(line)
        if output is not None:
            save(output, about, rows, title)
            console.print(f"{output}: bench.json, bench.md, bench.png")


def _numbers(shots: str) -> list[int]:
    """Different numbers, ascending."""
    try:
        found = sorted({int(one) for one in shots.split(",")})
    except ValueError:
        found = [-1]
    if found[0] < 0:
        raise ValueError(f"--shots {shots!r}: expected numbers of demonstrations, as in 0,1,4,8.")
    return found


def _names(methods: str, count_only: bool) -> list[str]:
    """Known methods, each once."""
    from ..speed.counting import COUNTED
    from ..speed.methods import METHODS

    known = COUNTED if count_only else tuple(METHODS)
    found = list(dict.fromkeys(methods.split(",")))
    wrong = [name for name in found if name not in known]
    if wrong:
        raise ValueError(f"--methods has {wrong[0]!r}; there are {', '.join(known)}.")
    return found


def _run(
    backbone: str | None, shape: str | None, shots: list[int], methods: list[str], lengths: tuple[int, int],
    dtype: str | None, load_in_4bit: bool, device: str | None, repeats: int, tokens: int, count_only: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """What the run was, and its rows with ratios."""
    import torch
    import transformers
    from transformers import AutoConfig

    from .. import laptop_quantization_config
    from ..backbone_aim import load_backbone
    from ..runs import PRECISIONS
    from ..speed.counting import Twin, count
    from ..speed.measure import Measuring
    from ..speed.methods import Bench
    from ..speed.prompts import RandomPrompts
    from ..speed.report import with_ratios
    from ..speed.shapes import picture_of, random_backbone, shape_config, shape_picture

    config = shape_config(shape) if shape is not None else AutoConfig.from_pretrained(str(backbone))
    config = getattr(config, "backbone_config", None) or config  # of an AIM repository, its backbone's
    picture = picture_of(config) if shape is None else shape_picture(shape)
    twin = Twin(config, picture=picture)
    about: dict[str, Any] = {
        "backbone": backbone or shape, "model_type": config.model_type, "visual_tokens": picture.tokens,
        "demo_tokens": lengths[0], "query_tokens": lengths[1], "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    if count_only:
        return about, with_ratios(
            [count(twin, name, n, *lengths).as_dict() for n in shots for name in methods if n or name == "zero"]
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no CUDA device here.")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if dtype not in PRECISIONS:
        raise ValueError(f"--dtype {dtype!r}: expected float32, bfloat16 or float16.")
    kind = PRECISIONS[dtype]
    if shape is not None:
        model = random_backbone(config, kind, device, load_in_4bit)
    else:
        quantization = {"quantization_config": laptop_quantization_config()} if load_in_4bit else {}
        model = load_backbone(str(backbone), dtype=kind, device_map=device, **quantization)
    about.update(
        device=device, dtype=dtype + (", 4-bit decoder" if load_in_4bit else ""), repeats=repeats, tokens=tokens,
        device_name=torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    prompts = RandomPrompts(config, max(shots), *lengths, device, kind, picture)
    measuring = Measuring(Bench(model, prompts), twin, methods, repeats, tokens, *lengths)
    with Progress(console=errors, transient=True) as progress:
        rows = measuring.run(shots, progress)
    return about, with_ratios([row.as_dict() for row in rows])
