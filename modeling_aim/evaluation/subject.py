"""The model under evaluation: loaded as a plug-in or as a bare backbone, it answers batches of prompts."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from transformers import BatchFeature, PreTrainedConfig

from .. import AimForConditionalGeneration
from ..backbone_aim import laptop_quantization_config, load_backbone, longest_prompt, module_device
from ..configuration_aim import AimConfig
from ..demonstrations_aim import FusedDemonstrations
from ..encoding_aim import TOKENIZING
from ..image_settings import set_image_settings
from ..processing_aim import AimProcessor
from ..projector_aim import SCALE_KEY
from ..runs import PRECISIONS
from . import baselines
from .cost import FirstToken, row_kv_bytes
from .methods import Prompt, PromptBuilder
from .random_projector import random_projector
from .reads import Reads, open_images
from .task import Prediction


@dataclass(frozen=True)
class Answer:
    """The result of one prompt.

    Args:
        prediction: for the task.
        prompt_tokens: positions of the prompt in the decoder, images and fused tokens among them.
        fused_tokens: those of them that are fused.
        milliseconds: its share of the time that its batch took to answer, reading demonstrations not counted.
        reading_milliseconds: its share of the time to read demonstrations that were not kept.
        first_token_milliseconds: of `milliseconds`, what passed until the first new token was known.
        kv_bytes: keys and values after the prompt.
    """

    prediction: Prediction
    prompt_tokens: int
    fused_tokens: int
    milliseconds: float
    reading_milliseconds: float
    first_token_milliseconds: float
    kv_bytes: int


@dataclass(frozen=True)
class Batch:
    """Prompts with their images opened, encoded.

    Args:
        prompts: one a row.
        images: of each row.
        inputs: the backbone's, padded on the left.
        pieces: of each row, where a method of `modeling_aim/baselines` answers; there are no `inputs` then.
    """

    prompts: tuple[Prompt, ...]
    images: tuple[list[Any], ...]
    inputs: BatchFeature
    pieces: tuple[baselines.Pieces, ...] = ()


class Subject:
    """The model under evaluation.

    Args:
        model: the plug-in, or a backbone that generates.
        processor: of the backbone.
        prompt_builder: makes the text of prompts.
    """

    def __init__(
        self, model: AimForConditionalGeneration, processor: AimProcessor, prompt_builder: PromptBuilder
    ) -> None:
        self.model, self.processor, self.prompt_builder = model, processor, prompt_builder
        self.plugin = model if getattr(model.config, "model_type", None) == AimConfig.model_type else None
        self.backbone = model if self.plugin is None else model.backbone
        self.device = module_device(self.backbone)
        self.longest = longest_prompt(self.backbone.config)
        self._random: dict[int, nn.Module] = {}
        self._untrained: dict[int | None, Subject] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.backbone.forward).parameters

    @property
    def read_layers(self) -> tuple[int, ...]:
        """What the plug-in reads of demonstrations; empty without one."""
        return () if self.plugin is None else tuple(self.plugin.config.read_layers)

    @property
    def identity(self) -> dict[str, str]:
        """What answers: backbone, and plug-in where there is one."""
        if self.plugin is not None:
            return {**self.plugin.source, "dtype": str(self.model.dtype).removeprefix("torch.")}
        name = type(self.backbone).__name__
        return {"backbone": name, "dtype": str(self.model.dtype).removeprefix("torch.")}

    def untrained(self, depth: int | None = None) -> Subject:
        """The same backbone with a plug-in without weights: states are put back at the depth where they were read.

        Args:
            depth: which; when `None`, those of this plug-in where its states enter at depth, else the default one.

        Raises:
            ValueError: states cannot enter this backbone, or not there.
        """
        if depth not in self._untrained:
            layers = None if depth is None else [depth]
            reading: dict[str, Any] = {}
            if self.plugin is not None:
                own = self.plugin.config
                reading = {"read_span": own.read_span, "max_fused_tokens": own.max_fused_tokens}
                layers = own.read_layers if layers is None and own.enters_at_depth else layers
            model = AimForConditionalGeneration.from_backbone(
                self.backbone, self.processor, preset="untrained", read_layers=layers, **reading
            )
            self._untrained[depth] = Subject(model, self.processor, self.prompt_builder)
        return self._untrained[depth]

    def answering(self, prompt: Prompt) -> Subject:
        """What answers a prompt: this, or the same backbone without a projector."""
        return self.untrained(prompt.depth) if prompt.fused and prompt.projector == "untrained" else self

    # --- prompts in, answers out

    def encode(self, prompts: Sequence[Prompt], what: Sequence[str]) -> Batch:
        """Open the images of some prompts and make one padded batch; no model is needed."""
        images = tuple(open_images(prompt.images, name) for prompt, name in zip(prompts, what, strict=True))
        if prompts[0].baseline is not None:
            pieces = tuple(baselines.Pieces.of(self.processor, *row) for row in zip(prompts, images, strict=True))
            return Batch(tuple(prompts), images, BatchFeature(), pieces)
        return Batch(tuple(prompts), images, self._encoded(images, [prompt.text for prompt in prompts]))

    def _encoded(self, images: Sequence[Sequence[Any]], texts: Sequence[str]) -> BatchFeature:
        pictures = [list(row) for row in images] if any(images) else None
        return self.processor(images=pictures, text=list(texts), padding=True, return_tensors="pt")

    @torch.no_grad()
    def answer(
        self, batch: Batch, options: Sequence[Sequence[str]], new: int, seed: int, reads: Reads | None
    ) -> list[Answer]:
        """Answer a batch: greedily, or by the likelihood of options where the rows have some.

        Args:
            batch: from `encode`.
            options: of each row; empty where the answer is written.
            new: most tokens of a written answer.
            seed: of a random projector.
            reads: has the demonstrations' hidden states; `None` where no prompt has fused tokens.
        """
        if batch.pieces:
            return [self._in_pieces(*row, new) for row in zip(batch.pieces, batch.prompts, options, strict=True)]
        started = self.now()
        fused = self._fused(batch.prompts, seed, reads)
        read, clock = self.now(), FirstToken(self.now)
        inputs = batch.inputs.to(self.device, self.model.dtype)
        choose = any(options)
        predictions = (
            self._choose(batch, inputs, fused, options, clock) if choose else self._write(inputs, fused, new, clock)
        )
        done = self.now()
        rows = len(batch.prompts)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        counts = [0 if fused_demos is None else fused_demos.num_tokens for fused_demos in fused]
        each = 1000 / rows
        times = each * (done - read), each * (read - started), each * ((clock.time or done) - read)
        return [
            Answer(prediction, tokens + count, count, *times, row_kv_bytes(clock.cache, tokens + count))
            for prediction, tokens, count in zip(predictions, mask.sum(dim=1).tolist(), counts, strict=True)
        ]

    def _in_pieces(self, pieces: baselines.Pieces, prompt: Prompt, options: Sequence[str], new: int) -> Answer:
        result = baselines.answer(pieces, prompt, options, new, self)
        return Answer(result.prediction, result.tokens, 0, result.total, result.reading, result.first, result.kv_bytes)

    def _fused(self, prompts: Sequence[Prompt], seed: int, reads: Any) -> list[FusedDemonstrations | None]:
        """Fused tokens of each row."""
        rows: list[FusedDemonstrations | None] = []
        for prompt in prompts:
            if not prompt.fused:
                rows.append(None)
                continue
            assert self.plugin is not None
            read = reads.states(prompt.fused)
            fused = self.plugin.fuse([states.to(self.device) for states, _ in read], [ids for _, ids in read])
            if prompt.projector == "random":
                joined = torch.cat([states.to(self.device) for states, _ in read])
                fused = replace(fused, vectors=self._random_projector(seed)(joined))
            rows.append(replace(fused, source=self.plugin.source))
        return rows

    def _random_projector(self, seed: int) -> nn.Module:
        assert self.plugin is not None
        if seed not in self._random:
            scale = getattr(self.plugin.projector, SCALE_KEY, None)
            self._random[seed] = random_projector(self.plugin.config, seed, scale).to(self.device)
        return self._random[seed]

    def _with(self, fused: Sequence[FusedDemonstrations | None]) -> dict[str, Any]:
        return {"demos": list(fused)} if any(fused_demos is not None for fused_demos in fused) else {}

    def _write(self, inputs: Mapping[str, Any], fused: Sequence[Any], new: int, clock: FirstToken) -> list[Prediction]:
        output = self.model.generate(
            **inputs, **self._with(fused), max_new_tokens=new, do_sample=False, num_beams=1, streamer=clock,
            return_dict_in_generate=True,
        )  # fmt: skip
        clock.cache = getattr(output, "past_key_values", None)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        decoded = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [Prediction(text.strip()) for text in decoded]

    # --- options

    def _choose(
        self,
        batch: Batch,
        inputs: Mapping[str, Any],
        fused: Sequence[Any],
        options: Sequence[Sequence[str]],
        clock: FirstToken,
    ) -> list[Prediction]:
        """The option with the highest mean log-probability of its tokens after the prompt.

        Where every option is one token, one pass over the prompt is enough. Otherwise each gets a row of its own.
        """
        texts = [prompt.text for prompt in batch.prompts]
        behind = [
            [self.prompt_builder.option(t, option) for option in row] for t, row in zip(texts, options, strict=True)
        ]
        single = [self._single_tokens(text, row) for text, row in zip(texts, behind, strict=True)]
        if all(row is not None for row in single):
            output = self.model.generate(
                **inputs, **self._with(fused), max_new_tokens=1, do_sample=False, num_beams=1,
                output_logits=True, return_dict_in_generate=True, streamer=clock,
            )  # fmt: skip
            clock.cache = getattr(output, "past_key_values", None)
            log_probabilities = output.logits[0].float().log_softmax(dim=-1)
            scores = [log_probabilities[place, row].tolist() for place, row in enumerate(single)]
        else:
            scores = self._behind(batch, fused, behind, clock)
        return [
            Prediction(
                row[max(range(len(row)), key=scores_of_row.__getitem__)],
                tuple(round(score, 6) for score in scores_of_row),
            )
            for row, scores_of_row in zip(options, scores, strict=True)
        ]

    def _single_tokens(self, prompt: str, behind: Sequence[str]) -> list[int] | None:
        """The token of each option behind a prompt; `None` where one has several, or changes the prompt's own."""
        tokenizer = self.processor.tokenizer
        with TOKENIZING:  # the next batch is encoded meanwhile
            own = tokenizer(prompt)["input_ids"]
            ends = [tokenizer(prompt + option)["input_ids"] for option in behind]
        alone = all(len(ids) == len(own) + 1 and ids[:-1] == own for ids in ends)
        return [ids[-1] for ids in ends] if alone else None

    def _behind(
        self, batch: Batch, fused: Sequence[Any], behind: Sequence[Sequence[str]], clock: FirstToken | None = None
    ) -> list[list[float]]:
        """Mean log-probability of the tokens of every option, each in a row of its own behind its prompt."""
        rows = [(place, option) for place, options in enumerate(behind) for option in options]
        scores_by_row: list[list[float]] = [[] for _ in behind]
        for start in range(0, len(rows), len(behind)):
            part = rows[start : start + len(behind)]
            texts = [batch.prompts[place].text for place, _ in part]
            spans = [(len(text), len(text) + len(option)) for text, (_, option) in zip(texts, part, strict=True)]
            whole = [text + option for text, (_, option) in zip(texts, part, strict=True)]
            images = [batch.images[place] for place, _ in part]
            demos = self._with([fused[place] for place, _ in part])
            scores, _ = self.scored(images, whole, spans, demos, clock)
            for (place, _), score in zip(part, scores, strict=True):
                scores_by_row[place].append(score)
        return scores_by_row

    @torch.no_grad()
    def scored(
        self,
        images: Sequence[Sequence[Any]],
        texts: Sequence[str],
        spans: Sequence[tuple[int, int]],
        demos: Mapping[str, Any],
        clock: FirstToken | None = None,
    ) -> tuple[list[float], list[bool]]:
        """Mean log-probability of the tokens of a span at the end of each text, and whether they are the likeliest.

        Args:
            images: of each row, opened.
            texts: prompts with their continuations.
            spans: of what is scored, in characters.
            demos: `demos` of the rows, where they have some.
            clock: gets the cache of the pass.

        Raises:
            ValueError: the tokenizer finds no token in a span.
        """
        inputs, mask = self.processor.encode_spans([list(row) for row in images], texts, spans)
        if not bool(mask.any(dim=1).all()):
            options_cut = [text[start:end] for text, (start, end) in zip(texts, spans, strict=True)]
            raise ValueError(f"The tokenizer finds no token in one of the options {options_cut[:4]}.")
        inputs = inputs.to(self.device, self.model.dtype)
        kept = mask.shape[1] - int(mask.int().argmax(dim=1).min()) + 1
        logit_options = {"logits_to_keep": kept} if self._keeps_logits else {}
        output = self.model(**inputs, **demos, **logit_options)
        if clock is not None:
            clock.cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -kept:-1].float().log_softmax(dim=-1)
        ids, here = (tensor[:, 1 - kept :].to(logits.device) for tensor in (inputs["input_ids"], mask))
        token_scores = logits.gather(-1, ids[..., None])[..., 0]
        likeliest = ((logits.argmax(dim=-1) == ids) | ~here).all(dim=1)
        return ((token_scores * here).sum(dim=1) / here.sum(dim=1)).tolist(), likeliest.tolist()

    # --- what it can do

    def refuses_states(self) -> str:
        """Why states cannot enter the decoder of this backbone at depth; empty where they can."""
        try:
            self.untrained()
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"[:300]
        return ""

    @torch.no_grad()
    def refuses_two_images(self) -> str:
        """Why this backbone cannot take two images in one prompt; empty where it can.

        Some accept two images silently but use only one: the next token must depend on each of them.
        """
        grey, black, white = (Image.new("RGB", (64, 64), (light,) * 3) for light in (127, 0, 255))

        def next_token(*images: Image.Image) -> torch.Tensor:
            text = self.processor.front(len(images)) + "What is this?"
            inputs = self._encoded([list(images)], [text]).to(self.device, self.model.dtype)
            options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "output_logits": True}
            return self.model.generate(**inputs, **options, return_dict_in_generate=True).logits[0]

        next_token(grey)
        try:
            logits = next_token(grey, black)
            blind = [name for name, other in (("first", (white, black)), ("second", (grey, white)))
                     if torch.equal(logits, next_token(*other))]  # fmt: skip
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            return f"{type(error).__name__}: {error}"[:300]
        return f"it does not look at the {' and the '.join(blind)} of two" if blind else ""

    def now(self) -> float:
        """Seconds, after all that the device has to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


# --- loading


def has_aim(repo: str, revision: str | None) -> bool:
    """Whether a repository holds a plug-in."""
    stored, _ = PreTrainedConfig.get_config_dict(repo, **({"revision": revision} if revision else {}))
    return stored.get("model_type") == AimConfig.model_type


def load_subject(
    repo: str | None,
    backbone: str | None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    load_in_4bit: bool = False,
    device_map: str | None = None,
    prompts: str = "plain",
    separator: str = "\n",
    image_settings: Mapping[str, Any] | None = None,
) -> Subject:
    """Load a plug-in, or a bare backbone.

    Args:
        repo: AIM repository, or `None`.
        backbone: a backbone to evaluate without AIM, or `None`.
        revision: of the one of both that is given.
        dtype: of the backbone; what its repository says when `None`.
        load_in_4bit, device_map: of the backbone.
        prompts, separator: see `PromptBuilder`.
        image_settings: in place of the image processor's own.

    Raises:
        ValueError: the repository holds no plug-in, or the backbone cannot be used.
    """
    name = repo or backbone
    assert name is not None
    options: dict[str, Any] = {"device_map": device_map}
    if device_map is None and torch.cuda.is_available():
        options["device_map"] = {"": PartialState().local_process_index}
    options |= {"revision": revision} if revision else {}
    options |= {"dtype": PRECISIONS[dtype]} if dtype else {}
    options |= {"quantization_config": laptop_quantization_config()} if load_in_4bit else {}
    place = {"revision": revision} if revision else {}
    if repo is not None:
        if not has_aim(repo, revision):
            raise ValueError(f"{repo} is not an AIM repository. Evaluate a model without AIM with --backbone {repo}.")
        model: Any = AimForConditionalGeneration.from_pretrained(repo, **options)
        processor = model.processor
    else:
        model = load_backbone(name, **options).eval()
        processor = AimProcessor.from_pretrained(name, **place)
    set_image_settings(processor, image_settings or {})
    return Subject(model, processor, PromptBuilder(processor, prompts, separator))
