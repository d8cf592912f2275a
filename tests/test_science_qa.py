"""ScienceQA as LLaVA asks and scores it: prompts, official files, tables, and the ensembles with GPT-4, by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from eval_data import save
from typer.testing import CliRunner

from modeling_aim.cli import app
from modeling_aim.evaluation import EvalSettings, evaluate
from modeling_aim.evaluation.science_qa import gpt4_figures, own_figures, read_answers, requery_figures, stated_letter
from modeling_aim.evaluation.task import Prediction
from modeling_aim.evaluation.tasks.registry import open_task
from modeling_aim.evaluation.tasks.science_qa import official_problems

ROOT = Path(__file__).resolve().parents[1]
NATURAL, SOCIAL, LANGUAGE = (f"{word} science" for word in ("natural", "social", "language"))
# id: subject, grade, hint, image, choices, answer
TEST = {
    "3": (NATURAL, 2, "Iron  rusts.", True, "iron oak salt", 1),
    "14": (NATURAL, 7, "", True, "yes no", 0),
    "20": (SOCIAL, 6, "A map.", False, "north south east west", 3),
    "21": (SOCIAL, 12, "", False, "one two", 1),
    "40": (LANGUAGE, 1, "", False, "noun verb", 0),
}
TRAIN = {"1": (NATURAL, 3, "", False, "cold hot", 1)}


def problem(entry: tuple[Any, ...], split: str) -> dict[str, Any]:
    subject, grade, hint, image, choices, answer = entry
    return {
        "question": "Which  is right? ", "choices": choices.split(), "answer": answer, "hint": hint,
        "image": "image.png" if image else None, "task": "closed choice", "grade": f"grade{grade}", "subject": subject,
        "topic": "physics", "lecture": "A lecture.", "solution": "So it is.", "split": split,
    }  # fmt: skip


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The files of the dataset as its authors publish them."""
    folder = tmp_path / "ScienceQA" / "data" / "scienceqa"
    folder.mkdir(parents=True)
    parts = {"train": TRAIN, "test": TEST}
    problems = {name: problem(entry, split) for split, rows in parts.items() for name, entry in rows.items()}
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {split: list(rows) for split, rows in parts.items()} | {"val": [], "minitest": ["40", "3"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for name in ("3", "14"):
        save(folder / "images" / "test" / name, "image.png")
    return folder


def lines(path: Path, answers: dict[str, str]) -> Path:
    rows = [{"question_id": name, "prompt": "", "text": text, "model_id": "m"} for name, text in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- how it is asked


def test_it_is_asked_as_v1_and_v1_5_ask_it(official: Path) -> None:
    options = "Options: (A) iron (B) oak (C) salt"
    task = open_task(f"scienceqa:{official}")
    example, shot = task.examples(0)[0], task.pool()[0]
    assert example.question == (
        f"Context: Iron rusts.\nQuestion: Which is right? \n{options}\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (task.max_new_tokens, shot.pair["answer"], shot.id) == (1024, "B", "train 1")
    first = open_task(f"scienceqa:{official},protocol=v1")
    assert first.examples(0)[0].question == f"Which is right? \nContext: Iron rusts.\n{options}"
    assert first.pool()[0].pair["answer"] == "A lecture. So it is. The answer is B." and first.max_new_tokens == 1024
    plain = open_task(f"scienceqa:{official},protocol=plain")
    assert plain.examples(0)[1].question == (
        "Question: Which  is right?\nContext: N/A\nOptions: (A) yes (B) no\nAnswer:"
    )
    assert (plain.max_new_tokens, plain.pool()[0].pair["answer"]) == (15, "The answer is B.")
    assert open_task(f"scienceqa:{official},max_new_tokens=64").max_new_tokens == 64
    reasoned = Prediction("Iron is a metal. " * 40 + "The answer is B.")
    assert first.score(first.examples(0)[0], reasoned) == {"accuracy": 1, "failed": 0}
    for setting, message in (("protocol=v2", "protocol='v2' is unknown"), ("max_new_tokens=0", "at least 1")):
        with pytest.raises(ValueError, match=message):
            open_task(f"scienceqa:{official},{setting}")


def test_official_files_are_read_with_their_ids_and_images(official: Path) -> None:
    task = open_task(f"scienceqa:{official.parents[1]}")  # the repository's folder
    examples = task.examples(0)
    assert [example.id for example in examples] == list(TEST) and [len(e.images) for e in examples] == [1, 1, 0, 0, 0]
    assert [e.id for e in open_task(f"scienceqa:{official},split=minitest").examples(0)] == ["40", "3"]
    assert [e.id for e in open_task(f"scienceqa:{official},config=ScienceQA-IMG").examples(0)] == ["3", "14"]
    (official / "images" / "test").rename(official / "flat")  # as LLaVA's instructions leave them
    assert [len(e.images) for e in open_task(f"scienceqa:{official},images={official}/flat").examples(0)][:2] == [1, 1]


def test_official_files_that_do_not_fit_are_told(official: Path) -> None:
    with pytest.raises(ValueError, match=r"splits \['minitest', 'test', 'train', 'val'\], but not 'dev'"):
        open_task(f"scienceqa:{official},split=dev").examples(0)
    problems = json.loads((official / "problems.json").read_text())
    del problems["14"]["choices"]
    (official / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ValueError, match=r"question 14: \['choices'\] are missing"):
        open_task(f"scienceqa:{official}").examples(0)
    del problems["14"]
    (official / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ValueError, match=r"lacks 1 questions of test, such as \['14'\]"):
        open_task(f"scienceqa:{official}").examples(0)
    (official / "pid_splits.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no pid_splits\.json"):
        open_task(f"scienceqa:{official}").examples(0)


# --- figures, worked out by hand


def test_one_model_is_scored_as_published(official: Path) -> None:
    problems = official_problems(official, "test")
    answers = {"3": "B. oak", "14": "The answer is A.", "20": "C", "21": "It is two.", "99": "A"}
    found = own_figures(problems, answers)
    # 3 and 14 right, 20 wrong, 21 has no letter, 40 no answer
    assert found["results"] == {"3": 1, "14": 0, "20": 2, "21": -1, "40": -1}
    assert [found[key] for key in ("total", "correct", "failed", "missing")] == [5, 2, 2, 1]
    assert found["parts"] == {
        "NAT": 1, "SOC": 0, "LAN": 0, "TXT": 1 / 2, "IMG": 1, "NO": 0, "G1-6": 1 / 3, "G7-12": 1 / 2,
    }  # fmt: skip
    beyond = own_figures(problems, {"40": "D", "21": "The answer is B."})
    assert (beyond["results"]["40"], beyond["failed"], beyond["correct"]) == (-1, 3, 1)  # D is a letter, but no choice


def test_forms_that_the_ensembles_read() -> None:
    assert stated_letter("First. The answer is B. Or C.") == "B"
    for text in ("B", "B. oak", "The answer is B", "the answer is B.", "The answer is A. The answer is B.", ""):
        assert stated_letter(text) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_ensemble_with_gpt4_is_the_published_one(official: Path, seed: int) -> None:
    problems = official_problems(official, "test")
    ours = {"3": "The answer is B.", "14": "The answer is B.", "20": "The answer is D.", "21": "two", "40": "(A)"}
    gpt4 = {"3": "The answer is C.", "14": "The answer is A.", "20": "I cannot see it.", "21": "The answer is B."}
    rng = random.Random(seed)
    # drawn: GPT-4's of 20, which is not used then, and ours of 21, which counts for the upper bound alone
    rng.choice(range(4)), rng.choice(range(2))
    # 3: GPT-4 wrong, ours right; 14: GPT-4 right; 20: ours; 21: GPT-4 right; 40: GPT-4's is missing, left out
    assert gpt4_figures(problems, ours, gpt4, seed) == {
        "total": 4, "correct": 3, "upper": 4, "gpt4_failed": 1, "our_failed": 1, "missing": 1,
    }  # fmt: skip
    both_fail = gpt4_figures(problems, {"20": "?", "3": "?"}, {"20": "?", "3": "?"}, seed)
    again = random.Random(seed)
    pairs = [(again.choice(range(count)), again.choice(range(count))) for count in (3, 4)]
    drawn = [ours_drawn for ours_drawn, _ in pairs]
    right = (drawn[0] == 1) + (drawn[1] == 3)
    assert (both_fail["correct"], both_fail["upper"], both_fail["gpt4_failed"]) == (right, right, 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_ensemble_with_a_judge_is_the_published_one(official: Path, seed: int) -> None:
    problems = official_problems(official, "test")
    ours = {"3": "The answer is B.", "14": "The answer is B.", "20": "The answer is D.", "21": "?"}
    ours["40"] = "The answer is B."
    gpt4 = {"3": "The answer is C.", "14": "The answer is A.", "20": "?", "21": "The answer is A."}
    gpt4["40"] = "The answer is A."
    judge = {"3": "Both. The answer is B.", "14": "Hm.", "21": "The answer is B.", "40": "The answer is E."}
    rng = random.Random(seed)
    # in the order of the questions, of each ours, GPT-4's, the judge's where they have no letter among the choices:
    rng.choice(range(2))  # 14: the judge's, not used: it failed, so ours stands, which is wrong
    gpt4_of_20 = rng.choice(range(4))
    rng.choice(range(4))  # 20: the judge's is missing; ours stands, right
    ours_of_21 = rng.choice(range(2))
    judge_of_40 = rng.choice(range(2))  # it said a letter that is no choice, so what is drawn counts
    found = requery_figures(problems, ours, gpt4, judge, seed)
    drawn_gpt4, drawn_ours, drawn_judge = gpt4_of_20 == 3, ours_of_21 == 1, judge_of_40 == 0
    assert found["results"] == {"3": 1, "14": 1, "20": 3, "21": 1, "40": judge_of_40}
    assert found["correct"] == 3 + drawn_judge and found["our_correct"] == 2 + drawn_ours
    assert found["gpt4_correct"] == 2 + drawn_gpt4 and found["gpt4_or_ours_correct"] == 3
    assert found["upper"] == 4 + drawn_ours
    assert [found[f"{who}_failed"] for who in ("our", "gpt4", "judge")] == [1, 1, 2] and found["judge_missing"] == 1
    assert found["parts"]["IMG"] == 1 / 2 and found["parts"]["SOC"] == 1
    with pytest.raises(ValueError, match=r"1 questions are missing in GPT-4's answers, such as \['40'\]"):
        requery_figures(problems, ours, {k: v for k, v in gpt4.items() if k != "40"}, judge)


# --- the command


def test_the_command_reads_and_writes_the_published_layouts(official: Path, tmp_path: Path) -> None:
    right = {name: f"The answer is {'ABCD'[entry[-1]]}." for name, entry in TEST.items()}
    gpt4 = tmp_path / "gpt4.json"
    gpt4.write_text(json.dumps({"outputs": {**right, "3": "?"}}))
    wrong = {**right, "3": "The answer is A."}
    files = [str(lines(tmp_path / "ours.jsonl", wrong)), "--data", str(official), "--gpt4", str(gpt4)]
    files += ["--judge", str(lines(tmp_path / "judge.jsonl", {"3": "The answer is B."}))]
    shown = CliRunner().invoke(app, ["eval", "science-qa", *files, "--output", str(tmp_path / "out.json")])
    assert shown.exit_code == 0, shown.output
    for figure in ("80.00", "100.00", "66.67"):  # ours and GPT-4's with ours; the judge's; ours of grades 1 to 6
        assert figure in shown.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["acc"], written["correct"], written["count"]) == (100, 5, 5) and written["results"]["3"] == 1
    read = json.loads(CliRunner().invoke(app, ["eval", "science-qa", *files, "--json"]).output)
    assert (read["own"]["correct"], read["gpt4"]["correct"], read["judge"]["correct"]) == (4, 4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{answers}", "--data", "{tmp}"], "has no problems.json"),
        (["{answers}", "--data", "{data}", "--judge", "{answers}"], "--judge needs --gpt4"),
        (["{answers}", "--data", "{data}", "--gpt4", "{answers}"], "is not JSON"),
        (["{data}/pid_splits.json", "--data", "{data}"], "line 1: expected question_id and text"),
        (["{tmp}/none.jsonl", "--data", "{data}"], "no file of answers"),
        (["{other}", "--data", "{data}"], "None of the 1 answers is to one of the 5 questions"),
        (["{list}", "--data", "{data}", "--gpt4", "{list}"], "line 1: expected question_id"),
        (["{answers}", "--data", "{data}", "--gpt4", "{list}"], 'expected {"outputs": {id: text}}'),
    ],
)
def test_files_that_cannot_be_are_told(official: Path, tmp_path: Path, options: list[str], message: str) -> None:
    names = {"tmp": tmp_path, "data": official, "answers": lines(tmp_path / "a.jsonl", {"3": "A", "14": "B"})}
    names |= {"other": lines(tmp_path / "other.jsonl", {"row 7": "A"}), "list": tmp_path / "list.json"}
    names["list"].write_text('["A"]')
    shown = CliRunner().invoke(app, ["eval", "science-qa", *(option.format(**names) for option in options)])
    assert shown.exit_code == 1 and message in " ".join(shown.output.split()), shown.output


def test_a_run_has_the_table_and_its_answers_are_scored_again(official: Path, tmp_path: Path) -> None:
    results = evaluate(
        EvalSettings(
            tasks=(f"scienceqa:{official},max_new_tokens=2",), output=str(tmp_path / "run"), shots=(0, 1), seeds=1,
            repo=str(ROOT / "hub_configs" / "aim-tiny"), methods=("zero", "aim"),
        )
    )  # fmt: skip
    report = (tmp_path / "run" / "results.md").read_text()
    assert "| ScienceQA, % | shots | NAT | SOC | LAN | TXT | IMG | NO | G1-6 | G7-12 | all |" in report
    assert "protocol=v1.5: context, question, options" in report
    predictions = tmp_path / "run" / "predictions.jsonl"
    answers = read_answers(predictions, "aim", 1)
    assert set(answers) == set(TEST)
    own = own_figures(official_problems(official, "test"), answers)
    (cell,) = (cell for cell in results["cells"] if cell["method"] == "aim")
    assert own["correct"] / own["total"] == cell["mean"]
    assert own["parts"] == {name[9:]: figure for name, figure in cell["metrics"].items() if name[:9] == "accuracy_"}
    with pytest.raises(ValueError, match=r"aim with 1 demonstrations.*zero with 0.*--method and --shots"):
        read_answers(predictions)
