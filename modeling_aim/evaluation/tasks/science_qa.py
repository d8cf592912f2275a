"""ScienceQA (arXiv 2209.09513): questions of school science with options, half of them with an image.

Asked as LLaVA v1.5 or v1 does. The figures of files of answers and of GPT-4's are in `evaluation/science_qa.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.jsonl import read_json
from ...data.tables import MissingSplit, Row, Table
from ..metrics import LETTERS, scienceqa_choice
from ..task import Example, Prediction
from .splits import SplitTask

PROTOCOLS = ("v1.5", "v1", "plain")
INSTRUCTION = "Answer with the option's letter from the given choices directly."
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
PARTS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")  # the columns of published tables, in their order
SPLITS = {"validation": "val"}  # the official file's names of splits
COLUMNS = ("image", "question", "choices", "answer", "hint")


class ScienceQA(SplitTask):
    """The test split: 4 241 questions, 2 017 of them with an image. Answers are parsed as in LLaVA's scorer.

    Args:
        path: the dataset of `lmms-lab` (parquet files in a folder for each configuration, or its Hub id), or the
            folder of the official `problems.json`, `pid_splits.json` and `images`. Columns `image` (or none),
            `question`, `choices`, `answer` (a number) and `hint`; `subject` and `grade` for the tables, `lecture` and
            `solution` for demonstrations of v1. Without a training split, the validation split is demonstrated from.
        protocol: `"v1.5"`: context, question, options, and an instruction to answer with the letter alone; `"v1"`:
            question, context, options, and demonstrations that end in "The answer is B." after lecture and solution;
            `"plain"`: as v1 with the words "Question:" and "Answer:", and 15 new tokens: for models that only
            continue a text.
        max_new_tokens: most tokens of an answer; 1 024 as in LLaVA's code, or 15 of `"plain"`, when `None`.
        config: `"ScienceQA-FULL"`, or `"ScienceQA-IMG"` for the questions with an image only.
        **settings: as for `SplitTask`.

    Raises:
        ValueError: there is no such protocol, or no token is asked for.
    """

    training = ("train", "validation")
    part_metrics = tuple(f"accuracy_{part}" for part in PARTS)

    def __init__(
        self,
        path: str = "lmms-lab-encoder/ScienceQA",
        *,
        protocol: str = "v1.5",
        max_new_tokens: int | None = None,
        split: str = "test",
        config: str | None = "ScienceQA-FULL",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, name=name or "ScienceQA", split=split, config=config, **settings)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r} is unknown; choose one of {PROTOCOLS}.")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        self.protocol = protocol
        self.max_new_tokens = max_new_tokens or (15 if protocol == "plain" else 1024)

    def table(self, path: str, split: str, config: str | None, images: str | None) -> Table:
        folder = official_folder(path)
        if folder is None:
            return super().table(path, split, config, images)
        table = official_table(folder, split, folder if images is None else Path(images).expanduser())
        if config == "ScienceQA-IMG":
            rows = [row for row in table.rows if row["image"]]
            return Table(table.where, table.folder, table.columns, rows)
        return table

    def check(self, table: Table) -> None:
        table.need(*COLUMNS)

    def example(self, table: Table, row: Row, name: str, what: str) -> Example | None:
        choices, answer = row["choices"], row["answer"]
        fits = isinstance(choices, list) and 0 < len(choices) <= len(LETTERS) and isinstance(answer, int)
        if not fits or not 0 <= answer < len(choices):
            raise ValueError(
                f"{table.where}, row {name}: choices={choices!r:.60} and answer={answer!r}; expected up to "
                f"{len(LETTERS)} choices and the number of the right one."
            )
        image = row["image"]
        empty = not image if image is None or isinstance(image, str) else not (image.get("bytes") or image.get("path"))
        images = () if empty else self.found(table.folder, image, what)
        if images is None:
            return None
        facts = {"choices": len(choices), "parts": list(parts_of(row, bool(images)))}
        reason = " ".join(str(row.get(column) or "") for column in ("lecture", "solution")).strip()
        return Example(
            name,
            images,
            question_of(row, self.protocol),
            (LETTERS[answer],),
            label=LETTERS[answer],
            facts={**facts, "reason": reason} if self.protocol == "v1" else facts,
        )

    def shown(self, example: Example) -> dict[str, Any]:
        letter = example.answers[0]
        answer = letter if self.protocol == "v1.5" else f"The answer is {letter}."
        if self.protocol == "v1":
            answer = f"{example.facts['reason']} {answer}".replace("  ", " ").strip()
        images = {"images": list(example.images)} if example.images else {}
        return {**images, "question": example.question, "answer": answer}

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        """Accuracy, and whether the answer could not be parsed, which is wrong."""
        chosen = scienceqa_choice(prediction.text.strip())
        return {"accuracy": float(chosen == example.answers[0]), "failed": float(chosen is None)}

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The means, and accuracy by subject, context and grade, of the parts that have questions."""
        right = [self.score(e, p)["accuracy"] for e, p in zip(examples, predictions, strict=True)]
        by_part = accuracy_by_part([example.facts["parts"] for example in examples], right)
        named = {f"accuracy_{part}": accuracy for part, accuracy in by_part.items()}
        return {**super().summary(examples, predictions), **named}

    def notes(self) -> list[str]:
        order = {"v1.5": "context, question, options, then the instruction to answer with the letter alone"}
        order_name = order.get(self.protocol, "question, context, options")
        return [*super().notes(), f"protocol={self.protocol}: {order_name}; up to {self.max_new_tokens} new tokens."]


def question_of(row: Mapping[str, Any], protocol: str) -> str:
    """What is asked, as a protocol words it (LLaVA's `convert_sqa_to_llava.py`; its spaces, too).

    Args:
        row: `question`, `hint` and `choices`.
        protocol: one of `PROTOCOLS`.
    """
    question, context = row["question"], (row["hint"] or "").strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    if protocol == "plain":
        return f"Question: {question.strip()}\nContext: {context}\nOptions: {options}\nAnswer:"
    if protocol == "v1":
        words = f"Question: {question}\nContext: {context}\nOptions: {options}\n"
        return words.replace("  ", " ").strip().replace("Question: ", "")
    words = f"Context: {context}\nQuestion: {question}\nOptions: {options}\n"
    return f"{words.replace('  ', ' ').strip()}\n{INSTRUCTION}"


# --- by subject, context and grade


def parts_of(row: Mapping[str, Any], has_image: bool) -> tuple[str, ...]:
    """The columns of published tables that a question counts in (ScienceQA's `tools/evaluate_acc.py`).

    Subject NAT, SOC or LAN; context TXT (a hint), IMG, both, or NO; grade G1-6 or G7-12. A question of both contexts
    counts in both.
    """
    parts = [SUBJECTS[row["subject"]]] if row.get("subject") in SUBJECTS else []
    has_text = bool(row["hint"])
    parts += ["TXT"] * has_text + ["IMG"] * has_image + ["NO"] * (not has_text and not has_image)
    grade = str(row.get("grade") or "").removeprefix("grade")
    return (*parts, *(["G1-6" if int(grade) <= 6 else "G7-12"] if grade.isdecimal() else []))


def accuracy_by_part(parts: Sequence[Sequence[str]], right: Sequence[float]) -> dict[str, float]:
    """Accuracy over the questions of each part, in the order of `PARTS`; a part without questions is left out."""
    by_part: defaultdict[str, list[float]] = defaultdict(list)
    for parts_of_question, score in zip(parts, right, strict=True):
        for part in parts_of_question:
            by_part[part].append(score)
    return {part: sum(by_part[part]) / len(by_part[part]) for part in PARTS if part in by_part}


# --- the official files


def official_folder(path: str) -> Path | None:
    """The folder of `problems.json` at a path, or in its `data/scienceqa`; `None` if there is none."""
    places = (Path(path).expanduser(), Path(path).expanduser() / "data" / "scienceqa")
    return next((place for place in places if (place / "problems.json").is_file()), None)


def official_problems(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """The questions of a split by their ids, as ScienceQA's authors publish them.

    Args:
        folder: of `problems.json` and `pid_splits.json`.
        split: `test`, `val`, `train`, or another key of `pid_splits.json`.

    Raises:
        FileNotFoundError: a file is missing.
        MissingSplit: there is no such split.
        ValueError: the files are not as published, or do not belong together.
    """
    for name in ("problems.json", "pid_splits.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}. ScienceQA's problems.json and pid_splits.json are needed."
            )
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise ValueError(f"{folder}: expected JSON objects, questions by id and lists of ids by split.")
    key = SPLITS.get(split, split)
    if key not in splits:
        raise MissingSplit(f"{folder / 'pid_splits.json'} has the splits {sorted(splits)}, but not {split!r}.")
    missing = [pid for pid in splits[key] if pid not in problems]
    if missing:
        raise ValueError(f"{folder / 'problems.json'} lacks {len(missing)} questions of {key}, such as {missing[:3]}.")
    for pid in splits[key]:
        lacking = [column for column in COLUMNS if column not in problems[pid]]
        if lacking:
            raise ValueError(f"{folder / 'problems.json'}, question {pid}: {lacking} are missing.")
    return {pid: problems[pid] for pid in splits[key]}


def official_table(folder: Path, split: str, images: Path) -> Table:
    """The same as rows, with images in `images/SPLIT/ID/FILE`, in `SPLIT/ID/FILE`, or, as in LLaVA's, in `ID/FILE`."""
    rows = []
    for pid, problem in official_problems(folder, split).items():
        image = None
        if problem["image"]:
            own = Path(str(problem.get("split", SPLITS.get(split, split)))) / pid / problem["image"]
            places = (Path("images") / own, own, Path(pid) / problem["image"])
            image = str(next((place for place in places if (images / place).is_file()), places[0]))
        rows.append({**problem, "id": pid, "image": image})
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    return Table(str(folder / "problems.json"), images, columns, rows)
