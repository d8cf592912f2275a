"""The adapter in the real lmms-eval: its own command, two of its tasks on small local data, scores as by our own code.

`make test-lmms-eval` installs lmms-eval and runs this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_aim import AimForConditionalGeneration, DemonstrationBank
from modeling_aim.evaluation.metrics import vqa_accuracy

lmms_eval = pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make test-lmms-eval installs it")
datasets = pytest.importorskip("datasets")

from modeling_aim.evaluation.lmms_adapter import AimChat, AimSimple, Query, Request, generation_settings, until  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
AIM_TINY = ROOT / "hub_configs" / "aim-tiny"
THEIRS = Path(lmms_eval.__file__).parent / "tasks"
SHOTS = 8
VQA = """
include: {theirs}/ok_vqa/_default_template_vqa_yaml
task: local_ok_vqa
dataset_path: {data}/vqa
test_split: test
generation_kwargs:
  until: ["."]
  max_new_tokens: 8
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
"""
CHOICE = """
include: {theirs}/seedbench/seedbench_ppl.yaml
task: local_seedbench_ppl
dataset_path: {data}/choice
dataset_kwargs: {{}}
"""


@dataclass
class Data:
    """Two tasks of lmms-eval with data of their own, and a bank that goes with them."""

    folder: Path
    queries: list[tuple[Any, str]]
    names: list[str]
    answers: list[list[str]]

    @property
    def bank(self) -> Path:
        return self.folder / "bank"


@pytest.fixture(scope="module")
def model() -> AimForConditionalGeneration:
    return AimForConditionalGeneration.from_pretrained(AIM_TINY)


@pytest.fixture(scope="module")
def data(model: AimForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Four held-out concepts with four demonstrations and six queries each, as parquet in the tasks' own columns."""
    sys.path.insert(0, str(ROOT / "examples"))
    from lesson import shapes

    folder = tmp_path_factory.mktemp("lmms")
    demos, queries = shapes(4, 4, "lmms-eval", asked=6)
    names = sorted({name for _, name in queries})
    # One to four of ten annotators say the name, so that one right answer scores .3 to 1.
    answers = [[name] * (1 + i % 4) + ["other"] * (9 - i % 4) for i, (_, name) in enumerate(queries)]
    vqa, choice = [], []
    for number, (image, name) in enumerate(queries):
        path = str(folder / f"{number}.png")
        image.save(path)
        vqa.append({"image": path, "question": "this is", "question_id": number, "answers": answers[number]})
        vqa[-1]["answer"] = name
        options = {f"choice_{letter}": f"this is {one} ." for letter, one in zip("abcd", names, strict=True)}
        letter = "ABCD"[names.index(name)]
        choice.append({"image": [path], "question": "what is this ?", "answer": letter, **options})
    for rows, kind, where in ((vqa, datasets.Image(), "vqa"), (choice, datasets.Sequence(datasets.Image()), "choice")):
        (folder / where).mkdir()
        table = datasets.Dataset.from_list(rows).cast_column("image", kind)
        table.to_parquet(str(folder / where / "test-00000-of-00001.parquet"))
    (folder / "tasks").mkdir()
    for text, where in ((VQA, "vqa"), (CHOICE, "choice")):
        (folder / "tasks" / f"{where}.yaml").write_text(text.format(theirs=THEIRS, data=folder), encoding="utf-8")
    DemonstrationBank.build(model, demos, folder / "bank")
    return Data(folder, queries, names, answers)


def run(data: Data, task: str, arguments: dict[str, Any], *more: str, batch: int = 4) -> tuple[Any, list[Any]]:
    """Run lmms-eval's command; the task's metrics, and its samples in the order of the data."""
    output = data.folder / f"out-{len(list(data.folder.glob('out-*')))}"
    given = ",".join(f"{name}={value}" for name, value in {"pretrained": AIM_TINY, **arguments}.items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "aim", "--model_args", given, "--tasks", task]
    command += ["--include_path", str(data.folder / "tasks"), "--output_path", str(output), "--log_samples"]
    command += ["--batch_size", str(batch), "--device", "cpu", *more]
    done = subprocess.run(command, cwd=data.folder, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = output.rglob("*_results.json")
    (samples,) = output.rglob(f"*_samples_{task}.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    return json.loads(results.read_text(encoding="utf-8"))["results"][task], rows


def prompts(model: AimForConditionalGeneration, data: Data, text: str) -> list[Any]:
    """Inputs of each query."""
    return [model.processor(images=image, text=text, return_tensors="pt") for image, _ in data.queries]


def test_it_is_found_by_its_entry_point() -> None:
    from lmms_eval.models import get_model

    assert (get_model("aim"), get_model("aim", True)) == (AimChat, AimSimple)
    assert (AimChat.is_simple, AimSimple.is_simple) == (False, True)


@pytest.mark.parametrize("simple", [False, True])
def test_written_answers_score_as_by_our_own_code(model: Any, data: Data, simple: bool) -> None:
    bank = DemonstrationBank.from_pretrained(data.bank, model)
    expected = []
    for inputs in prompts(model, data, model.processor.image_text + "this is"):
        ids = model.generate(**inputs, demos=bank, shots=SHOTS, select="image", max_new_tokens=8, do_sample=False)
        words = model.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(words.split(".")[0].strip())
    own = [vqa_accuracy(text, answers) for text, answers in zip(expected, data.answers, strict=True)]
    given = {"bank": data.bank, "shots": SHOTS, "select": "image", "prompts": "plain"}
    metrics, samples = run(data, "local_ok_vqa", given, *["--force_simple"] * simple)
    assert [row["filtered_resps"] for row in samples] == expected
    assert metrics["exact_match,none"] == pytest.approx(sum(own) / len(own))
    assert sum(own) / len(own) > 0.5  # with names that only the bank tells
    counted = samples[0]["token_counts"][0]
    fused = bank.select({"image": data.queries[0][0]}, SHOTS, "image").num_tokens
    assert counted["input_tokens"] == prompts(model, data, "<image> this is")[0]["input_ids"].shape[1] + fused


def test_options_score_as_by_our_own_code(model: Any, data: Data) -> None:
    bank = DemonstrationBank.from_pretrained(data.bank, model)
    processor = model.processor
    drawn = bank.select(None, SHOTS, "random", seed=3)
    prompt = processor.prompt("what is this ? Answer :")
    right, losses = 0, []
    for image, name in data.queries:
        row = []
        for one in data.names:
            inputs = processor(images=image, text=f"{prompt} this is {one} .", return_tensors="pt")
            start = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
            labels = inputs["input_ids"].clone()
            labels[:, :start] = -100
            with torch.no_grad():
                row.append(float(model(**inputs, demos=drawn, labels=labels).loss))
        right += data.names[row.index(min(row))] == name
        losses.append(row)
    given = {"bank": data.bank, "shots": SHOTS, "seed": 3}
    metrics, samples = run(data, "local_seedbench_ppl", given, "--force_simple")
    theirs = [[float(loss) for loss, _ in row["filtered_resps"]] for row in samples]
    assert torch.allclose(torch.tensor(theirs), torch.tensor(losses), atol=1e-4)
    assert metrics["acc,none"] == pytest.approx(right / len(data.queries)) and right > len(data.queries) / 2


@pytest.fixture(scope="module")
def adapter(data: Data) -> AimSimple:
    return AimSimple(str(AIM_TINY), bank=str(data.bank), shots=SHOTS, select="image", batch_size=5, device="cpu")


def asked(adapter: AimSimple, images: list[Any], words: str, behind: str = "", **settings: Any) -> Request:
    """A request as lmms-eval's are made into."""
    return Request(lambda: adapter._query(images, words, behind), len(words), settings)


def test_batches_change_nothing(data: Data, adapter: AimSimple) -> None:
    words = ("this is", "what is this ?")
    requests = [asked(adapter, [image], one, max_new_tokens=6) for image, _ in data.queries for one in words]
    requests += [asked(adapter, [], "what is a square ?"), asked(adapter, [data.queries[0][0]], "a", until="x")]
    adapter.by, kept = "random", adapter.by  # a query without an image has none to compare
    together = [one.text for one in adapter.written(requests)]
    adapter.batch_size = 1
    assert [one.text for one in adapter.written(requests)] == together and len(set(together)) > 3
    scored = [asked(adapter, [image], "this is", name) for image, name in data.queries[:6]]
    scored.append(asked(adapter, [], "a square is a", "square"))
    alone = [one.text for one in adapter.scored(scored)]
    adapter.batch_size = 5
    for (loss, greedy), (other, same) in zip(alone, (one.text for one in adapter.scored(scored)), strict=True):
        assert loss == pytest.approx(other, abs=1e-4) and greedy is same
    adapter.by = kept


def test_images_are_opened_batch_by_batch(data: Data, adapter: AimSimple) -> None:
    open_now: list[int] = []
    answered: list[int] = []

    def request(number: int) -> Request:
        def query() -> Query:
            open_now.append(number)
            return adapter._query([data.queries[number][0]], "this is")

        return Request(query, 7, {"max_new_tokens": 2})

    write = adapter._write

    def counted(batch: Any, settings: Any) -> Any:
        answered.append(len(batch))
        assert len(open_now) == sum(answered)
        return write(batch, settings)

    adapter._write = counted  # type: ignore[method-assign]
    try:
        adapter.written([request(number) for number in range(12)])
    finally:
        del adapter._write  # type: ignore[method-assign]
    assert answered == [5, 5, 2] and sorted(open_now) == list(range(12))


def test_greedy_is_what_generate_says(data: Data, adapter: AimSimple) -> None:
    image, _ = data.queries[0]
    said = adapter.written([asked(adapter, [image], "what is this ?", max_new_tokens=3)])[0].text
    requests = [asked(adapter, [image], "what is this ?", one) for one in (said, f"{said} square")]
    greedy, other = (one.text for one in adapter.scored(requests))
    assert greedy[1] is True and other[1] is False and greedy[0] < other[0]


def test_without_a_bank_it_is_the_backbone(model: Any, data: Data) -> None:
    bare = AimChat(str(AIM_TINY), prompts="plain", device="cpu")
    image, _ = data.queries[0]
    turn = {"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "this is"}]}
    query = bare._asked([turn])
    inputs = model.processor(images=image, text=query.text, return_tensors="pt")
    ids = model.backbone.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = model.processor.decode(ids, skip_special_tokens=True).strip()
    assert bare.written([Request(lambda: query, 7, {"max_new_tokens": 6})])[0].text == expected


def test_chats_keep_their_turns_and_the_order_of_images(data: Data) -> None:
    chat = AimChat(str(AIM_TINY), device="cpu")
    first, second = data.queries[0][0], data.queries[1][0]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image", "url": first}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "image", "url": second}, {"type": "text", "text": "three"}]},
    ]
    query = chat._asked(turns)
    assert query.text == "USER: one <image> ASSISTANT: two USER: <image> three ASSISTANT:"
    assert [one.tobytes() for one in query.images] == [first.tobytes(), second.tobytes()]
    plain = [turns[0], {"role": "assistant", "content": "two"}, turns[2]]
    assert chat._asked(plain).text == query.text
    with pytest.raises(ValueError, match="this task has video"):
        chat._asked([{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}])


def test_settings_of_tasks_are_translated() -> None:
    greedy = generation_settings({"temperature": 0, "top_p": 1.0, "until": ["\n"], "image_aspect_ratio": "pad"})
    assert greedy == {"max_new_tokens": 256, "do_sample": False, "num_beams": 1}
    sampled = generation_settings({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 4, "num_beams": None})
    assert sampled == {"max_new_tokens": 4, "do_sample": True, "num_beams": 1, "temperature": 0.7, "top_p": 0.9}
    assert generation_settings({"do_sample": True})["do_sample"] is True
    assert generation_settings({"do_sample": False, "temperature": 0.2})["do_sample"] is True
    assert until(" a dax.\nNext", [".", "\n"]) == "a dax" and until(" a dax ", None) == until("a dax", "") == "a dax"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 4}, "give bank=FOLDER"),
        ({"bank": "{bank}", "shots": 99}, "99 demonstrations were asked of a bank that has 16"),
        ({"bank": "{bank}", "select": "image"}, "say how many"),
        ({"bank": "{bank}", "shots": 4, "select": "best"}, "select='best' is unknown"),
        ({"batch_size": "auto"}, "batch_size='auto': expected a number"),
        ({"prompts": "poem"}, "prompts='poem' is unknown"),
    ],
)
def test_wrong_settings_are_told(data: Data, settings: dict[str, Any], message: str) -> None:
    filled = {k: str(data.bank) if v == "{bank}" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=message):
        AimSimple(str(AIM_TINY), device="cpu", **filled)
