"""`aim eval`: methods, prompts, demonstrations, options, resumed and shared runs, figures, and what is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import backbones
import numpy as np
import pytest
import torch
from backbones import picture
from eval_tasks import AIM_TINY, UNTIMED, Naming, Pictures, episode_file, figures, predictions, settings, world
from killed_commands import killed_command
from more_families import blip_2
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration, Demonstration
from modeling_aim.cli import app
from modeling_aim.evaluation import METHODS, Example, Shot, evaluate
from modeling_aim.evaluation.choosing import difference_hash
from modeling_aim.evaluation.methods import BY_DEFAULT, Prompt, PromptBuilder, ShownShot
from modeling_aim.evaluation.subject import load_subject
from modeling_aim.evaluation.tasks.registry import TASKS

SHAPES = ("llava", "qwen2_5_vl", "idefics", "idefics3")
COMMAND = ["-m", "modeling_aim", "eval"]


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "naming", Naming)
    monkeypatch.setitem(TASKS, "pictures", Pictures)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An untrained plug-in on a tiny backbone of each family, with the backbone."""
    found = {}
    for family in SHAPES:
        folder = tmp_path_factory.mktemp(family)
        backbones.plugin(family).model.save_pretrained(folder, include_backbone=True)
        found[family] = str(folder)
    return found


# --- methods


@pytest.mark.slow
def test_aim_tiny_tells_the_methods_apart(tmp_path: Path) -> None:
    results = evaluate(settings(tmp_path, tasks=("naming:,count=12",)))
    cells = figures(results)
    assert cells["zero", 0]["mean"] == cells["aim-random", 8]["mean"] == 0
    assert cells["aim", 8]["mean"] > 0.8 and cells["full", 8]["mean"] > 0.6
    assert cells["aim", 8]["mean"] > cells["aim-shuffled", 8]["mean"] + 0.2
    assert cells["aim", 8]["mean"] > cells["text", 8]["mean"] + 0.2
    assert cells["aim-untrained", 8]["mean"] > 0.8
    assert cells["aim-untrained", 8]["mean"] > cells["aim-untrained-shuffled", 8]["mean"] + 0.2
    tokens = {method: cells[method, 8]["prompt_tokens"] for method in BY_DEFAULT if method != "zero"}
    assert tokens["full"] > 5 * tokens["aim"]
    assert {tokens[method] for method in BY_DEFAULT if method.startswith("aim")} == {tokens["aim"]}
    assert cells["aim", 8]["fused_tokens"] == 40 and cells["full", 8]["fused_tokens"] == 0
    assert (cells["aim", 8]["examples"], cells["aim", 8]["seeds"]) == (24, 2)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "aim_eval.json",
        "by_shots.png",
        "by_cost.png",
        "by_tokens.png",
        "predictions.jsonl",
        "results.json",
        "results.md",
    }


def test_answers_are_those_of_single_calls(tmp_path: Path) -> None:
    evaluate(settings(tmp_path, shots=(4,), seeds=1, methods=("zero", "full", "aim")))
    model = AimForConditionalGeneration.from_pretrained(AIM_TINY)
    task, found = Naming(), predictions(tmp_path / "run")
    for row in found:
        example = task.examples(0)[int(row["example"].split(".")[1])]
        demos = [Demonstration.of(shot.pair) for shot in task.shots(example, row["shots"], 0)]
        front = "".join("<image>" + model.processor.apply_template(demo)[0] + "\n" for demo in demos)
        full = row["method"] == "full"
        pictures = [*(demo.images[0] for demo in demos), *example.images] if full else list(example.images)
        text = (front if full else "") + "<image>this is"
        inputs = model.processor(images=[pictures], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, demos=demos if row["method"] == "aim" else None, max_new_tokens=4)
        said = model.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["prediction"] == said.strip()
        assert row["prompt_tokens"] == inputs["input_ids"].shape[1] + row["fused_tokens"]
    assert [len({row["example"] for row in found if row["method"] == m}) for m in ("zero", "full", "aim")] == [6, 6, 6]


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("prompts", ["plain", "chat"])
def test_all_methods_run_on_a_family(family: str, prompts: str, repositories: dict[str, str], tmp_path: Path) -> None:
    """The same examples and demonstrations for all; a demonstration costs what it should."""
    options: dict[str, Any] = {"tasks": ("pictures:,count=2",), "shots": (0, 2), "seeds": 1, "prompts": prompts}
    if prompts == "chat" and load_subject(repositories[family], None).processor.chat_template is None:
        with pytest.raises(ValueError, match="no chat template"):
            evaluate(settings(tmp_path, repo=repositories[family], **options))
        return
    results = evaluate(settings(tmp_path, repo=repositories[family], **options))
    assert results["notes"] == []
    found = predictions(tmp_path / "run")
    assert len(found) == 2 * len(BY_DEFAULT)
    chosen = {m: [row["demonstrations"] for row in found if row["method"] == m] for m in BY_DEFAULT}
    assert chosen.pop("zero") == [[], []] and len({json.dumps(one) for one in chosen.values()}) == 1
    cells = figures(results)
    zero, text, full, aim = (
        cells[m, 2 if m != "zero" else 0]["prompt_tokens"] for m in ("zero", "text", "full", "aim")
    )
    assert zero < text <= full and zero < aim and aim - zero == cells["aim", 2]["fused_tokens"]
    if family != "idefics":  # there images are not in the decoder
        assert full > text + 2


@pytest.mark.parametrize("family", SHAPES)
def test_a_full_prompt_has_the_words_that_aim_reads(family: str) -> None:
    plugin = backbones.plugin(family)
    processor = plugin.processor
    shots = [Shot("a", {"image": picture(1), "label": "dax"}), Shot("b", {"images": [picture(2), picture(3)],
             "question": "Which?", "answer": "both"}), Shot("c", {"text": "no image"})]  # fmt: skip
    shown = [ShownShot(shot, shot) for shot in shots]
    example = Example("q", (picture(4),), "What?", ("x",))
    words = [processor.apply_template(Demonstration.of(shot.pair))[0] for shot in shots]
    builder = PromptBuilder(processor, separator=" | ")
    marks = [processor.image_text * count for count in (1, 2, 0)]
    fronts = "".join(mark + word + " | " for mark, word in zip(marks, words, strict=True))
    begin = processor.front(0)
    assert builder.prompt(example, shown) == begin + fronts + processor.image_text + "What?"
    told = "".join(word + " | " for word in words)
    assert builder.prompt(example, shown, images=False) == begin + told + processor.image_text + "What?"
    prompt = METHODS["full"].show(builder, example, shown, 0)
    assert [id(image) for image in prompt.images[:3]] == [id(one) for one in (shots[0].pair["image"],
            *shots[1].pair["images"])]  # fmt: skip
    if processor.chat_template is not None:
        chat = PromptBuilder(processor, "chat").prompt(example, shown)
        for word in ("dax", "Which?", "both", "no image", "What?"):
            assert chat.count(word) == 1
        assert chat.count(processor.image_text.strip()) == 4
        assert PromptBuilder(processor, "chat").prompt(example) == processor.prompt("What?")


@pytest.mark.parametrize("family", ["smolvlm", "llava", "idefics3"])
@pytest.mark.parametrize("prompts", ["plain", "chat"])
def test_a_prompt_begins_with_bos_once_where_the_backbone_has_one(family: str, prompts: str) -> None:
    """SmolVLM's is written by its chat template alone, and prompts that no template renders need it too."""
    processor = backbones.plugin(family).processor
    shown = [ShownShot(shot, shot) for shot in (Shot("a", {"image": picture(1), "label": "dax"}),)]
    builder = PromptBuilder(processor, prompts)
    example = Example("q", (picture(4),), "What?", ("x",))
    bos = processor.tokenizer.bos_token_id
    ids = processor.tokenizer([builder.prompt(example, some, images=False) for some in ([], shown)])["input_ids"]
    template = processor.tokenizer(processor.prompt("What?"))["input_ids"]
    assert all(row[0] == template[0] for row in ids)
    assert all(row.count(bos) == template.count(bos) for row in ids)


def test_dealt_images_are_those_of_the_prompt() -> None:
    shots = [Shot(str(i), {"image": picture(i), "text": f"number {i}"}) for i in range(8)]
    shown = [ShownShot(shot, shot) for shot in shots]
    builder = PromptBuilder(backbones.plugin("llava").processor)
    example = Example("q", (picture(9),), "What?", ("x",))
    plain, dealt = (METHODS[m].show(builder, example, shown, 3) for m in ("aim", "aim-shuffled"))
    assert [one.words_of for one in dealt.fused] == [one.words_of for one in plain.fused] == shots
    assert [one.images_of.id for one in dealt.fused] != [one.images_of.id for one in plain.fused]
    assert sorted(one.images_of.id for one in dealt.fused) == [shot.id for shot in shots]
    assert METHODS["aim-shuffled"].show(builder, example, shown, 3) == dealt


def test_a_demonstration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all methods, seeds and numbers of demonstrations; dealt images are other demonstrations."""
    read: list[str] = []
    states = AimForConditionalGeneration.read_states

    def watched(model: Any, demos: Sequence[Demonstration], *more: Any) -> list[torch.Tensor]:
        read.extend(demo.key for demo in demos)
        return states(model, demos, *more)

    monkeypatch.setattr(AimForConditionalGeneration, "read_states", watched)
    options: dict[str, Any] = {"tasks": ("pictures:,count=4,pool=9",), "shots": (2, 4), "batch_size": 3}
    evaluate(settings(tmp_path, **options, methods=("aim", "aim-random")))
    shown = {name for row in predictions(tmp_path / "run") for name in row["demonstrations"]}
    assert len(read) == len(set(read)) == len(shown)


def test_a_backbone_that_sees_one_image_is_not_shown_several(tmp_path: Path) -> None:
    """BLIP-2 silently accepts two images but uses only the first."""
    torch.manual_seed(0)
    backbone, processor = blip_2()
    backbone.save_pretrained(tmp_path / "blip")
    processor.save_pretrained(tmp_path / "blip")
    options: dict[str, Any] = {"repo": None, "backbone": str(tmp_path / "blip"), "tasks": ("pictures:,count=2",)}
    results = evaluate(settings(tmp_path, **options, shots=(0, 2), seeds=1))
    untrained = ("aim-untrained", "aim-untrained-shuffled")
    assert set(figures(results)) == {("zero", 0), *((method, 2) for method in ("text", *untrained))}
    assert any("full: left out" in note and "does not look at the second" in note for note in results["notes"])


def test_data_of_their_own_for_each_seed(tmp_path: Path) -> None:
    for seed in range(2):
        episode_file(tmp_path / str(seed), count=3, drawn=f"seed {seed}")
    spec = f"episodes:{tmp_path}/{{seed}}/naming.jsonl"
    results = evaluate(settings(tmp_path, tasks=(spec,), shots=(0, 2), methods=("zero", "text")))
    assert [(cell["seeds"], cell["examples"]) for cell in results["cells"]] == [(2, 6), (2, 6)]
    found = predictions(tmp_path / "run")
    assert [row["example"] for row in found[:6]] == ["0.0.0", "0.1.0", "0.2.0", "1.0.0", "1.1.0", "1.2.0"]
    assert found[6]["demonstrations"] == ["0.0/0", "0.0/1"]
    assert [row["references"] for row in found[:3]] != [row["references"] for row in found[3:6]]


def test_seeds_that_change_nothing_are_answered_once(tmp_path: Path) -> None:
    results = evaluate(settings(tmp_path, tasks=(f"episodes:{episode_file(tmp_path)}",), shots=(0, 2), seeds=2))
    seeds = {key: cell["seeds"] for key, cell in figures(results).items()}
    assert seeds == {("zero", 0): 1, ("text", 2): 1, ("full", 2): 1, ("aim", 2): 1, ("aim-shuffled", 2): 2,
                     ("aim-random", 2): 2, ("aim-untrained", 2): 1, ("aim-untrained-shuffled", 2): 2}  # fmt: skip
    assert "answered once" in (tmp_path / "run/results.md").read_text()


# --- demonstrations


def test_random_demonstrations_follow_from_seed_and_example(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ("pictures:,count=4,pool=30",), "shots": (2, 4), "methods": ("text",)}
    evaluate(settings(tmp_path, **options))
    found = {(r["seed"], r["shots"], r["example"]): r["demonstrations"] for r in predictions(tmp_path / "run")}
    assert len(found) == 16 and len({tuple(ids) for ids in found.values()}) > 8
    assert all(len(set(ids)) == shots for (_, shots, _), ids in found.items())
    assert all(set(found[s, 2, e]) <= set(found[s, 4, e]) for s, _, e in found)  # more are the same and others
    evaluate(settings(tmp_path / "again", **options))
    assert predictions(tmp_path / "again/run") == predictions(tmp_path / "run")
    evaluate(settings(tmp_path / "turns", **options, balanced=True))
    labels = {shot.id: shot.label for shot in Pictures(pool=30).pool()}
    for row in predictions(tmp_path / "turns/run"):
        assert len({labels[name] for name in row["demonstrations"]}) == min(3, row["shots"])


class Alike(Pictures):
    """The query's own picture is in the pool."""

    def examples(self, seed: int) -> Sequence[Example]:
        return [Example(f"q{i}", (picture(i),), "What is it?", ("cat",)) for i in range(3)]


@pytest.mark.parametrize("select", ["image", "mmices", "text", "fused"])
def test_the_most_alike_stand_last(
    select: str, repositories: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "pictures", Alike)
    options: dict[str, Any] = {"repo": repositories["llava"], "tasks": ("pictures",), "methods": ("text",)}
    evaluate(settings(tmp_path, select=select, shots=(2,), **options))
    found = predictions(tmp_path / "run")
    assert {row["seed"] for row in found} == {0} and len(found) == 3
    if select in ("image", "mmices"):
        assert [row["demonstrations"][-1] for row in found] == ["p0", "p1", "p2"]
        evaluate(settings(tmp_path / "without", select=select, shots=(2,), drop_duplicates=True, **options))
        for row, name in zip(predictions(tmp_path / "without/run"), ("p0", "p1", "p2"), strict=True):
            assert name not in row["demonstrations"] and len(row["demonstrations"]) == 2


def test_prompts_beyond_the_positions_are_left_out_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tasks": ("pictures",), "methods": ("full", "text", "prefix-kv", "text-kv"), "seeds": 1}
    evaluate(settings(tmp_path / "all", shots=(1, 4), **options))
    lengths = {
        row["shots"]: row["prompt_tokens"] for row in predictions(tmp_path / "all/run") if row["method"] == "full"
    }
    between = (lengths[1] + lengths[4]) // 2
    monkeypatch.setattr("modeling_aim.evaluation.subject.longest_prompt", lambda config: between)
    results = evaluate(settings(tmp_path, shots=(1, 4), skip_too_long=True, **options))
    answered = {(row["method"], row["shots"]) for row in predictions(tmp_path / "run")}
    everything = {(method, shots) for method in options["methods"] for shots in (1, 4)}
    assert answered == everything - {("full", 4), ("prefix-kv", 4)}
    assert any(f"the backbone has {between} positions" in note for note in results["notes"])


def test_a_list_of_ids(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("p3\np1\np0\n")
    options: dict[str, Any] = {"tasks": ("pictures",), "methods": ("aim",), "shots": (2,)}
    evaluate(settings(tmp_path, select=f"fixed:{tmp_path / 'ids.txt'}", **options))
    assert {tuple(row["demonstrations"]) for row in predictions(tmp_path / "run")} == {("p3", "p1")}
    (tmp_path / "ids.json").write_text(json.dumps({"pictures": ["p3", "nobody"]}))
    with pytest.raises(ValueError, match=r"lists 'nobody', which is not a demonstration of pictures"):
        evaluate(settings(tmp_path / "b", select=f"fixed:{tmp_path / 'ids.json'}", **options))


def test_difference_hashes_know_a_resized_picture() -> None:
    image = world.pool_image("test", 0, 0).resize((256, 256))
    alike, other = image.resize((200, 200)), world.pool_image("test", 5, 1)
    assert (difference_hash(image) ^ difference_hash(alike)).bit_count() <= 2
    assert (difference_hash(image) ^ difference_hash(other)).bit_count() > 2


# --- options


def test_options_are_chosen_by_their_mean_log_probability() -> None:
    """Against single passes without padding, images shared or not; one-token options in one pass and in many."""
    subject = load_subject(AIM_TINY, None)
    processor, model = subject.processor, subject.model
    rng, prompts, rows = random.Random(0), [], []
    for number in range(3):
        example = Naming(options=True).examples(0)[number]
        prompts.append(Prompt(subject.prompt_builder.prompt(example), example.images))
        rows.append([" ".join(rng.sample(["two", "red", "noko", "circle"], k)) for k in (1, 3, 2)])
    batch = subject.encode(prompts, ["a", "b", "c"])
    answers = subject.answer(batch, rows, 4, 0, None)
    for prompt, row, answer in zip(prompts, rows, answers, strict=True):
        for option, told in zip(row, answer.prediction.log_probabilities, strict=True):
            inputs = processor(images=[list(prompt.images)], text=[f"{prompt.text} {option}"], return_tensors="pt")
            length = processor(images=[list(prompt.images)], text=[prompt.text], return_tensors="pt")[
                "input_ids"
            ].shape[1]
            with torch.no_grad():
                logits = model.backbone(**inputs).logits[0, length - 1 : -1].log_softmax(-1)
            expected = logits.gather(-1, inputs["input_ids"][0, length:, None]).mean()
            assert told == pytest.approx(float(expected), abs=1e-4)
        best = max(range(3), key=answer.prediction.log_probabilities.__getitem__)
        assert answer.prediction.text == row[best]
    behind = [[" two", " red"]] * 3
    single = [subject._single_tokens(prompt.text, one) for prompt, one in zip(prompts, behind, strict=True)]
    assert None not in single
    quick = subject.answer(batch, [["two", "red"]] * 3, 4, 0, None)
    slow = subject._behind(batch, [None] * 3, behind)
    for answer, told in zip(quick, slow, strict=True):
        assert answer.prediction.log_probabilities == pytest.approx(told, abs=1e-4)


@pytest.mark.parametrize("family", SHAPES)
def test_options_with_all_methods(family: str, repositories: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ("pictures:,count=2,options=yes|a large dog|no",), "shots": (2,), "seeds": 1}
    evaluate(settings(tmp_path, repo=repositories[family], **options))
    for row in predictions(tmp_path / "run"):
        told = row["log_probabilities"]
        assert len(told) == 3 and row["prediction"] == ["yes", "a large dog", "no"][int(np.argmax(told))]
    found = predictions(tmp_path / "run")
    assert len({json.dumps(r["log_probabilities"]) for r in found if r["example"] == "q0"}) > 3  # methods differ


# --- interrupted, shared


def _arguments(task: Path, output: Path) -> list[str]:
    given = ["--repo", AIM_TINY, "--tasks", f"episodes:{task}", "--shots", "0,2", "--seeds", "2"]
    return [*given, "--batch-size", "3", "--output", str(output)]


def test_a_killed_run_goes_on_to_the_same_results(tmp_path: Path) -> None:
    """Killed and interrupted after counted answers, then the same command again; cut lines among what is left."""
    task = episode_file(tmp_path, 8)
    whole = settings(tmp_path, tasks=(f"episodes:{task}",), shots=(0, 2), batch_size=3)
    evaluate(whole)
    arguments = ["eval", *_arguments(task, tmp_path / "killed")]
    partial = tmp_path / "killed/unfinished/process-0.jsonl"
    answered = 0
    for number, how in ((2, signal.SIGKILL), (3, signal.SIGINT)):
        killed = killed_command("answers", number, how, arguments)
        interrupted = killed.returncode == 130 and "Rerun the same command to resume" in killed.stderr
        assert interrupted if how == signal.SIGINT else killed.returncode == -how, killed.stderr
        assert not (tmp_path / "killed/results.json").exists()
        before, answered = answered, len(partial.read_bytes().splitlines())
        assert before < answered < len(predictions(tmp_path / "run"))
        with partial.open("ab") as file:
            file.write(b'{"task": "nam')
    done = subprocess.run(
        [sys.executable, "-m", "modeling_aim", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    _same_results(tmp_path / "killed", tmp_path / "run")
    before_again = (tmp_path / "run/predictions.jsonl").read_bytes()
    evaluate(whole)  # a finished run: nothing is answered again
    assert (tmp_path / "run/predictions.jsonl").read_bytes() == before_again


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    task = episode_file(tmp_path, 5)
    alone = settings(tmp_path, tasks=(f"episodes:{task}",), shots=(0, 2), batch_size=3)
    evaluate(alone)
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *COMMAND]
    done = subprocess.run([*many, *_arguments(task, tmp_path / "two")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predictions.jsonl") == 1
    _same_results(tmp_path / "two", tmp_path / "run")


def _same_results(one: Path, other: Path) -> None:
    assert predictions(one) == predictions(other)
    cells = []
    for folder in (one, other):
        found = json.loads((folder / "results.json").read_text())["cells"]
        cells.append([{k: v for k, v in cell.items() if k not in UNTIMED} for cell in found])
    assert cells[0] == cells[1]


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    evaluate(settings(tmp_path, shots=(0,), seeds=1))
    with pytest.raises(ValueError, match=r"holds another run: shots was \[0\], is \[0, 2\]"):
        evaluate(settings(tmp_path, shots=(0, 2), seeds=1))
    with pytest.raises(ValueError, match=r"examples of the run in .* changed since it began"):
        TASKS["naming"] = lambda path="": Naming(count=5)
        evaluate(settings(tmp_path, shots=(0,), seeds=1))
    TASKS["naming"] = Naming
    assert len(evaluate(settings(tmp_path, shots=(0, 2), seeds=1, overwrite=True))["cells"]) == len(BY_DEFAULT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis.txt and more, but no run"):
        evaluate(settings(tmp_path, output=str(tmp_path / "mine")))


# --- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ("aim", "magic")}, "no method magic; choose of zero, text"),
        ({"tasks": ("nothing",)}, "'nothing' is not a task"),
        ({"select": "best"}, "select='best' is unknown"),
        ({"shots": (0, -1)}, "expected numbers from 0 up"),
        ({"shots": (16,)}, "has 8 demonstrations, not 16"),
        ({"tasks": ("pictures",), "shots": (8,)}, "8 demonstrations are asked for, but pictures has 6"),
        ({"tasks": ("naming", "naming:,count=3")}, "Two tasks have the same name"),
        ({"repo": None, "backbone": AIM_TINY, "methods": ("full", "aim")}, "aim need an AIM repository"),
        ({"repo": f"{AIM_TINY}/backbone"}, "is not an AIM repository. Evaluate a model without AIM with --backbone"),
        ({"backbone": AIM_TINY}, "one of them"),
        ({"prompts": "poem"}, "prompts='poem' is unknown"),
        ({"repo": None, "backbone": AIM_TINY, "select": "fused"}, "needs an AIM repository"),
        ({"select": "fixed:nowhere.txt", "tasks": ("pictures",), "shots": (2,)}, "there is no file nowhere.txt"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_answered(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(settings(tmp_path, **given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "naming", "--repo", AIM_TINY], "--output must be given"),
        (
            ["--tasks", "naming", "--repo", AIM_TINY, "--output", "x", "--shots", "two"],
            "--shots 'two': expected a whole number",
        ),
        (["--tasks", "naming", "--output", "x"], "one of them"),
    ],
)
def test_the_command_reports_what_is_wrong(given: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["eval", *given])
    assert shown.exit_code == 1 and message in shown.output and "Traceback" not in shown.output


def test_the_command(tmp_path: Path) -> None:
    given = ["--repo", AIM_TINY, "--tasks", "naming,pictures", "--shots", "0,2", "--seeds", "1", "--limit", "2"]
    shown = CliRunner().invoke(app, ["eval", *given, "--output", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert {row["task"] for row in predictions(tmp_path / "run")} == {"naming", "pictures"}
    assert len(predictions(tmp_path / "run")) == 2 * 2 * len(BY_DEFAULT)
