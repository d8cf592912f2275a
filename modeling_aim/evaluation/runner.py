"""One evaluation, from tasks to tables: `aim eval`, and `evaluate(EvalSettings(...))` in Python.

Every answer is on disk as soon as its batch is done. Batches follow from the settings alone, so a run that was
interrupted, or is shared by several processes, ends in the results of one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging

from .. import AimForConditionalGeneration, DemonstrationBank
from ..cache_aim import LRUCache
from ..files_aim import only_one, write_whole
from ..image_settings import tokens_line
from ..progress import show_progress
from .baselines import refuses
from .choosing import choose_all, read_chosen
from .folder import RECORD, begin, claim
from .methods import Prompt, ShownShot, method_of
from .reads import Reads, Unusable, check_names
from .report import write_report
from .results import LEFT_OUT, PREDICTIONS, RESULTS, Cell, Kept, Key, PredictionRow, cell_figures, curves, write_rows
from .settings import EvalSettings
from .subject import Answer, Subject, load_subject
from .summary import about, model_identity, task_summary, too_long
from .task import Example
from .task_run import TaskRun, open_task_run

logger = logging.get_logger(__name__)

GIB = 2**30


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """Evaluate a model; resumes an interrupted run with the same settings.

    Args:
        settings: all of the run.

    Returns:
        What `results.json` in `settings.output` holds; predictions, table and pictures are beside it.

    Raises:
        ValueError: settings, tasks or a model that cannot work, or an output folder that holds another run.
    """
    # without cpu=True processes on CPUs would not know of each other; one of them may choose demonstrations for long
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    tasks = [open_task_run(spec, settings) for spec in settings.tasks]
    names = [task_run.task.name for task_run in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"Two tasks have the same name ({', '.join(names)}); give one another: name=... in its spec.")
    claim(settings)
    with only_one(settings.output, "aim eval") if state.is_main_process else contextlib.nullcontext():
        return _evaluate(settings, tasks, state)


def _evaluate(settings: EvalSettings, tasks: Sequence[TaskRun], state: PartialState) -> dict[str, Any]:
    """The run, after all that can be checked without a model."""
    claim(settings)
    subject = load_subject(
        settings.repo, settings.backbone, revision=settings.revision, dtype=settings.dtype,
        load_in_4bit=settings.load_in_4bit, device_map=settings.device_map, prompts=settings.prompts,
        separator=settings.separator, image_settings=settings.image_settings,
    )  # fmt: skip
    if state.is_main_process:
        Console(stderr=True).print(tokens_line(subject.processor), soft_wrap=True, highlight=False)
    state.wait_for_everyone()
    if state.is_main_process:
        digests = {task_run.task.name: task_run.digest for task_run in tasks}
        begin(settings, model_identity(settings, subject), digests)
    state.wait_for_everyone()
    run = Run(settings, subject, tasks, state)
    run.choose()
    run.answer()
    state.wait_for_everyone()
    if state.is_main_process:
        run.finish()
    state.wait_for_everyone()
    return json.loads((Path(settings.output) / RESULTS).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Encoded:
    """A batch that is ready to be answered, and by place those examples that cannot be, with the reason."""

    batch: Any
    left_out: dict[int, str]


class Run:
    """The loop over all cells of a run.

    Args:
        settings: of the run.
        subject: the model.
        task_runs: the tasks.
        state: this process among others.
    """

    def __init__(
        self, settings: EvalSettings, subject: Subject, task_runs: Sequence[TaskRun], state: PartialState
    ) -> None:
        self.settings, self.subject, self.state = settings, subject, state
        self.task_runs = {task_run.task.name: task_run for task_run in task_runs}
        self.output = Path(settings.output)
        self.kept = Kept(self.output / "unfinished", state.process_index)
        self.states = LRUCache(int(settings.memory * GIB))
        self.notes: list[str] = []
        self._lengths: dict[tuple[str, int], int] = {}  # of prompts with every image, by task and demonstrations
        self.left_out: defaultdict[str, set[str]] = defaultdict(set)  # by task, in this process

    # --- demonstrations

    def choose(self) -> None:
        """Have demonstrations chosen by one process, and read what it wrote."""
        counts = self.settings.counts
        open_ = [task_run for task_run in self.task_runs.values() if not task_run.task.fixed and counts]
        files = {
            task_run.task.name: self.output / "demonstrations" / f"{_slug(task_run.task.name)}.jsonl"
            for task_run in open_
        }
        if self.state.is_main_process and open_:
            total = sum(len(examples) for task_run in open_ for examples in task_run.examples.values())
            with show_progress("choose demonstrations", "examples", total) as report:
                for task_run in open_:
                    path = files[task_run.task.name]
                    bank = partial(self._bank, path.with_suffix(".bank"))
                    tell = partial(_noted, report, f"{task_run.task.name}: choose demonstrations")
                    choose_all(task_run.task, task_run.examples, counts, self.settings.choice, path, bank, tell)
        self.state.wait_for_everyone()
        for task_run in open_:
            task_run.chosen = read_chosen(task_run.task, files[task_run.task.name])

    def _bank(self, folder: Path, demos: Iterator[Any]) -> Any:
        """A bank of a task's pool, kept in the output folder; a bare backbone compares without fused tokens."""
        plugin = self.subject.plugin
        if plugin is None:
            plugin = AimForConditionalGeneration.from_backbone(self.subject.backbone, self.subject.processor)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return DemonstrationBank.build(plugin, demos, folder, batch_size=self.settings.batch_size, thumbnails=0)

    # --- answers

    @cached_property
    def cells(self) -> list[Cell]:
        """All settings of the run; a seed that changes nothing for a method is left out for it."""
        methods, cells = self.settings.methods, []
        for name, task_run in self.task_runs.items():
            bare = [m for m in methods if not method_of(m).shots] or ["zero"] * (0 in self.settings.shots)
            for method in bare:
                cells += [Cell(name, method, 0, seed) for seed in task_run.examples if not task_run.repeats(seed)]
            with_demos = [m for m in methods if method_of(m).shots and m not in self._cannot]
            for seed in task_run.examples:
                for count in self.settings.counts:
                    again = task_run.repeats(seed, count)
                    fitting = [m for m in with_demos if not self._beyond(name, m, count)]
                    cells += [Cell(name, m, count, seed) for m in fitting if method_of(m).draws or not again]
        return cells

    def _beyond(self, task: str, name: str, count: int) -> bool:
        """Whether a method is left out because a prompt of a task with `count` images is longer than the positions."""
        method, longest = method_of(name), self.subject.longest
        together = method.many_images and (method.baseline is None or method.baseline.whole)
        if not self.settings.skip_too_long or longest is None or not together:
            return False
        if (task, count) not in self._lengths:
            seed, examples = next(iter(self.task_runs[task].examples.items()))
            prompt = self.prompt(Cell(task, "full", count, seed), examples[0])
            inputs = self.subject.encode([prompt], [f"Example {examples[0].id!r} of {task}"]).inputs
            self._lengths[task, count] = length = inputs["input_ids"].shape[1]
            if length > longest:
                self.notes.append(
                    f"{task}: at {count} demonstrations the prompt with every image has some {length} tokens; methods "
                    f"that need it whole are left out, for the backbone has {longest} positions."
                )
        return self._lengths[task, count] > longest

    @cached_property
    def _cannot(self) -> set[str]:
        """Methods that this backbone cannot be shown demonstrations with."""
        methods = {m: method_of(m) for m in self.settings.methods if self.settings.counts}
        many = [m for m, method in methods.items() if method.many_images]
        untrained = [m for m, method in methods.items() if method.projector == "untrained"]
        refused: set[str] = set()
        for names, why_not, what in (
            (many, self.subject.refuses_two_images, "this backbone takes one image a prompt"),
            (untrained, self.subject.refuses_states, "states cannot enter this backbone at depth"),
        ):
            if names and (why := why_not()):
                self.notes.append(f"{', '.join(names)}: left out, {what} ({why}).")
                refused.update(names)
        for name in [m for m in methods if m not in refused]:
            baseline = methods[name].baseline
            if baseline is not None and (why := refuses(baseline, self.subject)):
                self.notes.append(f"{name}: left out, this backbone cannot be served ({why}).")
                refused.add(name)
        return refused

    def batches(self, cell: Cell) -> list[list[int]]:
        """Places of a cell's examples that are answered together: prompts of about one length."""
        examples = self.task_runs[cell.task].examples[cell.seed]
        prompts = [self.prompt(cell, example) for example in examples]
        template = self.subject.processor.apply_template
        sizes = [(len(p.images), len(p.text) + sum(len(template(demo.words)[0]) for demo in p.fused)) for p in prompts]
        batches: list[list[int]] = []
        for place in sorted(range(len(examples)), key=lambda i: (*sizes[i], i)):
            images = sizes[place][0]
            room = max(1, min(self.settings.batch_size, self.settings.images_at_once // max(images, 1)))
            alike = batches and bool(sizes[batches[-1][0]][0]) == bool(images)
            choosing = batches and bool(examples[batches[-1][0]].options) == bool(examples[place].options)
            if alike and choosing and len(batches[-1]) < room:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches

    def prompt(self, cell: Cell, example: Example) -> Prompt:
        """What is shown of an example in a cell."""
        shots = self.task_runs[cell.task].chosen[cell.seed, cell.shots, example.id] if cell.shots else ()
        demos = [ShownShot(shot, shot) for shot in shots]
        return method_of(cell.method).show(self.subject.prompt_builder, example, demos, cell.seed)

    def answer(self) -> None:
        """Answer this process's share of all batches, but for those that are done."""
        done = set(self.kept.rows())
        total = sum(len(self.task_runs[cell.task].examples[cell.seed]) for cell in self.cells) - len(done)
        reads: tuple[str, dict[tuple[int, ...], Reads]] = ("", {})
        share = total // self.state.num_processes
        with show_progress("answer", "examples", share, disable=not self.state.is_main_process) as report:
            for cell, places, missing, batch in self._ahead(self._work(done)):
                task_run = self.task_runs[cell.task]
                if reads[0] != cell.task:
                    reads = cell.task, self._reads(cell.task)
                pairs = self._answered(cell, places, batch, reads[1])
                self.kept.add(self._row(cell, e, a) for e, a in pairs if e.id in missing)
                self._check_left_out(task_run)
                report(len(missing), f"{cell.task}, {cell.method}, {cell.shots} shots, seed {cell.seed}")

    def _answered(
        self, cell: Cell, places: list[int], encoded: Encoded, reads_by_layers: Mapping[tuple[int, ...], Reads]
    ) -> list[tuple[Example, Any]]:
        """Each example of a batch with its answer, or with the words why it cannot be asked."""
        task_run = self.task_runs[cell.task]
        left_out: dict[int, str] = {}
        while True:
            left_out |= encoded.left_out
            kept = [place for place in places if place not in left_out]
            examples = [task_run.examples[cell.seed][place] for place in kept]
            options = [example.options for example in examples]
            if not kept:
                answers: list[Any] = []
                break
            subject = self.subject.answering(encoded.batch.prompts[0])
            reads: Any = reads_by_layers.get(subject.read_layers)
            try:
                answers = subject.answer(encoded.batch, options, task_run.task.max_new_tokens, cell.seed, reads)
                break
            except Unusable:  # a demonstration: rows that show it leave the batch
                for place, prompt in zip(kept, encoded.batch.prompts, strict=True):
                    bad = [reads.unusable[demo.key] for demo in prompt.fused if demo.key in reads.unusable]
                    left_out |= {place: bad[0]} if bad else {}
                encoded = self._encode(cell, [place for place in kept if place not in left_out])
        for place, reason in left_out.items():
            name = task_run.examples[cell.seed][place].id
            if name not in self.left_out[cell.task]:
                logger.warning(f"Left out: {reason}")
            self.left_out[cell.task].add(name)
        pairs: list[tuple[Example, Any]] = list(zip(examples, answers, strict=True))
        return pairs + [(task_run.examples[cell.seed][place], reason) for place, reason in left_out.items()]

    def _check_left_out(self, task_run: TaskRun) -> None:
        """Raise `ValueError` where more than half of a task's examples cannot be asked: then its data is wrong."""
        count, total = (
            len(self.left_out[task_run.task.name]),
            len({e.id for examples in task_run.examples.values() for e in examples}),
        )
        if 2 * count > total:
            raise ValueError(
                f"{count} of the {total} examples of {task_run.task.name} cannot be asked, such as "
                f"{min(self.left_out[task_run.task.name])!r}; the log says why. Fix its data."
            )

    def _work(self, done: set[Key]) -> Iterator[tuple[Cell, list[int], set[str]]]:
        """Cell, places and examples not yet answered of each batch of this process."""
        number = 0
        for cell in self.cells:
            examples = self.task_runs[cell.task].examples[cell.seed]
            for batch in self.batches(cell):
                number += 1
                names = {examples[place].id for place in batch}
                missing = {e for e in names if (cell.task, cell.method, cell.shots, cell.seed, e) not in done}
                if missing and number % self.state.num_processes == self.state.process_index:
                    yield cell, batch, missing

    def _ahead(self, work: Iterator[tuple[Cell, list[int], set[str]]]) -> Iterator[tuple[Any, ...]]:
        """The same batches encoded, each while the one before it is answered."""

        def encoded() -> tuple[Any, ...] | None:
            batch = next(work, None)
            return None if batch is None else (*batch, self._encode(batch[0], batch[1]))

        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(encoded)
            while (now := coming.result()) is not None:
                coming = thread.submit(encoded)
                yield now

    def _encode(self, cell: Cell, places: Sequence[int]) -> Encoded:
        """A batch without examples that cannot be encoded; where one is among them each is tried alone."""
        examples = [self.task_runs[cell.task].examples[cell.seed][place] for place in places]
        prompts = [self.prompt(cell, example) for example in examples]
        names = [f"Example {e.id!r} of {cell.task}" for e in examples]
        try:
            return Encoded(self.subject.encode(prompts, names) if places else None, {})
        except Exception as error:
            left_out = {}
            for place, prompt, name in zip(places, prompts, names, strict=True):
                try:
                    self.subject.encode([prompt], [name])
                except Exception as reason:
                    message = str(reason).splitlines()[0][:200] if str(reason) else type(reason).__name__
                    left_out[place] = message if name in message else f"{name}: {message}"
            if not left_out:
                raise error
        kept = [row for row, place in enumerate(places) if place not in left_out]
        batch = self.subject.encode([prompts[i] for i in kept], [names[i] for i in kept]) if kept else None
        return Encoded(batch, left_out)

    def _reads(self, name: str) -> dict[tuple[int, ...], Reads]:
        """Hidden states of a task's demonstrations, in the order in which all cells need them, by the layers read."""
        plans: dict[tuple[int, ...], tuple[Any, list[ShownShot]]] = {}
        for cell in (cell for cell in self.cells if cell.task == name):
            for prompt in (self.prompt(cell, example) for example in self.task_runs[name].examples[cell.seed]):
                if prompt.fused:
                    subject = self.subject.answering(prompt)
                    plans.setdefault(subject.read_layers, (subject.plugin, []))[1].extend(prompt.fused)
        check_names([demo for _, plan in plans.values() for demo in plan], name)
        size = self.settings.batch_size
        return {layers: Reads(plugin, plan, size, self.states, name) for layers, (plugin, plan) in plans.items()}

    def _row(self, cell: Cell, example: Example, answer: Answer | str) -> PredictionRow:
        """What is stored of an answer, or of the reason why it is missing."""
        if isinstance(answer, str):
            return {**asdict(cell), "example": example.id, LEFT_OUT: answer}
        task = self.task_runs[cell.task].task
        scores = task.score(example, answer.prediction)
        shots = self.task_runs[cell.task].chosen[cell.seed, cell.shots, example.id] if cell.shots else []
        return {
            **asdict(cell),
            "example": example.id,
            "demonstrations": [shot.id for shot in shots],
            "prediction": answer.prediction.text,
            "log_probabilities": list(answer.prediction.log_probabilities),
            "references": list(example.answers),
            "score": scores.get(task.metric),
            "scores": scores,
            "prompt_tokens": answer.prompt_tokens,
            "fused_tokens": answer.fused_tokens,
            "milliseconds": round(answer.milliseconds, 3),
            "reading_milliseconds": round(answer.reading_milliseconds, 3),
            "first_token_milliseconds": round(answer.first_token_milliseconds, 3),
            "kv_bytes": answer.kv_bytes,
        }

    # --- results

    def finish(self) -> None:
        """Put predictions in order, and write results, table and pictures."""
        rows = self.kept.rows()
        ordered: list[PredictionRow] = []
        by_cell: dict[Cell, list[PredictionRow]] = {}
        self._leave_out(rows)
        for cell in self.cells:
            examples = self.task_runs[cell.task].examples[cell.seed]
            by_cell[cell] = [rows[cell.task, cell.method, cell.shots, cell.seed, e.id] for e in examples]
            ordered += by_cell[cell]
        write_rows(self.output / PREDICTIONS, ordered)
        cells = self._figures(by_cell)
        results = {
            **about(self.settings, self.subject),
            "tasks": [task_summary(task_run, self.settings) for task_run in self.task_runs.values()],
            "cells": cells,
            "curves": curves(cells),
            "notes": self.notes + too_long(ordered, self.settings, self.subject.longest) + self._timed(),
        }
        write_whole(
            self.output / RESULTS,
            json.dumps(results, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"),
        )
        write_report(results, self.output)
        RECORD.write(self.output, {**RECORD.read(self.output), "finished": True})
        self.kept.remove()

    def _leave_out(self, rows: Mapping[Key, PredictionRow]) -> None:
        """Take examples that could not be asked in one cell out of all, so that methods are compared on the same."""
        bad: dict[str, dict[str, str]] = {}
        for (task, _, _, _, name), row in rows.items():
            if LEFT_OUT in row:
                bad.setdefault(task, {}).setdefault(name, row[LEFT_OUT])
        for task, reasons in bad.items():
            task_run = self.task_runs[task]
            task_run.examples = {
                seed: [e for e in examples if e.id not in reasons] for seed, examples in task_run.examples.items()
            }
            reason_list = "; ".join(list(reasons.values())[:3])
            self.notes.append(f"{task}: {len(reasons)} examples are left out of all methods, as in: {reason_list}")

    def _figures(self, by_cell: dict[Cell, list[PredictionRow]]) -> list[dict[str, Any]]:
        cell_rows = []
        for task, method, shots in dict.fromkeys((c.task, c.method, c.shots) for c in by_cell):
            rows = {c.seed: r for c, r in by_cell.items() if (c.task, c.method, c.shots) == (task, method, shots)}
            task_run = self.task_runs[task]
            figures = cell_figures(task_run.task, task_run.examples, rows)
            cell_rows.append({"task": task, "method": method, "shots": shots, **figures})
        return cell_rows

    def _timed(self) -> list[str]:
        """A note on times that cannot be compared."""
        alone = [m for m in self.settings.methods if method_of(m).baseline is not None and m not in self._cannot]
        if not alone or self.settings.batch_size == 1:
            return []
        return [f"{', '.join(alone)}: one prompt at a time. The times of other methods are shares of batches of up to "
                f"{self.settings.batch_size}; with batch_size=1 all can be compared."]  # fmt: skip


def _noted(report: Callable[[int, str], None], note: str, done: int) -> None:
    report(done, note)


def _slug(name: str) -> str:
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
