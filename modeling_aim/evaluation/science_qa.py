"""Files of answers to ScienceQA in LLaVA's layout, alone and together with GPT-4's: the figures of its three scorers.

`eval_science_qa.py` scores one model; `eval_science_qa_gpt4.py` takes GPT-4's answer, and ours where it has none;
`eval_science_qa_gpt4_requery.py` takes that of a judge who saw both, and ours where it gave none. The last two know
the one form "The answer is B." and draw at random among the choices where an answer has none.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.jsonl import numbered_json, read_json
from .metrics import LETTERS, scienceqa_choice
from .tasks.science_qa import accuracy_by_part, official_folder, official_problems, parts_of

Problems = Mapping[str, Mapping[str, Any]]
Answers = Mapping[str, str]
MISSING = "FAILED"  # what LLaVA's scorers read where there is no answer


def open_problems(path: Path, split: str) -> dict[str, dict[str, Any]]:
    """The questions of a split by id.

    Raises:
        FileNotFoundError: there are no official files at the path.
        ValueError: they have no such split, or are not as published.
    """
    folder = official_folder(str(path))
    if folder is None:
        raise FileNotFoundError(f"{path} has no problems.json; give the folder of ScienceQA's official files.")
    return official_problems(folder, split)


def read_answers(path: Path, method: str | None = None, shots: int | None = None) -> dict[str, str]:
    """Answers by question id.

    Args:
        path: LLaVA's jsonl, `{"question_id", "text"}` a line; or a `predictions.jsonl` of `aim eval` on the official
            files, of which the first seed is read.
        method, shots: which rows of a `predictions.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has neither form, or the rows are of several methods or numbers of demonstrations.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of answers at {path}.")
    answers: dict[str, str] = {}
    cells: set[tuple[str, str, int]] = set()
    for number, row in numbered_json(path):
        if isinstance(row, dict) and {"question_id", "text"} <= set(row):
            answers[str(row["question_id"])] = str(row["text"])
        elif isinstance(row, dict) and {"example", "prediction", "method", "shots", "seed"} <= set(row):
            if row["seed"] == 0 and method in (None, row["method"]) and shots in (None, row["shots"]):
                cells.add((row["task"], row["method"], row["shots"]))
                answers[str(row["example"])] = row["prediction"].strip()
        else:
            raise ValueError(
                f"{path}, line {number}: expected question_id and text, as in LLaVA's files of answers, or a row of "
                "a predictions.jsonl of aim eval."
            )
    if len(cells) > 1:
        named = ", ".join(f"{cell[1]} with {cell[2]} demonstrations ({cell[0]})" for cell in sorted(cells))
        raise ValueError(f"{path} has answers of {named}. Choose those of one: --method and --shots.")
    if not answers:
        raise ValueError(f"{path} has no answers" + ("." if method is None else f" of {method} with {shots} shots."))
    return answers


def read_outputs(path: Path) -> dict[str, str]:
    """GPT-4's answers by question id, of a file `{"outputs": {id: text}}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this layout.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of GPT-4's answers at {path}.")
    read = read_json(path)
    outputs = read.get("outputs") if isinstance(read, dict) else None
    if not isinstance(outputs, dict) or not all(isinstance(text, str) for text in outputs.values()):
        raise ValueError(
            f'{path}: expected {{"outputs": {{id: text}}}}, as GPT-4\'s results on ScienceQA are published.'
        )
    return {str(name): text for name, text in outputs.items()}


# --- one model


def own_figures(problems: Problems, answers: Answers) -> dict[str, Any]:
    """The figures of `eval_science_qa.py`, and accuracy by subject, context and grade.

    Args:
        problems: what was asked, by id.
        answers: a missing one is wrong.

    Returns:
        `total`, `correct`, `failed` (no letter found, or no answer), `missing`, `parts`, and `results`: the number of
        the chosen option of each question, -1 where there is none.
    """
    _known(problems, answers)
    results, failed = {}, 0
    for name, problem in problems.items():
        letter = scienceqa_choice(answers.get(name, MISSING))
        failed += letter is None
        results[name] = _place(letter, problem)
    return {
        "total": len(problems),
        "correct": _correct(problems, results),
        "failed": failed,
        "missing": sum(name not in answers for name in problems),
        "parts": by_parts(problems, results),
        "results": results,
    }


def by_parts(problems: Problems, results: Mapping[str, int]) -> dict[str, float]:
    """Accuracy by subject, context and grade of chosen options."""
    parts = [parts_of(problem, bool(problem["image"])) for problem in problems.values()]
    right = [float(results[name] == problem["answer"]) for name, problem in problems.items()]
    return accuracy_by_part(parts, right)


# --- with GPT-4


def gpt4_figures(problems: Problems, answers: Answers, gpt4: Answers, seed: int = 0) -> dict[str, Any]:
    """The figures of `eval_science_qa_gpt4.py`: GPT-4's answer, ours where it does not parse; and the upper bound.

    Args:
        problems: what was asked, by id. Questions that either file lacks are left out, as there.
        answers: ours.
        gpt4: GPT-4's.
        seed: of what is drawn where an answer does not parse. The draws are those of the published code after
            `random.seed(seed)`.

    Returns:
        `total`, `correct`, `upper` (either is right), `gpt4_failed`, `our_failed`, `missing`.
    """
    _known(problems, answers)
    rng = random.Random(seed)
    common_problems = {name: problem for name, problem in problems.items() if name in answers and name in gpt4}
    counts = dict.fromkeys(("correct", "upper", "gpt4_failed", "our_failed"), 0)
    for name, problem in common_problems.items():
        ours, theirs = stated_letter(answers[name]), stated_letter(gpt4[name])
        our_place, their_place = _drawn(ours, problem, rng), _drawn(theirs, problem, rng)
        place = our_place if theirs is None else their_place
        counts["gpt4_failed"] += theirs is None
        counts["our_failed"] += ours is None
        counts["correct"] += place == problem["answer"]
        counts["upper"] += problem["answer"] in (place, our_place)
    if not common_problems:
        raise ValueError("The two files share no question.")
    return {"total": len(common_problems), **counts, "missing": len(problems) - len(common_problems)}


def requery_figures(
    problems: Problems, answers: Answers, gpt4: Answers, judge: Answers, seed: int = 0
) -> dict[str, Any]:
    """The figures of `eval_science_qa_gpt4_requery.py`: the judge's answer, ours where it fails or is missing.

    Args:
        problems: what was asked, by id.
        answers: ours, to every question.
        gpt4: GPT-4's, to every question.
        judge: of the one that saw both; may lack questions.
        seed: as for `gpt4_figures`.

    Returns:
        `total`; right answers of ours, of GPT-4 (drawn where it failed), of GPT-4 with ours where it failed, of the
        judge with ours; `upper`; `gpt4_failed`, `our_failed`, `judge_failed`, `judge_missing`; `parts`; and
        `results`, the number of the option that the judge's ensemble chose of each question.

    Raises:
        ValueError: ours or GPT-4's lack a question.
    """
    _known(problems, answers)
    for texts, whose in ((answers, "our answers"), (gpt4, "GPT-4's answers")):
        lacking = [name for name in problems if name not in texts]
        if lacking:
            raise ValueError(
                f"{len(lacking)} questions are missing in {whose}, such as {lacking[:3]}; all are needed."
            )
    rng, results = random.Random(seed), {}
    counts = dict.fromkeys(
        ("our_correct", "gpt4_correct", "gpt4_or_ours_correct", "upper", "gpt4_failed", "our_failed"), 0
    )
    letters = {name: stated_letter(judge.get(name, "MISSING")) for name in problems}
    for name, problem in problems.items():
        ours, theirs = stated_letter(answers[name]), stated_letter(gpt4[name])
        places = [_drawn(letter, problem, rng) for letter in (ours, theirs, letters[name])]
        our_right, gpt4_right = (place == problem["answer"] for place in places[:2])
        results[name] = places[0] if letters[name] is None else places[2]
        counts["our_correct"] += our_right
        counts["gpt4_correct"] += gpt4_right
        counts["gpt4_or_ours_correct"] += our_right if theirs is None else gpt4_right
        counts["upper"] += our_right or gpt4_right
        counts["gpt4_failed"] += theirs is None
        counts["our_failed"] += ours is None
    return {
        "total": len(problems),
        "correct": _correct(problems, results),
        **counts,
        "judge_failed": sum(letter is None for letter in letters.values()),
        "judge_missing": sum(name not in judge for name in problems),
        "parts": by_parts(problems, results),
        "results": results,
    }


def stated_letter(text: str) -> str | None:
    """The letter of the one "The answer is B." in a text; `None` where there is none or more than one."""
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else None


def _place(letter: str | None, problem: Mapping[str, Any]) -> int:
    letters = LETTERS[: len(problem["choices"])]
    return letters.index(letter) if letter is not None and letter in letters else -1


def _drawn(letter: str | None, problem: Mapping[str, Any], rng: random.Random) -> int:
    """The number of a chosen option; a random one if the letter is not among them."""
    place = _place(letter, problem)
    return rng.choice(range(len(problem["choices"]))) if place < 0 else place


def _correct(problems: Problems, results: Mapping[str, int]) -> int:
    return sum(results[name] == problem["answer"] for name, problem in problems.items())


def _known(problems: Problems, answers: Answers) -> None:
    """Raise `ValueError` where no answer is to any of these questions: ids of another dataset."""
    if not set(problems) & set(answers):
        examples: Sequence[str] = list(answers)[:3]
        raise ValueError(
            f"None of the {len(answers)} answers is to one of the {len(problems)} questions: their ids are such as "
            f"{examples}, those of the questions such as {list(problems)[:3]}. Answers of aim eval have the official "
            "ids where the task is scienceqa:FOLDER with problems.json."
        )
