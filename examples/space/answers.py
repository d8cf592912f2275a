"""Backbones of the Space, and the four answers to a question: zero-shot, words only, full and AIM."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demonstrations import Labelled
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedConfig

from modeling_aim import AimForConditionalGeneration, AimProcessor
from modeling_aim.configuration_aim import AimConfig
from modeling_aim.demonstrations_aim import FusedDemonstrations, concatenated
from modeling_aim.evaluation.methods import METHODS, PromptBuilder, ShownShot
from modeling_aim.evaluation.task import Example, Shot

HERE = Path(__file__).resolve().parent
AIM_TINY = "aim-tiny"
AIM_TINY_FOLDERS = (HERE / AIM_TINY, HERE.parents[1] / "hub_configs" / AIM_TINY)  # in the Space; in a clone
NEW_TOKENS = 24
NAMES = {  # method: (title, what it shows)
    "zero": ("Zero-shot", "no demonstrations"),
    "text": ("Words only", "their labels, no images"),
    "full": ("Full", "all images in the prompt"),
    "aim": ("AIM", "fused tokens, read once"),
}


@dataclass(frozen=True)
class Backbone:
    """What answers.

    Args:
        name: `aim-tiny` or a Hub id, of a backbone or of an AIM repository.
        projector: use the projector of an AIM repository; otherwise states enter at depth, without training.
        depth: where they enter; the default depth when `None`.
    """

    name: str = AIM_TINY
    projector: bool = False
    depth: int | None = None


@dataclass(frozen=True)
class Answer:
    """What one method answers.

    Args:
        text: the answer; empty where there is none.
        tokens: of the prompt, fused tokens among them.
        milliseconds: to prepare the prompt and to answer.
        problem: why there is no answer.
    """

    text: str = ""
    tokens: int = 0
    milliseconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Answers:
    """The answers of all methods.

    Args:
        by_method: in the order of `NAMES`.
        demos: the demonstrations, with what was read of them.
        read: number of demonstrations that were read now; the others had been read before.
        milliseconds: to read them.
    """

    by_method: dict[str, Answer]
    demos: tuple[Labelled, ...]
    read: int
    milliseconds: float


# --- backbones


def aim_tiny_folder() -> Path | None:
    """Where the local backbone is, if it is here."""
    return next((folder for folder in AIM_TINY_FOLDERS if (folder / "config.json").is_file()), None)


def loaded(chosen: Backbone) -> Any:
    """The model of a choice, at its depth.

    Raises:
        ValueError: it cannot be loaded; the message is one sentence for the visitor.
    """
    model = _load(chosen.name, chosen.projector)
    if not chosen.projector:
        default = _default_depth(chosen.name)  # asked for before any visitor changes the depth
        depth = default if chosen.depth is None else chosen.depth
        if model.config.entry_layers != [depth]:  # visitors share the model
            model.set_depth(depth)
    return model


@functools.lru_cache(maxsize=2)
def _load(name: str, projector: bool) -> Any:
    folder = aim_tiny_folder()
    if name == AIM_TINY and folder is not None:
        if projector:
            return AimForConditionalGeneration.from_pretrained(folder)
        processor = AimProcessor.from_pretrained(folder)
        return AimForConditionalGeneration.from_backbone(folder / "backbone", processor)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or Path(name).exists():
        raise ValueError(f"{name!r:.80} is not a Hub id; write OWNER/NAME, such as llava-hf/llava-1.5-7b-hf.")
    allowed = os.environ.get("AIM_BACKBONES", "").split()
    if allowed and name not in allowed:
        raise ValueError(f"This Space loads {', '.join([AIM_TINY, *allowed])}, not {name}.")
    try:
        return _load_from_hub(name, projector)
    except GatedRepoError:
        raise ValueError(f"{name} is gated: accept its terms on the Hub, and give this Space a token.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(f"There is no public repository {name} on the Hub.") from None
    except Exception as error:
        raise ValueError(_why_not_loaded(name, error)) from error


def _load_from_hub(name: str, projector: bool) -> Any:
    config, _ = PreTrainedConfig.get_config_dict(name)
    is_plugin = config.get("model_type") == AimConfig.model_type
    if projector and (not is_plugin or config.get("projector_form") == "identity"):
        raise ValueError(
            f"{name} has no projector; give an AIM repository that was trained, or choose “without projector”."
        )
    options = {"device_map": "auto", "dtype": "auto"}
    if projector:
        return AimForConditionalGeneration.from_pretrained(name, **options)
    return AimForConditionalGeneration.from_backbone(config["backbone_name_or_path"] if is_plugin else name, **options)


def _why_not_loaded(name: str, error: Exception) -> str:
    causes = [error, error.__cause__, error.__context__]
    message = " ".join(str(error).split())
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) or "connect" in message.lower():
        return f"{name} cannot be loaded: the Hub cannot be reached from here."
    if isinstance(error, ValueError) and message.startswith(name):
        return message
    return f"{name} cannot be loaded: {message.split('. ')[0]:.240}."


@functools.lru_cache(maxsize=16)
def _default_depth(name: str) -> int:
    return int(_load(name, False).config.entry_layers[0])


def description(chosen: Backbone) -> str:
    """A line about a backbone that was loaded."""
    config = loaded(chosen).config
    where = "the input" if config.entry_layers == [0] else f"depth {', '.join(map(str, config.entry_layers))}"
    form = f"projector {config.projector_form}" if chosen.projector else "no projector"
    parts = [chosen.name, config.backbone_config.model_type, f"{config.num_layers} layers", form, f"enters at {where}"]
    return " · ".join(parts)


# --- answers


def read(model: Any, demos: Sequence[Labelled]) -> tuple[tuple[Labelled, ...], int]:
    """The demonstrations with their fused tokens, and how many had to be read.

    Raises:
        ValueError: one comes from a bank that another model has read.
    """
    source = model.source

    def is_read(demo: Labelled) -> bool:
        return demo.fused is not None and dict(demo.fused.source) == source

    new = [number for number, demo in enumerate(demos) if not is_read(demo)]
    for number in new:
        if demos[number].image is None:
            raise ValueError(
                f"Demonstration {number + 1} ({demos[number].label}) comes from a bank that another backbone or "
                "depth has read; clear the demonstrations, or go back to that backbone."
            )
    fused = model.read([demos[number].raw for number in new])
    done = list(demos)
    for place, number in enumerate(new):
        done[number] = replace(demos[number], fused=fused[place])
    return tuple(done), len(new)


def answers(model: Any, demos: Sequence[Labelled], image: Any, question: str) -> Answers:
    """Ask about an image by each method; what fails is said in that method's answer.

    Args:
        model: an AIM model.
        demos: the demonstrations.
        image: of the query.
        question: about it.
    """
    started = time.perf_counter()
    done, count = read(model, demos)
    milliseconds = 1000 * (time.perf_counter() - started)
    fused = concatenated([demo.fused for demo in done if demo.fused is not None]) if done else None
    builder = PromptBuilder(model.processor, "chat" if model.processor.chat_template else "plain")
    query = Example(id="query", images=(image,), question=question, answers=())
    shots = [Shot(str(number), demo.raw) for number, demo in enumerate(done)]
    shown_shots = [ShownShot(shot, shot) for shot in shots]
    by_method = {}
    for method in NAMES:
        if method != "zero" and not done:
            by_method[method] = Answer(problem="Add demonstrations first.")
        elif method == "full" and any(demo.image is None for demo in done):
            by_method[method] = Answer(problem="A bank keeps no full images, so there is nothing to show.")
        else:
            prompt = METHODS[method].show(builder, query, shown_shots, 0)
            by_method[method] = _answer(model, prompt.text, prompt.images, fused if prompt.fused else None)
    return Answers(by_method, done, count, milliseconds)


def _answer(model: Any, text: str, images: Sequence[Any], fused: FusedDemonstrations | None) -> Answer:
    started = time.perf_counter()
    try:
        inputs = model.processor(images=list(images), text=text, return_tensors="pt").to(model.device, model.dtype)
        length = inputs["input_ids"].shape[1]
        tokens = length + (0 if fused is None else fused.num_tokens)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and tokens + NEW_TOKENS > longest:
            return Answer(tokens=tokens, problem=f"Too long: the backbone has {longest:,} positions.")
        ids = model.generate(**inputs, demos=fused, max_new_tokens=NEW_TOKENS, do_sample=False)
    except (ValueError, RuntimeError, IndexError) as error:  # RuntimeError: out of memory
        return Answer(problem=f"{' '.join(str(error).split()).split('. ')[0]:.160}.")
    answer_text = model.processor.decode(ids[0, length:], skip_special_tokens=True).strip()
    return Answer(answer_text, tokens, 1000 * (time.perf_counter() - started))


def set_offline_defaults() -> None:
    """Nothing is reported anywhere, and tokenizers start no threads of their own."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
