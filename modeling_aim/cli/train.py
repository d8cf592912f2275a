"""`aim train`: a projector for a backbone, from data to a Hub repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .terminal import reported, whole_numbers


def train(
    backbone: Annotated[str, typer.Option(help="Backbone, or AIM repository to train further: a Hub id or a folder.")],
    data: Annotated[list[str], typer.Option(help="KIND:PATH[,name=value...]; may be given several times.")],
    output: Annotated[Path, typer.Option(help="Folder of the Hub repository that comes out.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Episodes of one process in one pass, of up to --shots targets each.")
    ] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes of one step.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak; falls as a cosine. Default: 1e-3 (adamw), .6 / sqrt(longest side) (muon)."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="muon, for the projector's matrices, or adamw.")] = "muon",
    shots: Annotated[int, typer.Option(min=1, help="Most demonstrations of an episode.")] = 8,
    shot_law: Annotated[str, typer.Option(help="exponential, which favours many, uniform or fixed.")] = "exponential",
    preset: Annotated[str, typer.Option(help="trained (at depth) or paper (for the input).")] = "trained",
    form: Annotated[
        str | None,
        typer.Option(help="Projector: residual_mlp, residual; for the input mlp, linear, linear_norm."),
    ] = None,
    projector_size: Annotated[int | None, typer.Option(help="Inner width of the mlp forms.")] = None,
    read_layers: Annotated[
        str | None, typer.Option(help="Depths that are read, as in 13 or 12,24; by default two fifths of the layers.")
    ] = None,
    entry_layers: Annotated[
        str | None, typer.Option(help="Where states enter: 0 is the input; by default where they were read.")
    ] = None,
    read_span: Annotated[str, typer.Option(help="Positions that are kept: text or answer.")] = "text",
    max_fused_tokens: Annotated[int | None, typer.Option(help="Most fused tokens of a demonstration.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the backbone.")] = None,
    dtype: Annotated[str, typer.Option(help="Backbone's precision: bfloat16, float16 or float32.")] = "bfloat16",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit backbone, for a laptop.")] = False,
    device_map: Annotated[str | None, typer.Option(help="Where the backbone goes; by default one device.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a second forward pass in the backward.")
    ] = False,
    prompts: Annotated[str, typer.Option(help="How questions are put: chat, plain or mixed.")] = "chat",
    teacher: Annotated[
        str | None, typer.Option(help="Distil from the backbone that reads demonstrations in full, or as text.")
    ] = None,
    distillation: Annotated[float, typer.Option(min=0, max=1, help="Weight of the divergence to the teacher.")] = 0.5,
    eval_data: Annotated[list[str] | None, typer.Option(help="Held-out sources, as --data.")] = None,
    eval_episodes: Annotated[int, typer.Option(min=1, help="Episodes of them that are scored at every save.")] = 200,
    memory: Annotated[float, typer.Option(min=0, help="GiB of hidden states kept in memory.")] = 1.0,
    keep_states: Annotated[str | None, typer.Option(help="Folder where hidden states are kept.")] = None,
    disk: Annotated[float, typer.Option(min=0, help="GiB of hidden states kept there.")] = 20.0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 200,
    log_every: Annotated[int, typer.Option(min=1, help="Steps from one report to the next.")] = 10,
    seed: Annotated[int, typer.Option(help="Of data, episodes and the projector's first weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in the output folder.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository to push the result to.")] = None,
    argument: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of transformers' TrainingArguments.")
    ] = None,
) -> None:
    """Train a projector for a frozen backbone; the same command again goes on where it was interrupted.

    Several processes: `torchrun --nproc_per_node 8 -m modeling_aim train ...`, or `accelerate launch` with a
    configuration of DDP, FSDP or DeepSpeed.
    """
    with reported("aim train"):
        from ..training import TrainSettings
        from ..training import train as run

        settings = TrainSettings(
            backbone=backbone,
            data=tuple(data),
            output=str(output),
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            optimizer=optimizer,
            shots=shots,
            shot_law=shot_law,
            preset=preset,
            projector_form=form,
            projector_size=projector_size,
            read_layers=whole_numbers("--read-layers", read_layers),
            entry_layers=whole_numbers("--entry-layers", entry_layers),
            read_span=read_span,
            max_fused_tokens=max_fused_tokens,
            revision=revision,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            device_map=device_map,
            gradient_checkpointing=gradient_checkpointing,
            prompts=prompts,
            teacher=teacher,
            distillation=distillation,
            eval_data=tuple(eval_data or ()),
            eval_episodes=eval_episodes,
            memory=memory,
            keep_states=keep_states,
            disk=disk,
            save_every=save_every,
            log_every=log_every,
            seed=seed,
            overwrite=overwrite,
            push_to_hub=push_to_hub,
            arguments=dict(_argument(one) for one in argument or ()),
        )
        trainer = run(settings)
    if trainer.args.should_save:
        Console().print(f"{output}: trained for {trainer.state.global_step} steps; its README.md says how it went.")


def _argument(given: str) -> tuple[str, Any]:
    """`NAME=VALUE` with the value as JSON where it is that, else as it is written."""
    name, equals, value = given.partition("=")
    if not equals:
        raise ValueError(f"--set {given!r}: expected NAME=VALUE, as in --set report_to=wandb.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
