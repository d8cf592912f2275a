"""aim-tiny's tasks keep their splits apart and hide their rules; its evaluation says what the public API says."""

from __future__ import annotations

import json
import random
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_aim import AimForConditionalGeneration, AimProcessor
from modeling_aim.llava.chat import ChatWriter
from modeling_aim.llava.data import Collator, Examples
from modeling_aim.training import Mixture, ShotLaw, open_source

ROOT = Path(__file__).resolve().parents[1]
REPO = ROOT / "hub_configs" / "aim-tiny"
CELL, EPISODES = "5-way 5", range(4)
METHODS = ("zero_shot", "text_only", "full", "aim", "aim_untrained", "aim_untrained_shuffled_images")


@pytest.fixture(scope="module")
def tiny():
    return (
        AutoModelForImageTextToText.from_pretrained(REPO, trust_remote_code=True),
        AutoProcessor.from_pretrained(REPO, trust_remote_code=True),
    )


@pytest.fixture(scope="module")
def untrained():
    """AIM without training on the same backbone."""
    return AimForConditionalGeneration.from_backbone(str(REPO / "backbone"), AimProcessor.from_pretrained(REPO))


@pytest.fixture(scope="module")
def evaluation():
    sys.path.insert(0, str(ROOT / "examples" / "aim_tiny"))
    import evaluate
    import world

    yield evaluate, world, evaluate.Bench("test", methods=METHODS)
    sys.path.remove(str(ROOT / "examples" / "aim_tiny"))


@pytest.mark.parametrize("wording", ["this", "qa", "chat"])
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_says_what_generate_says(tiny, untrained, evaluation, method, wording):
    model, processor = (untrained, untrained.processor) if "untrained" in method else tiny
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
        if method.startswith("aim"):
            demos = episode.demos
            if method.endswith("shuffled_images"):
                shown = [world.pool_image("test", *demo.image) for demo in evaluate.shuffled(task).demos]
                demos = [{**demo, "image": image} for demo, image in zip(demos, shown, strict=True)]
        elif method == "full":
            text, images = " ".join([*told, query]), [demo["image"] for demo in episode.demos] + images
        elif method == "text_only":
            text = " ".join([*(" ".join(words.replace("<image>", "").split()) for words in told), query])
        inputs = processor(images=images, text=text, return_tensors="pt")
        said.append(answered(model, processor, inputs, demos, task.query.answer))
    assert said == bench.right(method, tasks)


def answered(model: Any, processor: Any, inputs: Any, demos: Any, answer: str) -> bool:
    """Whether `generate` gives exactly an answer."""
    gold = processor.tokenizer(answer, add_special_tokens=False).input_ids
    new = model.generate(**inputs, demos=demos, max_new_tokens=len(gold), do_sample=False)
    return new[0, inputs["input_ids"].shape[1] :].tolist()[: len(gold)] == gold


PLACES = {  # read layers, entry layers, and how large a random projector is made: some answers stay right
    "at the input": ([3], [0], 0.05),
    "at a depth": ([2], [2], 1.0),
    "at the input and a depth": ([0, 2], [0, 2], 1.0),
    "at two depths": ([1, 3], [1, 3], 1.0),
}


@pytest.mark.parametrize(
    "places", [pytest.param(p, marks=pytest.mark.slow) if p in ("at a depth", "at two depths") else p for p in PLACES]
)
def test_evaluation_of_a_projector_says_what_generate_says(untrained, evaluation, places, tmp_path, monkeypatch):
    """Wherever its states enter."""
    evaluate, world, bench = evaluation
    read, entry, size = PLACES[places]
    model = AimForConditionalGeneration.from_backbone(
        untrained.backbone, untrained.processor, read_layers=read, entry_layers=entry, projector_form="residual"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.projector.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * size * weight.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    changed = {"plugins": {"aim": evaluate.load_plugin("aim", bench.backbone, tmp_path)}, "kept": (None, None)}
    for name, value in {**changed, "prefixes": []}.items():
        monkeypatch.setattr(bench, name, value)
    tasks = [evaluate.task(f"0.{e}", 2, 4, "test", "this") for e in range(12)]
    said = []
    for e, task in enumerate(tasks):
        episode = world.episode(f"0.{e}", 2, 4, wording="this")
        inputs = model.processor(images=[episode.image], text="<image> this is", return_tensors="pt")
        said.append(answered(model, model.processor, inputs, episode.demos, task.query.answer))
    assert said == bench.right("aim", tasks)
    assert 0 < sum(said) < len(said)


def names(world, episode: int) -> list[str]:
    """The name in each demonstration of an episode."""
    p = world.plan_of(f"0.{episode}", 5, 1, "test")
    return [p.bindings[way] for way, _ in p.demos]


def test_a_prompt_that_is_too_long_has_no_accuracy(evaluation):
    evaluate, _, bench = evaluation
    found = evaluate.evaluate(bench, ["full", "aim_untrained"], ["16-way 64"], ["this"], episodes=1, seeds=1)
    assert found["16-way 64"]["full"] is None and found["16-way 64"]["aim_untrained"] in (0, 1)
    assert found["16-way 64"]["tokens"]["full"] > 4096 > found["16-way 64"]["tokens"]["aim_untrained"]
    assert "| too long |" in evaluate.table(found, ["full", "aim_untrained"])
    assert "16-way 64" not in evaluate.cells_of("validation")  # it has 8 concepts


@pytest.mark.parametrize("task", ["operator", "attribute", "captions"])
def test_evaluation_of_the_tasks_says_what_generate_says(tiny, evaluation, task):
    model, processor = tiny
    evaluate, world, bench = evaluation
    said = []
    for e in EPISODES:
        episode = evaluate.rules.episode(task, f"0.{e}", "test", 4)
        query = episode.queries[0]
        demos = [shot.pair(shot.image) for shot in episode.demos]
        inputs = processor(images=query.image, text=world.join("<image>", query.question), return_tensors="pt")
        said.append(answered(model, processor, inputs, demos, query.answer))
    assert said == bench.right("aim", evaluate.tasks_of(f"{task} 4", "test", "", 0, len(EPISODES)))


# --- the tasks


@pytest.fixture(scope="module")
def tasks():
    sys.path.insert(0, str(ROOT / "examples" / "aim_tiny"))
    import tasks

    yield tasks
    sys.path.remove(str(ROOT / "examples" / "aim_tiny"))


NAMES = ("link_context", "operator", "counting", "attribute", "captions")


@pytest.mark.parametrize("task", NAMES)
def test_splits_share_neither_concept_nor_made_up_word(tasks: Any, task: str) -> None:
    concepts, words = {}, {}
    for split in ("train", "validation", "test"):
        made = [tasks.episode(task, seed, split, 8) for seed in range(20)]
        shots = [shot for one in made for shot in (*one.demos, *one.queries)]
        concepts[split] = {(shot.scene.colour, shot.scene.shape) for shot in shots}
        known = set(tasks.world.names(split))
        words[split] = {word for shot in shots for word in shot.answer.split() if word in known}
        assert bool(words[split]) == (task in tasks.NAMED)
    for kind in (concepts, words):
        assert not kind["train"] & kind["test"] and not kind["train"] & kind["validation"]
        assert not kind["validation"] & kind["test"]


@pytest.mark.parametrize("task", NAMES)
def test_an_episode_follows_from_its_seed_and_repeats_no_image(tasks: Any, task: str) -> None:
    one, same, other = (tasks.episode(task, seed, "test", 16, queries=2) for seed in (1, 1, 2))
    assert one == same != other
    shown = [(shot.concept, shot.index) for shot in (*one.demos, *one.queries)]
    assert len(set(shown)) == len(shown) == 18


@pytest.mark.parametrize("task", ["link_context", "operator"])
def test_words_alone_tell_nothing_where_the_rule_is_in_the_images(tasks: Any, task: str) -> None:
    """Each made-up word is said equally often, in the same sentence, and none of the words is a colour or a shape."""
    for seed in range(20):
        episode = tasks.episode(task, seed, "test", 8)
        said = [f"{shot.question} {shot.answer}" for shot in episode.demos]
        assert len(set(said)) == 2 and all(said.count(words) == 4 for words in set(said))
        assert f"{episode.queries[0].question} {episode.queries[0].answer}" in said
        describing = {word for shot in episode.demos for word in (shot.scene.colour, shot.scene.shape)}
        assert not describing & {word for words in said for word in words.split()}


def test_an_operator_depends_on_one_property_of_the_image(tasks: Any) -> None:
    for seed in range(20):
        episode = tasks.episode("operator", seed, "test", 16)
        shots = [*episode.demos, *episode.queries]
        value = {shot.answer: getattr(shot.scene, episode.rule) for shot in shots}
        assert all(getattr(shot.scene, episode.rule) == value[shot.answer] for shot in shots)
        assert len(set(value.values())) == len(value) == 2


def test_a_question_does_not_say_which_attribute_is_asked(tasks: Any) -> None:
    rules = set()
    for seed in range(30):
        episode = tasks.episode("attribute", seed, "test", 6)
        rules.add(episode.rule)
        assert len({shot.question for shot in (*episode.demos, *episode.queries)}) == 1
        assert not set(tasks.ATTRIBUTES) & set(episode.demos[0].question.split())
        assert all(shot.answer == f"{getattr(shot.scene, episode.rule)} ." for shot in episode.demos)
    assert rules == set(tasks.ATTRIBUTES)


@pytest.mark.parametrize("task", NAMES)
def test_files_of_episodes_are_what_training_reads(tasks: Any, task: str, tmp_path: Path) -> None:
    made = list(tasks.training_episodes(task, 3, tasks.few_or_many(8)))
    path = tasks.write_episodes(tmp_path / "episodes.jsonl", made)
    source, _ = open_source(f"episodes:{path}")
    read = [episode.opened() for episode in islice(Mixture([source], [1.0], ShotLaw(8)), 6)]
    wanted = {(tuple(s.answer for s in one.demos), q.question or None, q.answer) for one in made for q in one.queries}
    assert {(tuple(p.text for p in e.pairs[:-1]), e.pairs[-1].question, e.pairs[-1].text) for e in read} == wanted
    shown = {shot.image.tobytes() for one in made for shot in (*one.demos, *one.queries)}
    assert {pair.images[0].tobytes() for one in read for pair in one.pairs} == shown


def test_tasks_that_look_closely_are_what_they_say(tasks: Any) -> None:
    """Each word stands for one kind, all are shown, no image twice, and only the images tell which is which."""
    for task in tasks.LOOKING:
        for seed in range(12):
            episode = tasks.episode(task, seed, "test", 12)
            picks = [(shot.concept, shot.index) for shot in (*episode.demos, *episode.queries)]
            assert len(set(picks)) == 13
            (query,) = episode.queries
            said = {shot.answer for shot in episode.demos}
            assert len(said) == {"counts": 3, "pairs": 4, "distractor": 2, "two_words": 4}[task]
            if task == "two_words":
                words = query.answer.split()[2:4]
                named = [[s for s in episode.demos if word in s.answer.split()] for word in words]
                for name, shots in zip(("colour", "shape"), named, strict=True):
                    assert {getattr(shot.scene, name) for shot in shots} == {getattr(query.scene, name)}
                continue
            same = [shot.scene for shot in episode.demos if shot.answer == query.answer]
            other = [shot.scene for shot in episode.demos if shot.answer != query.answer]
            fixed = [n for n in vars(query.scene) if {getattr(s, n) for s in same} == {getattr(query.scene, n)}]
            assert len(same) == 12 // len(said)
            assert not any(all(getattr(s, n) == getattr(query.scene, n) for n in fixed) for s in other)


def test_conversations_for_aim_backbone_are_the_corpus_token_for_token(tasks: Any, tmp_path: Path) -> None:
    """In LLaVA's JSON, read back by `aim backbone` without the chat template."""
    import llava
    import words

    writer = ChatWriter(words.tokenizer(), words.IMAGE, words.VISUAL_TOKENS)
    collator = Collator(writer, words.processor().image_processor, captions=False, max_length=4096, plain=True)
    kinds = [llava.conversations, llava.conversations, llava.captions]
    samples = [next(make(random.Random(seed))) for seed in range(10) for make in kinds]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": str(n), **llava.record(s)} for n, s in enumerate(samples)]))
    for concept, index in {image for sample in samples for image in sample.images}:
        world_image = llava.world.pool_image("train", concept, index)
        world_image.save(tmp_path / f"{concept}-{index}.png")
    examples = Examples((f"llava:{tmp_path / 'rows.json'}",), "stage2", 0)
    assert len(examples) == len(samples)
    for sample, example in zip(samples, (examples[n] for n in range(len(samples))), strict=True):
        batch = collator([example])
        assert batch["input_ids"][0].tolist() == sample.ids
        assert (batch["labels"][0] != -100).tolist() == sample.target
