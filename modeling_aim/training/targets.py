"""Training targets: prompts with the texts to learn after them, as batches with labels.

A target is templated like a query: its question through the backbone's chat template or plainly, or its
images alone for a caption, and behind it the answer and the token that ends an answer. Only these two are scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BatchFeature

from ..backbone_aim import longest_prompt
from ..data.shrink import ShrinkFor
from ..demonstrations_aim import Demonstration
from ..processing_aim import AimProcessor
from .episodes import Episode, Opener

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration

SENTINEL = "aimanswergoeshere"
TEACHERS = ("full", "text")
PROMPTS = ("chat", "plain", "mixed")
BLANK = 224  # pixels of a side of an image that stands where nothing can be read


@dataclass(frozen=True)
class AnswerFrame:
    """What stands between a prompt and its answer, and what ends an answer.

    Args:
        lead: between prompt and answer: a space, or nothing.
        end: the special token that ends an answer.
        prompts: how questions are put: `"chat"`, through the chat template, `"plain"`, behind the images, or
            `"mixed"`, one half each.
    """

    lead: str
    end: str
    prompts: str = "chat"

    def __post_init__(self) -> None:
        if self.prompts not in PROMPTS:
            raise ValueError(f"prompts={self.prompts!r} is unknown; choose one of {PROMPTS}.")

    @classmethod
    def of(cls, processor: AimProcessor, eos_ids: Sequence[int] = (), prompts: str = "chat") -> AnswerFrame:
        """Found out from the backbone's chat template, where it has one.

        Args:
            processor: of the backbone.
            eos_ids: ids that end an answer in `generate`.
            prompts: see the class.
        """
        tokenizer = processor.tokenizer
        ends = [tokenizer.convert_ids_to_tokens(i) for i in eos_ids]
        ends = [end for end in [*ends, tokenizer.eos_token] if isinstance(end, str)]
        if processor.chat_template is None:
            return cls("", ends[-1] if ends else "", "plain")
        prompt = processor.prompt("?", images=0)
        turns = [("user", "?"), ("assistant", SENTINEL)]
        chat = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in turns]
        before, _, after = processor.processor.apply_chat_template(chat).partition(SENTINEL)
        lead = before[len(before.rstrip()) :] if prompt.rstrip() == prompt else ""
        after = after.strip()
        end = next((end for end in ends if after.startswith(end)), ends[-1] if ends else "")
        return cls(lead, end, prompts)

    def words(self, processor: AimProcessor, target: Demonstration) -> tuple[str, str]:
        """Prompt of a target, and the words scored behind it."""
        images = len(target.images)
        if target.question is None:
            return processor.image_text * images, processor.apply_template(target)[0] + self.end
        if self.prompts == "plain" or (self.prompts == "mixed" and int(target.key[:8], 16) % 2):
            words, start, _ = processor.apply_template(target)
            question = words[:start].rstrip()
            return processor.image_text * images + question, words[len(question) :] + self.end
        return processor.prompt(target.question, images), self.lead + target.text + self.end


def encode_targets(
    processor: AimProcessor, frame: AnswerFrame, targets: Sequence[Demonstration], fronts: Sequence[Any] = ()
) -> tuple[BatchFeature, torch.Tensor]:
    """Make one padded batch of targets.

    Args:
        processor: of the backbone.
        frame: how its answers stand.
        targets: one a row.
        fronts: for each row the words and images of demonstrations that stand before it, when a teacher reads them in
            full.

    Returns:
        The backbone's inputs, and labels `(batch, length)`, -100 but at answers and what ends them.
    """
    images, prompts, spans = [], [], []
    begin = processor.front(0)  # BOS that only a chat template writes stands before every prompt, once
    for row, target in enumerate(targets):
        words, front_images = fronts[row] if fronts else ("", [])
        prompt, answer = frame.words(processor, target)
        prompt = begin + words + prompt.removeprefix(begin)
        images.append([*front_images, *target.images])
        prompts.append(prompt + answer)
        spans.append((len(prompt), len(prompts[-1])))
    inputs, mask = processor.encode_spans(images, prompts, spans)
    return inputs, inputs["input_ids"].masked_fill(~mask, -100)


def logits_kept(labels: torch.Tensor) -> int:
    """Positions at the end of a batch whose logits are needed, from its labels `(batch, length)`."""
    scored = (labels != -100).int()
    return int((scored.shape[1] - scored.argmax(dim=1)).max()) + 1


class EpisodeCollator:
    """Makes a batch of episodes into what `AimForConditionalGeneration.forward` takes: a row for each target.

    It opens their images, no larger than the processor needs them (`ShrinkFor`). A batch of which nothing can be read
    is one row without a label.

    Args:
        model: gives processor, precision and number of positions.
        teacher: also encode what a teacher reads for distillation: `"full"`, demonstrations with their images in the
            prompt, or `"text"`, their words alone.
        prompts: how questions are put: `"chat"`, `"plain"` or `"mixed"`, see `AnswerFrame`.
    """

    def __init__(self, model: AimForConditionalGeneration, teacher: str | None = None, prompts: str = "chat") -> None:
        if teacher is not None and teacher not in TEACHERS:
            raise ValueError(f"distillation from {teacher!r} is unknown; choose one of {TEACHERS}.")
        self.processor, self.dtype, self.teacher = model.processor, model.dtype, teacher
        eos = model.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.frame = AnswerFrame.of(self.processor, ends, prompts)
        self.longest = longest_prompt(model.backbone.config)
        self.budget = model.config.max_fused_tokens
        self.open = Opener(self.processor.why_unreadable, ShrinkFor(self.processor))

    def __call__(self, loaded: Sequence[Episode | None]) -> dict[str, Any]:
        """Inputs, `labels`, `demos` (a list for each row), and the teacher's inputs.

        Beside them `sources`, what was `skipped`, and `counts` of episodes, images and tokens of the targets' prompts.

        Args:
            loaded: episodes, or `None` for each that a resumed run has behind it; of these alone comes an empty batch.
        """
        if all(episode is None for episode in loaded):
            return {}
        episodes = [self.open(episode) for episode in loaded if episode is not None]
        skipped: Counter[str] = sum((episode.skipped for episode in episodes), Counter())
        rows: list[Any] = [
            (episode.pairs[:place], episode.pairs[place]) for episode in episodes for place in episode.targets if place
        ]
        scored = bool(rows)
        if scored:
            rows, inputs, labels = self._fitting(rows, skipped)
        else:
            skipped["batch of which nothing can be read"] += 1
            blank = Demonstration((Image.new("RGB", (BLANK, BLANK)),), "nothing to be seen here")
            rows = [((blank,), blank)]
            inputs, labels = encode_targets(self.processor, self.frame, [blank])
            labels.fill_(-100)
        batch: dict[str, Any] = {
            **inputs.to(self.dtype),
            "labels": labels,
            "demos": [list(demos) for demos, _ in rows],
        }
        batch["sources"] = [episode.source for episode in episodes]
        batch["skipped"] = dict(skipped)
        pairs = {id(pair): len(pair.images) for demos, target in rows for pair in (*demos, target)}
        batch["counts"] = {
            "episodes": len(episodes),
            "images": sum(pairs.values()),
            "tokens": int(inputs["attention_mask"].sum()),
        }
        if self.teacher is not None:
            fronts = [self._front(demos) for demos, _ in rows]
            full, known = encode_targets(self.processor, self.frame, [target for _, target in rows], fronts)
            batch["teacher"] = {**full.to(self.dtype), "labels": known if scored else known.fill_(-100)}
        return batch

    def _front(self, demos: Sequence[Demonstration]) -> tuple[str, list[Any]]:
        """Demonstrations as the teacher reads them: words, and images where it sees them."""
        if self.teacher == "text":
            return "".join(self.processor.apply_template(demo)[0] + "\n" for demo in demos), []
        words = [
            self.processor.image_text * len(demo.images) + self.processor.apply_template(demo)[0] for demo in demos
        ]
        return "".join(text + "\n" for text in words), [image for demo in demos for image in demo.images]

    def _fitting(self, rows: list[Any], skipped: Counter[str]) -> tuple[list[Any], BatchFeature, torch.Tensor]:
        """Rows that fit in the backbone's positions, encoded.

        The earliest demonstrations leave a row that is too long; a target that leaves no room for one is skipped.
        """
        longest = None
        while rows:
            inputs, labels = encode_targets(self.processor, self.frame, [target for _, target in rows])
            if self.longest is None:
                return rows, inputs, labels
            room = self.longest - inputs["input_ids"].shape[1]
            fitting = [(self._latest(demos, room), target) for demos, target in rows]
            if all(demos for demos, _ in fitting):
                return fitting, inputs, labels
            longest = rows.pop(int(inputs["attention_mask"].sum(dim=1).argmax()))[1]
            skipped["target longer than the context"] += 1
        assert longest is not None
        raise ValueError(
            f"No target of this batch fits in the backbone's {self.longest} positions with even one demonstration. "
            f"One target is {longest.text[:80]!r}. Give shorter texts, or smaller or fewer images."
        )

    def _latest(self, demos: Sequence[Demonstration], room: int) -> Sequence[Demonstration]:
        """The last demonstrations that have room for their fused tokens."""
        kept = len(demos)
        for demo in reversed(demos):
            tokens = len(self.processor.tokenizer(self.processor.apply_template(demo)[0])["input_ids"])
            room -= tokens if self.budget is None else min(tokens, self.budget)
            if room < 0:
                break
            kept -= 1
        return demos[kept:]
