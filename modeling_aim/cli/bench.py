"""`aim bench`: what few-shot answers cost on a backbone, counted and measured."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.progress import Progress
from transformers import AutoConfig

from .. import AimProcessor, laptop_quantization_config
from ..backbone_aim import load_backbone
from ..image_settings import set_image_settings
from ..runs import PRECISIONS
from ..speed.baselines import COLD_NAMES, NAMES, is_baseline, split
from ..speed.counting import COUNTED, Twin, count
from ..speed.measure import Measuring
from ..speed.methods import METHODS, Bench
from ..speed.prompts import RandomPrompts
from ..speed.report import notes, rich_table, save, with_ratios
from ..speed.shapes import picture_of, picture_with, random_backbone, shape_config, shape_picture
from .options import check_least, command
from .terminal import errors, safe, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What `aim bench` takes.

    Args:
        backbone: backbone, by its Hub id or folder.
        shape: instead of --backbone, random weights of a known size, such as smolvlm-256m.
        image_settings: with --backbone, settings of its image processor by its own names, such as max_pixels=200704;
            images are then 500 x 400 pixels.
        shots: numbers of demonstrations.
        methods: methods to measure; also depth-cold, depth-bank, depth-bank-kv, cold-half and overhead; and text-kv,
            text-kv-together, parallel-icl, fastv, catp, snapkv, emloc and task-vector, each but fastv and catp also
            with -cold, and with settings as in snapkv-cold:ratio=.9.
        demo_tokens: text tokens of a demonstration.
        query_tokens: text tokens of the query.
        dtype: float32, bfloat16 or float16; by default bfloat16 on CUDA and float32 on a CPU.
        load_in_4bit: load the decoder layers in 4-bit.
        device: cpu or cuda; by default cuda where there is one.
        repeats: how often each method is measured.
        max_new_tokens: tokens of an answer.
        output: folder for bench.json, bench.md and bench.png.
        count_only: count FLOPs and KV only; no weights are needed.
    """

    backbone: str | None = None
    shape: str | None = None
    image_settings: dict[str, Any] = field(default_factory=dict)
    shots: tuple[int, ...] = (0, 1, 4, 8, 16, 32)
    methods: tuple[str, ...] = ("zero", "full", "prefix-kv", "cold", "bank", "bank-kv")
    demo_tokens: int = 30
    query_tokens: int = 40
    dtype: str | None = None
    load_in_4bit: bool = False
    device: str | None = None
    repeats: int = 5
    max_new_tokens: int = 9
    output: Path | None = None
    count_only: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "demo_tokens", "repeats", "max_new_tokens")
        check_least(self, 2, "query_tokens")
        if (self.backbone is None) == (self.shape is None):
            raise ValueError("Give one of --backbone and --shape.")
        if self.image_settings and self.backbone is None:
            raise ValueError("--image is for the image processor of a --backbone; a --shape has none.")
        if not self.shots or min(self.shots) < 0:
            shots_text = ",".join(map(str, self.shots))
            raise ValueError(f"--shots {shots_text!r}: expected numbers of demonstrations, as in 0,1,4,8.")
        known = COUNTED if self.count_only else tuple(METHODS)
        for name in self.methods:
            if is_baseline(name):
                split(name)
            elif name not in known:
                there = ", ".join((*known, *NAMES, *COLD_NAMES))
                raise ValueError(f"--methods has {name!r}; there are {there}.")
        if self.dtype not in (None, *PRECISIONS):
            raise ValueError(f"--dtype {self.dtype!r}: expected float32, bfloat16 or float16.")


@command(app, "aim bench")
def bench(settings: BenchSettings) -> None:
    """Count and measure what few-shot answers cost on a backbone, beside zero-shot and beside kept prefix KV."""
    about, rows = _run(settings)
    title = f"{settings.backbone or settings.shape}, {about['visual_tokens']} visual tokens an image"
    title += ", counted" if settings.count_only else f", {about['dtype']} on {about['device_name']}"
    console = wide_console()
    console.print(rich_table(rows, safe(title)))
    for line in notes(rows):
        console.print(line)
    if settings.output is not None:
        save(settings.output, about, rows, title)
        console.print(f"{safe(settings.output)}: bench.json, bench.md, bench.png")


def _run(settings: BenchSettings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the run was, and its rows with ratios."""
    backbone, shape = settings.backbone, settings.shape
    shots, methods = sorted(set(settings.shots)), list(dict.fromkeys(settings.methods))
    lengths = settings.demo_tokens, settings.query_tokens
    config = shape_config(shape) if shape is not None else AutoConfig.from_pretrained(str(backbone))
    config = getattr(config, "backbone_config", None) or config  # of an AIM repository, its backbone's
    picture = picture_of(config) if shape is None else shape_picture(shape)
    if settings.image_settings:
        processor = AimProcessor.from_pretrained(str(backbone))
        set_image_settings(processor, settings.image_settings)
        picture = picture_with(config, processor)
    twin = Twin(config, picture=picture)
    about: dict[str, Any] = {
        "backbone": backbone or shape, "model_type": config.model_type, "visual_tokens": picture.tokens,
        "demo_tokens": lengths[0], "query_tokens": lengths[1], "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    if settings.count_only:
        return about, with_ratios(
            [count(twin, name, n, *lengths).as_dict() for n in shots for name in methods if n or name == "zero"]
        )
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no CUDA device here.")
    dtype = settings.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    kind = PRECISIONS[dtype]
    if shape is not None:
        model = random_backbone(config, kind, device, settings.load_in_4bit)
    else:
        quantization = {"quantization_config": laptop_quantization_config()} if settings.load_in_4bit else {}
        model = load_backbone(str(backbone), dtype=kind, device_map=device, **quantization)
    about.update(
        device=device, dtype=dtype + (", 4-bit decoder" if settings.load_in_4bit else ""), repeats=settings.repeats,
        tokens=settings.max_new_tokens,
        device_name=torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    prompts = RandomPrompts(config, max(shots), *lengths, device, kind, picture)
    bench_of = Bench(model, prompts)
    measuring = Measuring(bench_of, twin, methods, settings.repeats, settings.max_new_tokens, *lengths)
    with Progress(console=errors, transient=True) as progress:
        rows = measuring.run(shots, progress)
    return about, with_ratios([row.as_dict() for row in rows])
