"""The evaluation of aim-tiny runs its own forward pass for speed: its verdicts are those of the public API."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
CELL, EPISODES = "5-way 5", range(4)


@pytest.fixture(scope="module")
def tiny():
    repo = ROOT / "hub_configs" / "aim-tiny"
    return (
        AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True),
        AutoProcessor.from_pretrained(repo, trust_remote_code=True),
    )


@pytest.fixture(scope="module")
def evaluation():
    sys.path.insert(0, str(ROOT / "examples" / "aim_tiny"))
    import evaluate
    import world

    yield evaluate, world, evaluate.Bench("test", methods=("zero_shot", "text_only", "full", "aim"))
    sys.path.remove(str(ROOT / "examples" / "aim_tiny"))


@pytest.mark.parametrize("wording", ["this", "qa", "chat"])
@pytest.mark.parametrize("method", ["zero_shot", "text_only", "full", "aim"])
def test_evaluation_says_what_generate_says(tiny, evaluation, method, wording):
    model, processor = tiny
    evaluate, world, bench = evaluation
    ways, shots = evaluate.CELLS[CELL]
    tasks = [evaluate.task(f"0.{e}", ways, shots, "test", wording) for e in EPISODES]
    form = world.WORDINGS[wording]
    said = []
    for e, task in zip(EPISODES, tasks, strict=True):
        episode = world.episode(f"0.{e}", ways, shots, wording=wording)
        query = world.join(form.head, "<image>", form.question)
        told = [world.join(form.head, "<image>", form.question, form.answer.format(name)) for name in names(world, e)]
        text, images, demos = query, [episode.image], None
        if method == "aim":
            demos = episode.demos
        elif method == "full":
            text, images = " ".join([*told, query]), [demo["image"] for demo in episode.demos] + images
        elif method == "text_only":
            text = " ".join([*(" ".join(words.replace("<image>", "").split()) for words in told), query])
        inputs = processor(images=images, text=text, return_tensors="pt")
        gold = processor.tokenizer(task.query.answer, add_special_tokens=False).input_ids
        new = model.generate(**inputs, demos=demos, max_new_tokens=len(gold), do_sample=False)
        said.append(new[0, inputs["input_ids"].shape[1] :].tolist()[: len(gold)] == gold)
    assert said == bench.right(method, tasks)


def names(world, episode: int) -> list[str]:
    """The name in each demonstration of an episode."""
    p = world.plan_of(f"0.{episode}", 5, 1, "test")
    return [p.bindings[way] for way, _ in p.demos]
