"""Instruction data from captions and boxes by a text model: LLaVA's three kinds (arXiv 2304.08485), and episodes.

aim data instruct --source captions_and_boxes.jsonl --kinds conversation,detail,complex --model MODEL --output data
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bounds import check_least_options
from ..data.jsonl import json_lines
from .asking import ANSWERS, Asking, AskingSettings, Ledger, Outcome, Stopped, check_output, costs_of
from .captioned import CaptionedImage, read_captioned
from .few_shot import SORTS, Episode, naming_episodes, rule_episodes, style_episodes
from .parsing import Unparsable, description, one_line, questions_and_answers
from .prompts import OWN, STYLE_SYSTEM, STYLES, Prompts, detail_question, read_prompts
from .text_model import Answer, Message, Request

KINDS = ("conversation", "detail", "complex", "episodes")
NEED_BOXES = ("detail", "complex")
ALL, EPISODES, UNPARSABLE, REPORT = "instructions.json", "episodes.jsonl", "unparsable.jsonl", "report.json"


@dataclass(frozen=True, kw_only=True)
class InstructSettings(AskingSettings):
    """What `aim data instruct` takes.

    Args:
        source: jsonl with id, image, captions and instances (category and bbox, as shares of the image) a line; or
            COCO's captions, such as captions_val2014.json.
        output: folder of what is written; the same command resumes there.
        instances: COCO's boxes, such as instances_val2014.json, for COCO's captions.
        kinds: conversation, detail, complex and episodes, or some of them.
        images: folder of the images; those that are not there are left out.
        prompts: folder with LLaVA's prompts (playground/data/prompts of its repository), read as they are; own ones
            by default.
        limit: take the first images only.
        ask_without_boxes: ask for detail and complex also of images without boxes, from their captions alone.
        episode_kinds: naming, style and rule, or some of them; style alone asks the text model.
        episodes: most episodes of each of these.
        shots: demonstrations of an episode.
        seed: draws episodes.
    """

    source: Path
    output: Path
    instances: Path | None = None
    kinds: tuple[str, ...] = ("conversation", "detail", "complex")
    images: Path | None = None
    prompts: Path | None = None
    limit: int | None = None
    ask_without_boxes: bool = False
    episode_kinds: tuple[str, ...] = SORTS
    episodes: int = 1000
    shots: int = 4
    seed: int = 0
    temperature: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, given, known in (("kinds", self.kinds, KINDS), ("episode-kinds", self.episode_kinds, SORTS)):
            wrong = [name for name in given if name not in known]
            if wrong or not given:
                raise ValueError(f"--{option} {','.join(given) or 'of nothing'}: expected some of {', '.join(known)}.")
        check_least_options(self, 1, "limit", "episodes")
        check_least_options(self, 2, "shots")

    @property
    def asks(self) -> tuple[str, ...]:
        """The kinds for which the text model is asked."""
        styles = ("style",) if "episodes" in self.kinds and "style" in self.episode_kinds else ()
        return (*(kind for kind in self.kinds if kind != "episodes"), *styles)


@dataclass
class Made:
    """What a run has made.

    Args:
        counts: records and episodes, by file.
        pairs: questions with their answers.
        left_out: what was not used, by reason.
        unparsable: answers without the form that was asked for, with the reason.
        stopped: why the run ended early, if it did.
    """

    counts: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    unparsable: list[dict[str, str]] = field(default_factory=list)
    stopped: str | None = None


def make_instructions(settings: InstructSettings, show: Callable[[str], None] = print) -> Made | None:
    """Ask the text model, and write the records made from its answers.

    Args:
        settings: source, kinds, model, output.
        show: takes lines about what is going to be asked.

    Returns:
        What was made; `None` of a dry run.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: the source, the prompts or the output cannot be used, or no text model is named.
        Stopped: the run ended before the first answer.
    """
    made = Made()
    rows = read_captioned(settings.source, settings.instances, settings.images, made.left_out)[: settings.limit]
    prompts = {
        kind: OWN[kind] if settings.prompts is None else read_prompts(settings.prompts, kind)
        for kind in settings.asks
        if kind in OWN
    }
    requests = {
        f"{kind} {number} {row.id}": Request(
            messages, settings.model or "", settings.temperature, settings.answer_tokens
        )
        for kind, number, row, messages in _asked(rows, prompts, settings, made.left_out)
    }
    for reason, count in made.left_out.items():
        show(f"Left out: {count:,} × {reason}.")
    from ..files_aim import only_one  # with torch

    check_output(settings.output)
    with only_one(settings.output, "aim data instruct"):
        ledger = Ledger(settings.output / ANSWERS)
        outcome = Outcome()
        if settings.asks:
            show(str(costs_of(requests, ledger)))
        if settings.dry_run:
            return None
        ledger.path.touch()  # marks the folder as this command's
        if settings.asks:
            outcome = Asking(settings.opened(), ledger, settings).run(requests, "asked")
        if outcome.stopped and not outcome.answers:
            raise Stopped(outcome.stopped)
        made.stopped = outcome.stopped
        made.left_out.update(outcome.reasons())
        _write(settings, rows, outcome.answers, made)
    return made


def _asked(
    rows: Iterable[CaptionedImage], prompts: Mapping[str, Prompts], settings: InstructSettings, left_out: Counter[str]
) -> Iterable[tuple[str, int, CaptionedImage, tuple[Message, ...]]]:
    """What the text model is asked: kind, number and words of an image, and the chat."""
    for kind in settings.asks:
        for number, row in enumerate(rows):
            if kind == "style":
                system = {"role": "system", "content": STYLE_SYSTEM.format(style=STYLES[_style(number)])}
                yield kind, number, row, (system, {"role": "user", "content": row.in_words})
            elif kind in NEED_BOXES and not row.boxes and not settings.ask_without_boxes:
                left_out[f"image without boxes, for {kind} (--ask-without-boxes asks from captions alone)"] += 1
            else:
                words = row.with_boxes if kind in NEED_BOXES else row.in_words
                yield kind, number, row, prompts[kind].messages(words)


def _style(number: int) -> str:
    """The style in which an image is described, by its place."""
    return list(STYLES)[number % len(STYLES)]


# --- what is written


def _write(settings: InstructSettings, rows: list[CaptionedImage], answers: Mapping[str, Answer], made: Made) -> None:
    """Write the files of all kinds from all answers, replacing earlier ones."""
    records: list[dict[str, Any]] = []
    styled: dict[str, list[tuple[CaptionedImage, str]]] = {}
    seen: set[tuple[str, ...]] = set()
    for name, answer in answers.items():
        kind, number, _ = name.split(" ", 2)
        row = rows[int(number)]
        try:
            if kind == "style":
                style = _style(int(number))
                styled.setdefault(style, []).append((row, one_line(answer.text, answer.is_cut)))
                continue
            pairs = list(_new(kind, row, answer, seen, made))
        except Unparsable as reason:
            made.unparsable.append({"for": name, "reason": str(reason), "answer": answer.text})
            continue
        if pairs:
            records.append({"kind": kind, **_record(row, pairs)})
            made.pairs += len(pairs)
    for kind in (kind for kind in settings.kinds if kind != "episodes"):
        _write_json(settings.output / f"{kind}.json", [_plain(r) for r in records if r["kind"] == kind], made)
    if any(kind != "episodes" for kind in settings.kinds):
        _write_json(settings.output / ALL, [_plain(record) for record in records], made)
    if "episodes" in settings.kinds:
        _write_lines(settings.output / EPISODES, _episodes(settings, rows, styled, made), made)
    _write_lines(settings.output / UNPARSABLE, made.unparsable, made)
    report = {"written": made.counts, "pairs": made.pairs, "left_out": dict(made.left_out), "stopped": made.stopped}
    _save(settings.output / REPORT, json.dumps(report, indent=1).encode())


def _new(
    kind: str, row: CaptionedImage, answer: Answer, seen: set[tuple[str, ...]], made: Made
) -> Iterable[tuple[str, str]]:
    """The questions and answers of one answer that were not there before."""
    if kind == "detail":
        text = description(answer.text, answer.is_cut)
        pairs = [(detail_question(_number(row)), text)]
    else:
        pairs = questions_and_answers(answer.text, answer.is_cut)
        if kind == "complex" and len(pairs) > 1:
            raise Unparsable(f"{len(pairs)} questions where one was asked for")
    for question, text in pairs:
        key = (row.image, " ".join(question.lower().split()), *([text] if kind == "detail" else []))
        if key in seen:
            made.left_out["question that the image already has"] += 1
            continue
        seen.add(key)
        yield question, text


def _record(row: CaptionedImage, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """A conversation in LLaVA's JSON: the image before or after its first question."""
    turns: list[dict[str, str]] = []
    for place, (question, answer) in enumerate(pairs):
        question_text = question.replace("<image>", "").strip()
        if not place:
            question_text = f"<image>\n{question_text}" if _number(row) // 8 % 2 else f"{question_text}\n<image>"
        turns += [
            {"from": "human", "value": question_text},
            {"from": "gpt", "value": answer.replace("<image>", "").strip()},
        ]
    return {"id": row.id, "image": row.image, "conversations": turns}


def _number(row: CaptionedImage) -> int:
    """A number that follows from the image alone."""
    return int(hashlib.sha256(f"{row.id}\0{row.image}".encode("utf-8", "replace")).hexdigest()[:8], 16)


def _episodes(
    settings: InstructSettings, rows: list[CaptionedImage], styled: Mapping[str, Any], made: Made
) -> list[Episode]:
    count, shots = settings.episodes, settings.shots
    episodes: list[Episode] = []
    for sort in dict.fromkeys(settings.episode_kinds):
        rng = random.Random(f"{sort} {settings.seed}")
        if sort == "style":
            drawn = list(style_episodes(styled, count, shots, rng))
        else:
            drawn = list((naming_episodes if sort == "naming" else rule_episodes)(rows, count, shots, rng))
        made.counts[f"{sort} episodes"] = len(drawn)
        if not drawn:
            lacking = f"more than {shots} answers of a style" if sort == "style" else "enough images with boxes"
            made.left_out[f"{sort} episodes: there are not {lacking}"] += 1
        episodes += drawn
    return episodes


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "kind"}


def _write_json(path: Path, records: list[dict[str, Any]], made: Made) -> None:
    made.counts[path.name] = len(records)
    _save(path, json.dumps(records, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace"))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]], made: Made) -> None:
    listed = list(rows)
    made.counts[path.name] = len(listed)
    _save(path, json_lines(listed))


def _save(path: Path, content: bytes) -> None:
    from ..files_aim import write_whole

    write_whole(path, content)
