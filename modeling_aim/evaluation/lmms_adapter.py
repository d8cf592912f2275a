"""An AIM model in lmms-eval (0.7), with demonstrations from a bank.

python -m lmms_eval --model aim --tasks ok_vqa_val2014 --output_path results --log_samples \\
    --model_args pretrained=REPO,bank=BANK,shots=8,select=image

lmms-eval finds it by the entry point `lmms_eval.models`. Multiple-choice tasks, which are scored by likelihood, need
`--force_simple`: lmms-eval has no such requests for models that are asked by chats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from ..bank import DemonstrationBank
from ..bank.select import STRATEGIES
from .lmms_chats import bare, parts_of, pictures
from .methods import PromptBuilder
from .subject import load_subject
from .task import Example

DEFAULTS = {"max_new_tokens": 256, "do_sample": False, "num_beams": 1}


def manifest() -> Any:
    """What lmms-eval knows about `--model aim`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="aim",
        simple_class_path=f"{__name__}.AimSimple",
        chat_class_path=f"{__name__}.AimChat",
    )


@dataclass(frozen=True)
class Query:
    """One request, templated.

    Args:
        text: the prompt, with the backbone's placeholder for each image.
        images: in the order of their placeholders.
        behind: the continuation that is scored; empty where an answer is written.
    """

    text: str
    images: tuple[Image.Image, ...]
    behind: str = ""


@dataclass(frozen=True)
class Request:
    """One request of lmms-eval, before its example is looked at, for that opens images.

    Args:
        query: words it.
        length: of its words, to answer those of about one length together.
        settings: of generation.
    """

    query: Callable[[], Query]
    length: int
    settings: Mapping[str, Any]


class Aim(lmms):
    """What both ways of lmms-eval to ask have in common.

    Args:
        pretrained: AIM repository: a folder or a Hub id.
        bank: demonstration bank that this plug-in has read: a folder or a Hub id. Without one, the bare backbone
            answers.
        shots: how many demonstrations are chosen of it for each query; the whole bank when `None`.
        select: how: `"random"` (the same for all queries), `"image"`, `"text"`, `"fused"` or `"mmices"`.
        seed: of `"random"`.
        balanced: take labels in turn, where demonstrations have labels.
        prompts: `"chat"`, through the backbone's chat template, or `"plain"`: images, then the question. Chats where
            the backbone has a template, when `None`.
        revision, bank_revision: of repository and bank.
        dtype: of the backbone: `"float32"`, `"bfloat16"` or `"float16"`; what its repository says when `None`.
        load_in_4bit: 4-bit backbone.
        device, device_map: where the backbone goes; the GPU of this process where there is one, when both are `None`.
        batch_size: queries in one forward pass.
        max_batch_size: taken for lmms-eval's sake; not used.

    Raises:
        ValueError: a setting is wrong, or the bank was read by another plug-in.
    """

    def __init__(
        self,
        pretrained: str,
        bank: str | None = None,
        shots: int | None = None,
        select: str = "random",
        seed: int = 0,
        balanced: bool = True,
        prompts: str | None = None,
        revision: str | None = None,
        bank_revision: str | None = None,
        dtype: str | None = None,
        load_in_4bit: bool = False,
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if select not in STRATEGIES:
            raise ValueError(f"select={select!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        if bank is None and (shots is not None or select != "random"):
            raise ValueError(f"shots={shots} and select={select!r} choose from a bank; give bank=FOLDER, too.")
        if shots is None and select != "random":
            raise ValueError(f"select={select!r} chooses; say how many with shots=8.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a number from 1 up.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and device_map is None and device is not None:
            device = str(self.accelerator.device)
        self.subject = load_subject(
            pretrained,
            None,
            revision=revision,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            device_map=device_map or device,
        )
        self.processor = self.subject.processor
        self.prompts = prompts or ("plain" if self.processor.chat_template is None else "chat")
        self.subject.prompt_builder = PromptBuilder(self.processor, self.prompts)
        place = {"revision": bank_revision} if bank_revision else {}
        self.bank = None if bank is None else DemonstrationBank.from_pretrained(bank, self.subject.model, **place)
        self.shots, self.by, self.options = shots, select, {"seed": seed, "balanced": balanced}
        if self.bank is not None and shots is not None:
            self.bank.check_count(shots)
        self.batch_size = int(batch_size)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.subject.device

    def clean(self) -> None:
        """Let go of the model: lmms-eval may load a judge next."""
        del self.subject, self.bank
        super().clean()

    def generate_until_multi_round(self, requests: Any) -> list[str]:
        """Not there: demonstrations go with one question each."""
        raise NotImplementedError("--model aim answers one question a query; this task asks in several rounds.")

    # --- answers

    def written(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """An answer to each request, in their order."""
        return self._in_batches(requests, self._write)

    def scored(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """For each request the mean negative log-likelihood of what stands behind it, and whether it is greedy.

        lmms-eval's multiple choice takes the option with the smallest loss, not with the largest likelihood. It turns
        any result into a string that is not inside a `GenerationResult`.
        """
        return self._in_batches(requests, self._score)

    @torch.no_grad()
    def _write(self, batch: Sequence[Query], settings: Mapping[str, Any]) -> list[GenerationResult]:
        inputs = self._encoded(batch)
        demos = self._chosen(batch, inputs)
        ids = self.subject.model.generate(**inputs, **demos, **generation_settings(settings))
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        fused = [demo.num_tokens for demo in demos.get("demos", ())] or [0] * len(batch)
        written = (new != self.processor.tokenizer.pad_token_id).sum(dim=1).tolist()
        return [
            GenerationResult(until(text, settings.get("until")), TokenCounts(input_tokens=a + b, output_tokens=c))
            for text, a, b, c in zip(texts, prompts, fused, written, strict=True)
        ]

    def _score(self, batch: Sequence[Query], settings: Mapping[str, Any]) -> list[GenerationResult]:
        demos = self._chosen(batch)
        whole = [q.text + q.behind for q in batch]
        spans = [(len(q.text), len(text)) for q, text in zip(batch, whole, strict=True)]
        scores, greedy = self.subject.scored([q.images for q in batch], whole, spans, demos)
        results: list[Any] = [(-score, matches) for score, matches in zip(scores, greedy, strict=True)]
        return [GenerationResult(result) for result in results]

    def _in_batches(
        self, requests: Sequence[Request], answer: Callable[[Sequence[Query], Mapping[str, Any]], list[Any]]
    ) -> list[Any]:
        """What `answer` gives for each request; those of one batch have the same settings and are about as long."""
        results: list[Any] = [None] * len(requests)
        kinds = [json.dumps(dict(request.settings), sort_keys=True) for request in requests]
        order = sorted(range(len(requests)), key=lambda place: (kinds[place], requests[place].length, place))
        with tqdm(total=len(requests), desc="answers", disable=self._rank != 0) as bar:
            for _, alike in groupby(order, key=kinds.__getitem__):
                places = list(alike)
                for start in range(0, len(places), self.batch_size):
                    batch = [(place, requests[place].query()) for place in places[start : start + self.batch_size]]
                    for has_images in (True, False):  # a processor takes no batch of which some have images
                        part = [(place, query) for place, query in batch if bool(query.images) is has_images]
                        settings = requests[places[0]].settings
                        answers = answer([query for _, query in part], settings) if part else []
                        for (place, _), item in zip(part, answers, strict=True):
                            results[place] = item
                    bar.update(len(batch))
        return results

    def _encoded(self, batch: Sequence[Query]) -> Any:
        """The backbone's inputs of a batch of prompts."""
        images = [list(q.images) for q in batch] if batch[0].images else None
        inputs = self.processor(images=images, text=[q.text for q in batch], padding=True, return_tensors="pt")
        return inputs.to(self.device, self.subject.model.dtype)

    def _chosen(self, batch: Sequence[Query], inputs: Any = None) -> dict[str, Any]:
        """Demonstrations for each row of a batch; `inputs` are its prompts where they are encoded already."""
        if self.bank is None:
            return {}
        if self.shots is None:
            return {"demos": [self.bank.fused for _ in batch]}
        if self.by == "random":
            drawn = self.bank.select(None, self.shots, "random", **self.options)
            return {"demos": [drawn for _ in batch]}
        inputs = self._encoded(batch) if inputs is None else inputs
        features = self.bank.query_features(inputs, self.by)
        queries = [{kind: rows[row] for kind, rows in features.items()} for row in range(len(batch))]
        return {"demos": [self.bank.select(query, self.shots, self.by, **self.options) for query in queries]}

    # --- requests

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _query(self, visuals: Any, words: str, behind: str = "") -> Query:
        """A query of images and words; the images stand first."""
        images = pictures(visuals)
        text = self.subject.prompt_builder.prompt(Example("", images, words, ()))
        return Query(text, images, self.subject.prompt_builder.option(text, behind.strip()) if behind else "")


class AimSimple(Aim):
    """Asked by words and images apart (`--force_simple`)."""

    is_simple = True

    def generate_until(self, requests: Iterable[Any]) -> list[GenerationResult]:
        """Answers to `(context, settings, doc_to_visual, doc_id, task, split)`."""

        def request(words: str, settings: Any, visual: Any, *where: Any) -> Request:
            return Request(lambda: self._query(visual(self._doc(*where)), words), len(words), settings)

        return self.written([request(*entry.args) for entry in requests])

    def loglikelihood(self, requests: Iterable[Any]) -> list[GenerationResult]:
        """Scores of `(context, continuation, doc_to_visual, doc_id, task, split)`."""

        def request(words: str, target: Any, visual: Any = None, *where: Any) -> Request:
            if not where:
                raise ValueError(f"{target!r:.80} is to be scored without its example; leave out acc_mutual_info.")

            def query() -> Query:
                doc = self._doc(*where)
                return self._query(visual(doc), words, target if isinstance(target, str) else target(doc))

            return Request(query, len(words), {})

        return self.scored([request(*entry.args) for entry in requests])


class AimChat(Aim):
    """Asked by chats, which is what lmms-eval takes first."""

    is_simple = False

    def generate_until(self, requests: Iterable[Any]) -> list[GenerationResult]:
        """Answers to `(context, doc_to_messages, settings, doc_id, task, split)`."""

        def request(words: str, messages: Any, settings: Any, *where: Any) -> Request:
            return Request(lambda: self._asked(messages(self._doc(*where))), len(words), settings)

        return self.written([request(*entry.args) for entry in requests])

    def loglikelihood(self, requests: Iterable[Any]) -> list[GenerationResult]:
        """Not there: lmms-eval makes no such requests for chats."""
        raise NotImplementedError("lmms-eval scores options only with --force_simple.")

    def _asked(self, chat: Sequence[Mapping[str, Any]]) -> Query:
        """The query of a chat: images and words in their order."""
        turns = [{**turn, "content": parts_of(turn)} for turn in chat]
        parts = [part for turn in turns for part in turn["content"]]
        images = pictures([part["image"] for part in parts if part["type"] == "image"])
        if self.prompts == "plain":
            texts = (self.processor.image_text if part["type"] == "image" else part["text"] for part in parts)
            return Query(self.processor.front(0) + "".join(texts), images)
        bare_turns = [{**turn, "content": [bare(part) for part in turn["content"]]} for turn in turns]
        return Query(self.processor.rendered(bare_turns), images)


def generation_settings(requested: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as `generate` takes them: greedy unless a temperature above 0 is given."""
    known, temperature = GenerationConfig().to_dict(), requested.get("temperature")
    settings = {**DEFAULTS, **{k: v for k, v in requested.items() if k in known and v is not None}}
    settings["do_sample"] = bool(settings["do_sample"] if temperature is None else temperature)
    greedy = () if settings["do_sample"] else ("temperature", "top_p", "top_k")
    return {name: value for name, value in settings.items() if name not in greedy}


def until(text: str, ends: Any) -> str:
    """An answer up to the first of the words that end it."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.split(end)[0] if end else text
    return text.strip()
