"""Where a backbone looks when it starts to answer: at the images of demonstrations, at their text, or elsewhere.

The exploration that AIM starts from (arXiv 2406.07588): a multimodal LLM that reads demonstrations in full is found to
attend mostly to their text. `study` measures it for any backbone whose images stand in the prompt: the attention of
the prompt's last position, from which the first new token comes, mean over heads, layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..backbone_aim import decoder_layers, image_positions
from ..configuration_aim import implementation
from ..processing_aim import AimProcessor
from ..state_aim import preserved_state
from .methods import PromptBuilder, ShownShot, full
from .subject import Subject
from .task import Example

PARTS = {
    "demo_images": "images of demonstrations",
    "demo_text": "text of demonstrations",
    "query_images": "image of the query",
    "query_text": "text of the query",
    "rest": "everything else",
}
DEMO_IMAGES, DEMO_TEXT, QUERY_IMAGES, QUERY_TEXT, REST = range(len(PARTS))


# --- which position is what


def words_in(
    builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], text: str
) -> list[list[tuple[int, int]]]:
    """Where in a prompt the words of each demonstration stand, and last those of the query: spans of characters.

    Words that are asked and words that are said are looked for one after another, for a chat may put them apart.

    Raises:
        ValueError: they are not there; a chat template may change them.
    """
    places: list[list[tuple[int, int]]] = []
    start = 0
    for words, question_end in [*(_said(builder, demo) for demo in demos), (example.question, len(example.question))]:
        places.append([])
        for piece in (words[:question_end].strip(), words[question_end:].strip()):
            place = re.compile(r"(?<!\w)" + re.escape(piece) + r"(?!\w)").search(text, start) if piece else None
            if piece and place is None:
                raise ValueError(f"The words {piece!r:.80} are not found in the prompt; choose prompts='plain'.")
            if place is not None:
                start = place.end()
                places[-1].append(place.span())
    return places


def _said(builder: PromptBuilder, demo: ShownShot) -> tuple[str, int]:
    """The words of a demonstration, and how many characters of them ask."""
    words, start, _ = builder.processor.apply_template(demo.words)
    return words, start if demo.words.question is not None else 0


def parts_of(
    processor: AimProcessor,
    config: PreTrainedConfig,
    text: str,
    words: Sequence[Any],
    images: Sequence[int],
    ids: torch.Tensor,
) -> torch.Tensor:
    """For each position of an encoded prompt its place in `PARTS`, `(length)`.

    Positions of an image are those of the id that stands for one; what the processor puts between and around them is
    neither image nor words. Words are looked for where they must stand: in order, each behind the images it has.

    Args:
        processor: of the backbone.
        config: of the backbone; names the id.
        text: the prompt.
        words: from `words_in`.
        images: how many each demonstration has, and last the query.
        ids: of the prompt, `(length)`, without padding.

    Raises:
        ValueError: images have no positions in the prompt, or the words of a demonstration are not found.
    """
    places = image_positions(config, ids).nonzero().flatten().tolist()
    if any(images) and not places:
        raise ValueError(_no_positions(config))
    plain = processor.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    tokens = list(zip(plain["input_ids"], plain["offset_mapping"], plain["special_tokens_mask"], strict=True))
    parts, row = torch.full((len(ids),), REST), ids.tolist()
    behind = 0
    for number, (spans, count) in enumerate(zip(words, images, strict=True)):
        is_query = number == len(words) - 1
        if is_query:
            parts[[place for place in places if place < behind]] = DEMO_IMAGES
            parts[[place for place in places if place >= behind]] = QUERY_IMAGES
        elif count:
            behind = next((place for place in places if place >= behind), len(row))
        for start, end in spans:
            wanted = [i for i, (a, b), special in tokens if b > start and a < end and b > a and not special]
            first = _find(row, wanted, behind, last=is_query)
            if first is None:
                raise ValueError(
                    f"The words {text[start:end]!r:.80} are not found behind their images in a prompt that "
                    f"{type(processor.processor).__name__} made. It puts images elsewhere, or joins words with what "
                    "stands around an image; this study does not apply."
                )
            behind = first + len(wanted)
            parts[first:behind] = QUERY_TEXT if is_query else DEMO_TEXT
    return parts


def _find(ids: Sequence[int], wanted: Sequence[int], start: int, last: bool) -> int | None:
    """The first (or last) place from `start` on where `wanted` stands in `ids`."""
    places = range(start, len(ids) - len(wanted) + 1)
    starts = (i for i in (reversed(places) if last else places) if list(ids[i : i + len(wanted)]) == list(wanted))
    return next(starts, None)


def _no_positions(config: PreTrainedConfig) -> str:
    return (
        f"Images have no positions in a prompt of {config.model_type}: they reach its decoder by cross-attention, or "
        "its configuration names no id that stands for them. How attention is shared out between images and text is "
        "not defined there; this study does not apply."
    )


# --- attention


@contextmanager
def eager(backbone: PreTrainedModel) -> Iterator[None]:
    """Attention that returns its weights, for a while.

    Raises:
        ValueError: the backbone has no eager attention.
    """
    before = _known(implementation(backbone.config, "attn_implementation"))
    try:
        backbone.set_attn_implementation("eager")
        text = backbone.config.get_text_config(decoder=True)
        if text._attn_implementation != "eager":
            raise ValueError(
                f"{type(backbone).__name__} cannot be switched to eager attention (it has "
                f"{text._attn_implementation!r}), and no other gives its weights. Load it with "
                "attn_implementation='eager'."
            )
        yield
    finally:
        backbone.set_attn_implementation(before)


def _known(by_part: Any) -> Any:
    """Kinds of attention without those of parts that say none."""
    return {k: _known(v) for k, v in by_part.items() if v is not None} if isinstance(by_part, dict) else by_part


@torch.no_grad()
def last_attention(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], parts: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Attention of the last position of one prompt, mean over heads: layer (from 1) to `(length)` in float32.

    Only the row of the last position is kept of each layer, so memory is that of one layer's attention.

    Args:
        backbone: with eager attention.
        inputs: of one prompt without padding.
        parts: what its positions are (`parts_of`).

    Raises:
        ValueError: images reach the decoder by another way than the prompt's positions, or no layer has attention
            over them.
    """
    by_layer: dict[int, torch.Tensor] = {}
    entered: list[torch.Tensor] = []
    length = inputs["input_ids"].shape[1]

    def weights_of(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for value in output[1:] if isinstance(output, tuple) else ():
                if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[2:] == (length, length):
                    by_layer.setdefault(number, value[0, :, -1].float().mean(dim=0).cpu())

        return hook

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    layers = decoder_layers(backbone)
    with ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(enter, with_kwargs=True))
        for number, layer in enumerate(layers, 1):
            for module in layer.modules():
                hooks.enter_context(module.register_forward_hook(weights_of(number)))
        with preserved_state(backbone):
            backbone.base_model(**inputs, use_cache=False, return_dict=True)
    place = next(iter(((parts == DEMO_IMAGES) | (parts == QUERY_IMAGES)).nonzero().flatten().tolist()), None)
    if place is not None:
        plain = backbone.get_input_embeddings()(inputs["input_ids"][:1, place : place + 1])[0, 0]
        if torch.allclose(entered[0][0, place].to(plain), plain):
            raise ValueError(_no_positions(backbone.config))
    if not by_layer:
        raise ValueError(f"No decoder layer of {type(backbone).__name__} returns attention weights over the prompt.")
    return dict(sorted(by_layer.items()))


# --- the study


@dataclass(frozen=True)
class AttentionStudy:
    """What was measured on some prompts.

    Args:
        layers: numbers, from 1, of the decoder layers that have attention.
        shares: `(prompts, layers, parts)`, how much of the attention goes to each of `PARTS`; 1 in all.
        tokens: `(prompts, parts)`, positions of each.
        about: backbone, task, shots and the like, for a reader.
    """

    layers: tuple[int, ...]
    shares: np.ndarray
    tokens: np.ndarray
    about: Mapping[str, Any]

    @property
    def relative(self) -> np.ndarray:
        """`(prompts, layers, parts)`: attention of a token of a part, as a multiple of an average token's."""
        tokens = self.tokens[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(tokens > 0, self.shares / tokens * tokens.sum(axis=-1, keepdims=True), np.nan)

    def summary(self) -> dict[str, Any]:
        """Plain JSON: means over prompts by part and layer, their spread, and the number of tokens."""

        def by_part(values: np.ndarray) -> dict[str, list[float | None]]:
            return {
                part: [None if np.isnan(v) else float(f"{v:.4g}") for v in row]
                for part, row in zip(PARTS, values.T, strict=True)
            }

        return {
            **self.about,
            "prompts": len(self.shares),
            "layers": list(self.layers),
            "tokens": {p: float(f"{v:.4g}") for p, v in zip(PARTS, self.tokens.mean(axis=0), strict=True)},
            "share": by_part(self.shares.mean(axis=0)),
            "share_standard_deviation": by_part(self.shares.std(axis=0)),
            "token_relative_to_average": by_part(_mean(self.relative)),
        }


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over prompts, of those that have the part."""
    counted = (~np.isnan(values)).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(counted > 0, np.nansum(values, axis=0) / counted, np.nan)


def study(
    subject: Subject,
    prompts: Iterable[tuple[Example, Sequence[ShownShot]]],
    about: Mapping[str, Any] | None = None,
) -> AttentionStudy:
    """Measure attention on prompts, one at a time; the backbone gets its own kind of attention back at the end.

    The prompts are those of the method `full`: demonstrations with their images before the query.

    Args:
        subject: a model whose images stand in the prompt.
        prompts: queries, each with its demonstrations; at least one.
        about: goes into the result as it is.

    Raises:
        ValueError: images reach the backbone by cross-attention, a prompt does not fit, or there is none.
    """
    shares, tokens = [], []
    layers: tuple[int, ...] = ()
    config = subject.backbone.config
    with eager(subject.backbone):
        for example, demos in prompts:
            prompt = full(subject.prompt_builder, example, demos, 0)
            inputs = subject.encode([prompt], [f"Example {example.id!r} or a demonstration of it"]).inputs
            ids = inputs["input_ids"][0]
            if subject.longest is not None and len(ids) > subject.longest:
                raise ValueError(
                    f"A prompt with {len(demos)} demonstrations has {len(ids)} tokens, but the backbone has "
                    f"{subject.longest} positions. Ask for fewer shots."
                )
            words = words_in(subject.prompt_builder, example, demos, prompt.text)
            images = [*(len(demo.images) for demo in demos), len(example.images)]
            parts = parts_of(subject.processor, config, prompt.text, words, images, ids)
            attention_rows = last_attention(subject.backbone, inputs.to(subject.device, subject.model.dtype), parts)
            layers = tuple(attention_rows)
            of_part = nn.functional.one_hot(parts, len(PARTS)).float()
            shares.append((torch.stack(list(attention_rows.values())) @ of_part).numpy())
            tokens.append(of_part.sum(dim=0).numpy())
    if not shares:
        raise ValueError("There is no prompt to study.")
    return AttentionStudy(layers, np.stack(shares), np.stack(tokens), dict(about or {}))


def picture(result: AttentionStudy, path: Path) -> Path | None:
    """Draw two panels over layers: the share of each part (± its standard deviation over prompts), and a token's.

    Args:
        found: what was measured.
        path: of the PNG file.

    Returns:
        `path`, or `None` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens, colours = result.tokens.mean(axis=0), ("tab:blue", "tab:orange", "tab:cyan", "tab:red", "tab:gray")
    relative = _mean(result.relative)
    for number, label in enumerate(PARTS.values()):
        if not tokens[number]:
            continue
        style = {"color": colours[number], "marker": "o", "markersize": 3, "linestyle": "-" if number < 2 else "--"}
        mean, spread = result.shares[..., number].mean(axis=0), result.shares[..., number].std(axis=0)
        left.plot(result.layers, mean, label=f"{label} ({tokens[number]:.0f} tokens)", **style)
        left.fill_between(
            result.layers, (mean - spread).clip(0), (mean + spread).clip(max=1), color=colours[number], alpha=0.12
        )
        right.plot(result.layers, relative[:, number], **style)
    left.set(ylabel="share of the attention", ylim=(0, 1))
    right.set(ylabel="attention a token (average token: 1)", yscale="log")
    right.axhline(1, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("decoder layer")
        axes.set_xticks(result.layers[:: -(-len(result.layers) // 16)])
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    return path
