"""The depth of states found by leaving demonstrations out: `choose_depth`, `set_depth` and `aim tune`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import Plugin, build, on_disk, picture, plugin, run_without_package
from PIL import Image
from test_depth import replaced_by_hand, start_of, with_words
from typer.testing import CliRunner

from modeling_aim import AimConfig, AimForConditionalGeneration, demonstrations_aim
from modeling_aim.choice_aim import SIGNIFICANCE_LEVEL, chosen_depth, corrected_p_values
from modeling_aim.cli import app

ROOT = Path(__file__).resolve().parents[1]
THREE = ["llava", "qwen2_5_vl", "idefics3"]
NAMES = ("dax", "wug", "dax", "wug", "dax")
LABELLED = [{"image": picture(i, (40 + 4 * i, 32)), "label": name} for i, name in enumerate(NAMES)]
ASKED = [{"image": picture(i), "question": "Which one?", "answer": f"the {i}th"} for i in (7, 8)]
ASKED += [{**ASKED[0], "image": picture(9)}, {**ASKED[1], "image": picture(10)}]


@pytest.fixture(scope="module", params=THREE)
def untrained(request: pytest.FixtureRequest) -> Plugin:
    """A plug-in without weights; nobody changes it."""
    return plugin(request.param, preset="untrained")


@pytest.fixture(scope="module")
def tiny() -> Plugin:
    """A plug-in without weights on LLaVA; nobody changes it."""
    return plugin("llava", preset="untrained")


@contextmanager
def counted_calls(module: Any) -> Iterator[list[int]]:
    """The calls of a module: an entry each."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *of_the_call: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


# --- what is measured


def likelihoods_by_hand(aim: Plugin, depth: int | None) -> list[float]:
    """Of each of `LABELLED` from the others: one at a time, prompts put together without the package."""
    tokenizer, found = aim.processor.tokenizer, []
    count = len(tokenizer("This is dax")["input_ids"]) - len(tokenizer("This is ")["input_ids"])
    for number, demo in enumerate(LABELLED):
        others = LABELLED[:number] + LABELLED[number + 1 :]
        text = f"{aim.processor.image_text}This is {demo['label']}"
        inputs = dict(aim.processor(images=[[demo["image"]]], text=[text], return_tensors="pt"))
        replaced: Any = nullcontext()
        if depth is not None:
            reader = AimForConditionalGeneration.from_backbone(aim.backbone, aim.processor, read_layers=[depth or 1])
            fused, start = reader.read(others), start_of(aim, inputs)
            inputs = with_words(aim, inputs, fused.ids)
            if depth:
                replaced = replaced_by_hand(aim.backbone, depth, start, inputs["input_ids"].shape[1], fused.vectors)
        with torch.no_grad(), replaced:
            told = aim.backbone(**inputs).logits[0, -count - 1 : -1].log_softmax(dim=-1)
        found.append(told.gather(-1, inputs["input_ids"][0, -count:, None]).mean().item())
    return found


def test_each_row_is_what_the_backbone_says_by_hand(untrained: Plugin) -> None:
    """Words only are the plain text prompt, zero-shot the query alone; rows of a batch are those of one at a time."""
    choice = untrained.model.choose_depth(LABELLED)
    assert [row.depth for row in choice.rows] == [None, 0, 1, 2] and choice.left_out == choice.demonstrations == 5
    wanted = {row.depth: torch.tensor(likelihoods_by_hand(untrained, row.depth)) for row in choice.rows}
    for row in choice.rows:
        values = wanted[row.depth]
        assert row.log_likelihood == pytest.approx(values.mean().item(), rel=1e-5)
        assert row.error == pytest.approx(values.std().item() / 5**0.5, rel=1e-3)
        assert row.over_words == pytest.approx((values - wanted[0]).mean().item(), abs=1e-5)
    assert len({round(row.log_likelihood, 5) for row in choice.rows}) == 4


def test_demonstrations_are_read_once_for_all_depths(untrained: Plugin) -> None:
    model = untrained.model
    model.read_cache.clear()
    tower = untrained.backbone.get_encoder("image")
    with counted_calls(tower) as reading:
        list(model._read_batches([demonstrations_aim.Demonstration.of(demo) for demo in LABELLED]))
    with counted_calls(tower) as one_depth:
        model.choose_depth(LABELLED, [1])
    with counted_calls(tower) as two_depths:
        model.choose_depth(LABELLED, [1, 2])
    batches = len(two_depths) - len(one_depth)  # of queries: these look at their images for each row of the table
    assert len(one_depth) == len(reading) + 3 * batches


def test_the_model_is_not_changed_by_choosing(untrained: Plugin) -> None:
    before = dict(untrained.model.source), untrained.answer(untrained.query(), LABELLED)
    assert untrained.model.choose_depth(LABELLED[:4]).depth == untrained.model.config.entry_layers[0]
    assert dict(untrained.model.source) == before[0]
    assert torch.equal(untrained.answer(untrained.query(), LABELLED), before[1])


def test_bfloat16_says_the_same(untrained: Plugin) -> None:
    low = build(untrained.family)
    model = AimForConditionalGeneration.from_backbone(low.model.to(torch.bfloat16), low.processor)
    rows = zip(model.choose_depth(LABELLED).rows, untrained.model.choose_depth(LABELLED).rows, strict=True)
    for row, wanted in rows:
        assert row.log_likelihood == pytest.approx(wanted.log_likelihood, abs=0.05)


def test_questions_are_put_as_a_user_puts_them(tiny: Plugin) -> None:
    """In the chat template, or as demonstrations are read; an image is no condition."""
    chat, plain = (tiny.model.choose_depth(ASKED, prompts=name) for name in ("chat", "plain"))
    assert chat.left_out == plain.left_out == 4 and chat.rows[0].log_likelihood != plain.rows[0].log_likelihood
    words = [{"question": "one or two?", "answer": "two"}, *LABELLED]
    assert tiny.model.choose_depth(words).left_out == 5  # no other one has this answer


def test_several_tasks_are_answered_from_their_own_demonstrations(tiny: Plugin) -> None:
    one, other = LABELLED[:4], [{**demo, "label": demo["label"] + "ish"} for demo in LABELLED[1:]]
    both, alone = tiny.model.choose_depth([one, other]), [tiny.model.choose_depth(task) for task in (one, other)]
    assert both.left_out == 8
    for row, *parts in zip(both.rows, *(choice.rows for choice in alone), strict=True):
        assert row.log_likelihood == pytest.approx(sum(part.log_likelihood for part in parts) / 2, rel=1e-5)


def test_what_all_texts_begin_with_is_given(tiny: Plugin) -> None:
    """A sentence that comes again is a label in words: its name is what is scored, not how it begins."""
    texts = [{"image": demo["image"], "text": f"here we see a {demo['label']}"} for demo in LABELLED]
    labelled = AimForConditionalGeneration.from_backbone(
        tiny.backbone, type(tiny.processor)(tiny.processor.processor, label_template="here we see a {label}")
    )
    for row, wanted in zip(tiny.model.choose_depth(texts).rows, labelled.choose_depth(LABELLED).rows, strict=True):
        assert row.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-5)


def test_of_many_some_are_drawn_and_no_other_is_opened(tiny: Plugin, tmp_path: Path) -> None:
    opened: set[int] = set()

    class Watched(os.PathLike[str]):
        def __init__(self, number: int) -> None:
            self.number = number
            picture(number).save(tmp_path / f"{number}.png")

        def __fspath__(self) -> str:
            opened.add(self.number)
            return str(tmp_path / f"{self.number}.png")

    many = [{"image": Watched(i), "label": f"name{'abcdefghij'[i % 10]}"} for i in range(30)]
    choice = tiny.model.choose_depth(many, [1], most=8)
    assert choice.demonstrations == choice.left_out == len(opened) == 8  # each has another one of its label
    assert "8 demonstrations were used, 22 not" in choice.notes[0]
    again = tiny.model.choose_depth(many, [1], most=8)
    other = tiny.model.choose_depth(many, [1], most=8, seed=1)
    assert again == choice != other


# --- what is said of it


def decided(layers: int, words: torch.Tensor, over: dict[int, torch.Tensor], entry: int | None = None) -> Any:
    """The choice for likelihoods of answers: from words only, and how much more at each depth."""
    config = AimConfig(build("llava", num_hidden_layers=layers).model.config, read_layers=entry and [entry])
    scores = {None: words - 1, 0: words, **{depth: words + more for depth, more in over.items()}}
    values = {source: row.tolist() for source, row in scores.items()}
    return chosen_depth(config, values, {source: [False] * len(words) for source in scores}, len(words), [])


def noise(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_best_depth_is_chosen_and_among_equals_the_one_nearest_the_default() -> None:
    words = noise(20, 0)
    clear = decided(10, words, {2: noise(20, 1, 0.1), 4: noise(20, 2, 0.1), 7: 1 + noise(20, 3, 0.1)})
    assert clear.depth == 7 and clear.beats_words and "Depth 7 beats words only by" in clear.verdict
    swings = torch.tensor([0.3, -0.3] * 10)
    level = decided(10, words, {2: 1 + noise(20, 1), 5: 0.99 + noise(20, 1) + swings, 8: noise(20, 4)})
    assert level.depth == 5 and "Depth 2 is level with it" in level.verdict  # the default is 4
    assert "nats a token (20 answers)" in str(level) and "  <" in str(level)


def test_it_says_when_no_depth_helps_and_when_there_are_too_few_to_tell() -> None:
    worse = decided(10, noise(20, 0), {3: noise(20, 1) - 0.5, 6: noise(20, 2) - 1}, entry=6)
    assert not worse.beats_words and worse.depth == 6 and "No depth beats words only" in worse.verdict
    few = decided(10, noise(4, 0), {3: 5 + noise(4, 1, 0.1)})
    assert not few.beats_words and few.depth == 4 and "Too few demonstrations to tell (4 answers)" in few.verdict
    unsure = decided(10, noise(12, 0), {3: 0.1 + noise(12, 1)})
    assert "Too few demonstrations to tell" in unsure.verdict or not unsure.rows[2].over_words > 0


def test_chance_alone_seldom_beats_words_only() -> None:
    """The best of several depths is compared with the best of several that differ by chance."""
    wrong = 0
    for seed in range(200):
        found = corrected_p_values(noise(8 * 10, seed).reshape(8, 10) + noise(10, 1000 + seed))
        wrong += min(found) <= SIGNIFICANCE_LEVEL
    assert wrong <= 20  # of 200; 10 are expected
    assert min(corrected_p_values(noise(8 * 10, 0).reshape(8, 10) + 3)) <= SIGNIFICANCE_LEVEL
    assert min(corrected_p_values(torch.zeros(3, 10))) == 1.0


# --- applied


def test_a_model_at_its_new_depth_is_one_made_there(untrained: Plugin) -> None:
    family, backbone = untrained.family, untrained.backbone
    aim, made = (
        Plugin(family, AimForConditionalGeneration.from_backbone(backbone, untrained.processor, read_layers=[depth]))
        for depth in (1, 2)
    )
    inputs, before, kept = aim.query(), aim.model.read(LABELLED), aim.model.prefill(LABELLED)
    aim.answer(inputs, LABELLED)  # what is kept of it is of the depth before
    aim.model.set_depth(2)
    assert torch.equal(aim.answer(inputs, LABELLED), made.answer(inputs, LABELLED))
    assert dict(aim.model.source) == dict(made.model.source)
    for old in (before, kept):
        with pytest.raises(ValueError, match="read by another model"):
            aim.answer(inputs, old)
    for depth in (-1, 3, True, 1.0, "2"):
        with pytest.raises(ValueError, match="expected a whole number from 0 to 2"):
            aim.model.set_depth(depth)  # type: ignore[arg-type]
    assert aim.model.config.entry_layers == aim.model.config.read_layers == [2]


REMOTE = """
from transformers import AutoModelForImageTextToText, AutoProcessor
options = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(given["repo"], **options)
processor = AutoProcessor.from_pretrained(given["repo"], **options)
demos = [{"image": path, "label": name} for path, name in given["labelled"]]
choice = model.choose_depth(demos)
inputs = processor(images=given["image"], text=processor.prompt(given["question"]), return_tensors="pt")
model.set_depth(2)
answer = model.generate(**inputs, demos=demos, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(json.dumps([choice.to_dict(), str(choice), answer.tolist()]))
"""


def test_remote_code_chooses_the_same(tiny: Plugin, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path / "repo", include_backbone=True)
    paths = [tmp_path / f"{number}.png" for number in range(len(LABELLED))]
    for path, demo in zip(paths, LABELLED, strict=True):
        demo["image"].save(path)
    labelled = [(str(path), demo["label"]) for path, demo in zip(paths, LABELLED, strict=True)]
    given = {**on_disk(tmp_path / "images"), "repo": str(tmp_path / "repo"), "labelled": labelled}
    told, table, answer = run_without_package(REMOTE, given)
    choice = tiny.model.choose_depth(LABELLED)
    assert told == json.loads(json.dumps(choice.to_dict())) and table == str(choice)
    two = AimForConditionalGeneration.from_backbone(tiny.backbone, tiny.processor, read_layers=[2])
    assert answer == Plugin("llava", two).answer(tiny.query(), LABELLED)[0].tolist()


# --- bad input


def test_what_cannot_tell_a_depth_is_refused(tiny: Plugin) -> None:
    model = tiny.model
    for one in (LABELLED[:1], [LABELLED[0], LABELLED[0]], [LABELLED[:1], LABELLED[1:2]], []):
        with pytest.raises(ValueError, match=r"no other is there to answer it from.*at least 2"):
            model.choose_depth(one)
    with pytest.raises(ValueError, match=r"says something else \(dax, wug.*two demonstrations of a label"):
        model.choose_depth(LABELLED[:2])
    for other in (model.read(LABELLED), [model.read(LABELLED), None]):
        with pytest.raises(ValueError, match=r"takes raw ones.*fused"):
            model.choose_depth(other)
    for wrong in ({"depths": [0]}, {"depths": [3]}, {"depths": []}, {"prompts": "letters"}, {"most": 1}):
        with pytest.raises(ValueError, match="expected"):
            model.choose_depth(LABELLED, **wrong)


def test_captions_are_compared_and_called_weak_evidence(tiny: Plugin) -> None:
    captions = [(picture(i), f"a blue thing on {word} ground.") for i, word in enumerate(("red", "grey", "no"))]
    choice = tiny.model.choose_depth(captions)
    assert choice.left_out == 3 and "Too few" in choice.verdict
    assert any("weak evidence" in note for note in choice.notes)


def test_as_many_as_fit_answer_and_none_is_refused_with_numbers() -> None:
    built = build("llava")
    model = AimForConditionalGeneration.from_backbone(built.model, built.processor)
    longer = [{"image": demo["image"], "text": demo["label"] + " it is" * 20} for demo in LABELLED]
    words = [len(ids) for ids in model.text_token_ids([demonstrations_aim.Demonstration.of(demo) for demo in longer])]
    query = model.processor(images=[[longer[0]["image"]]], text=[model.processor.image_text + longer[0]["text"]])
    length = len(query["input_ids"][0])
    text_config = model.backbone.config.get_text_config()
    text_config.max_position_embeddings = length + 2 * max(words) + 2
    choice = model.choose_depth(longer, [1])
    assert any("4 other demonstrations 2 to 2 were shown" in note for note in choice.notes)
    text_config.max_position_embeddings = length + 1
    with pytest.raises(ValueError, match=rf"takes {length} tokens as a query, .* has {length + 1} positions"):
        model.choose_depth(longer, [1])


def test_a_model_with_weights_is_refused_with_the_way_out(llava: Plugin) -> None:
    for call in (lambda: llava.model.choose_depth(LABELLED), lambda: llava.model.set_depth(2)):
        with pytest.raises(ValueError, match=r"has weights \(residual_mlp.*from_backbone.*aim tune.*--read-layers"):
            call()
    free = type(llava.model).from_backbone(llava.backbone, llava.processor)
    assert free.choose_depth(LABELLED).rows  # the way out


def test_a_backbone_without_a_stack_of_layers_is_refused() -> None:
    built = build("llava")
    built.model.config.text_config.num_hidden_layers = 7  # it has three
    model = AimForConditionalGeneration.from_backbone(built.model, built.processor, preset="paper")
    with pytest.raises(ValueError, match="no stack of 7 decoder layers"):
        model.choose_depth(LABELLED)


# --- the command


def run(*arguments: Any, fails: bool = False) -> str:
    done = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    assert (done.exit_code != 0) == fails, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of demonstrations from aim-tiny's world, and its images, sorted by label too."""
    sys.path.insert(0, str(ROOT / "examples" / "aim_tiny"))
    import world

    folder, lines = tmp_path_factory.mktemp("demos"), []
    for number, demo in enumerate(world.episode("command", 2, 4).demos):
        name = demo["text"].split()[2]
        path = folder / "by_label" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        demo["image"].save(path)
        lines.append(json.dumps({"image": str(path.relative_to(folder)), "label": name}))
    (folder / "demos.jsonl").write_text("\n".join(lines))
    return folder


BACKBONE = ROOT / "hub_configs" / "aim-tiny" / "backbone"


def test_the_command_writes_the_depth_and_nothing_else(demos: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    AimForConditionalGeneration.from_backbone(BACKBONE, read_layers=[4]).save_pretrained(repo)
    before = (repo / "config.json").read_text()
    said = run("--repo", repo, "--demos", demos / "demos.jsonl", "--dry-run")
    assert "Nothing was written" in said and "zero-shot" in said and "words only" in said and "█" in said
    assert (repo / "config.json").read_text() == before
    files = {path.name: path.read_bytes() for path in repo.iterdir()}
    said = run("--repo", repo, "--demos", demos / "demos.jsonl", "--picture", tmp_path / "depth.png", "--json")
    told = json.loads(said.splitlines()[-1])
    assert told["beats_words"] and told["depth"] in (2, 3) and "they were [4]" in told["config"]
    with Image.open(tmp_path / "depth.png") as drawn:
        assert drawn.width > 500 and len(drawn.convert("RGB").getcolors(10**6) or ()) > 20
    changed = {path.name for path in repo.iterdir() if path.read_bytes() != files[path.name]}
    assert changed == {"config.json", "README.md"} and set(files) == {path.name for path in repo.iterdir()}
    card, card_before = (repo / "README.md").read_text().splitlines(), files["README.md"].decode().splitlines()
    other = [line for line, old in zip(card, card_before, strict=True) if line != old]
    assert len(other) == 2 and all(f"[{told['depth']}]" in line for line in other), other
    assert "The model card names it too." in told["config"]
    wanted = json.loads(before) | {"read_layers": [told["depth"]], "entry_layers": [told["depth"]]}
    assert (repo / "config.json").read_text() == json.dumps(wanted, indent=2) + "\n"
    lines = (repo / "config.json").read_text().splitlines()
    assert sum(one != other for one, other in zip(lines, before.splitlines(), strict=True)) == 2
    assert "has this depth already" in run("--repo", repo, "--demos", demos / "by_label")


def test_the_command_makes_a_repository_for_a_backbone(demos: Path, tmp_path: Path) -> None:
    file = demos / "demos.jsonl"
    said = run("--backbone", BACKBONE, "--demos", file, "--demos", file, "--output", tmp_path / "new")
    model = AimForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert f"at {model.config.entry_layers}" in said and "16 answers" in said and "prompts" in said
    assert "Give --output DIR" in run("--backbone", BACKBONE, "--demos", file, "--depths", "2,3", "--most", "6")


def test_the_command_refuses_in_one_message(demos: Path, tmp_path: Path, tiny: Plugin) -> None:
    file, aim_tiny = demos / "demos.jsonl", ROOT / "hub_configs" / "aim-tiny"
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "file").write_text("")
    for command, message in (
        (["--demos", file], "one of them"),
        (["--repo", BACKBONE, "--demos", file], "not an AIM repository"),
        (["--repo", aim_tiny, "--demos", file], "bound to their depth"),
        (["--backbone", BACKBONE, "--demos", file, "--output", tmp_path / "held"], "not empty"),
        (["--backbone", BACKBONE, "--demos", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--backbone", BACKBONE, "--demos", file, "--depths", "5"], "from 1 to 4"),
        (["--backbone", BACKBONE, "--demos", file, "--dtype", "int3"], "expected one of"),
    ):
        said = " ".join(run(*command, fails=True).split())
        assert message in said, said
    on_llava = tmp_path / "random"
    tiny.model.save_pretrained(on_llava, include_backbone=True)
    assert "left as it is" in run("--repo", on_llava, "--demos", file, "--most", "4")


# --- aim-tiny


def test_the_depth_chosen_on_aim_tiny_is_within_a_point_of_the_best() -> None:
    command = [sys.executable, str(ROOT / "examples" / "aim_tiny" / "tune.py"), "--cells", "2-way 8"]
    command += ["--episodes", "3", "--queries", "20", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["2-way 8"]
    assert found["pooled"]["accuracy"] >= found["best"] - 0.01 and found["by_episode"]["beats_words"] == 3
    assert found["best"] > found["accuracy_by_depth"]["4"] + 0.2
