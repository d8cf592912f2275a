"""How `aim backbone` trains: its optimizers, the order of its examples, and conversations without a chat template."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import llava_parts
import numpy as np
import pytest
from test_llava_backbone import Killed, changed, kill_at, saved_weights, weights_of
from transformers import LlavaForConditionalGeneration

from modeling_aim.llava import BackboneSettings, build_backbone
from modeling_aim.llava.data import ByLength, Collator, Examples
from modeling_aim.llava.parts import join
from modeling_aim.llava.stages import StageTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    captions, conversations = llava_parts.save_data(folder / "data")
    parts = {"clip": llava_parts.save_clip(folder / "clip"), "llama": llava_parts.save_llama(folder / "llama")}
    return {**parts, "captions": captions, "conversations": conversations}


@pytest.fixture
def settings(data: dict[str, str], tmp_path: Path) -> BackboneSettings:
    """Four steps of stage 2."""
    return BackboneSettings(
        vision_tower=data["clip"], language_model=data["llama"], output=str(tmp_path / "out"), dtype="float32",
        stage2=(data["conversations"],), batch_size=2, stage2_batch_size=4, stage2_steps=4, save_every=1, log_every=1,
        stage2_learning_rate=1e-2, arguments={"use_cpu": True, "disable_tqdm": True},
    )  # fmt: skip


def test_muon_trains_the_matrices_of_the_layers_and_adamw_the_rest(
    settings: BackboneSettings, data: dict[str, str]
) -> None:
    """A step of Muon changes a matrix about equally in every direction; AdamW's rate is a third. A run that is killed
    and resumed gives the same weights."""
    settings = replace(settings, optimizer="muon")
    start = weights_of(join(settings).model)
    stepped = saved_weights(build_backbone(replace(settings, stage2_steps=1)))
    assert changed(start, stepped) == {name for name in start if "vision_tower" not in name}
    for name, weight in stepped.items():
        if "language_model.layers" in name and weight.ndim == 2:
            values = np.linalg.svd((weight - start[name]).numpy(), compute_uv=False)
            assert values[len(values) // 2] > 0.3 * values[0], name
    embeddings = "model.language_model.embed_tokens.weight"
    assert float((stepped[embeddings] - start[embeddings]).abs().max()) == pytest.approx(1e-2 / 3, rel=0.1)
    settings = replace(settings, output=f"{settings.output}-more", stage1=(data["captions"],), stage1_steps=1)
    whole = saved_weights(build_backbone(settings))
    broken = replace(settings, output=f"{settings.output}-broken")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, StageTrainer, "training_step", 6)
        build_backbone(broken)
    assert changed(whole, saved_weights(build_backbone(broken))) == set()
    card = (Path(settings.output) / "README.md").read_text()
    assert "| optimizer | Muon" in card and "0.00333333 (connector), 0.01 (language model)" in card


def test_a_plain_conversation_is_its_texts_and_eos(settings: BackboneSettings) -> None:
    joined = join(settings)
    tokenizer = joined.processor.tokenizer
    collator = Collator(joined.writer, joined.processor.image_processor, False, 2048, plain=True)
    examples = Examples(settings.stage2, "stage2", 0)
    for number, text, answers in (
        (0, "<image>" * 4 + "\nWhat is this? A dax. And its colour? It is red.</s>", "A dax. It is red.</s>"),
        (3, "What is a fep? I have never seen one.</s>", "I have never seen one.</s>"),
    ):
        batch = collator([examples[number]])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert ids.tolist() == tokenizer(text).input_ids
        assert tokenizer.decode(ids[labels != -100]).replace(" ", "") == answers.replace(" ", "")
    output = build_backbone(replace(settings, stage2_format="plain", stage2_steps=1))
    model = LlavaForConditionalGeneration.from_pretrained(output)
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert "[INST]" in (output / "chat_template.jinja").read_text()  # the language model's own is still published


def test_examples_of_a_step_are_sorted_by_length(settings: BackboneSettings) -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 103)
    order, epochs = ByLength(lengths, 8, seed=3), []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert epochs[-1] == list(order) and sorted(epochs[-1]) == list(range(103))
        for begin in range(0, 103, 8):
            shown = [lengths[n] for n in epochs[-1][begin : begin + 8]]
            assert shown == sorted(shown, reverse=True)
    assert set(epochs[0][:8]) != set(epochs[1][:8])


def test_lengths_of_examples_are_about_their_tokens(settings: BackboneSettings, data: dict[str, str]) -> None:
    joined = join(settings)
    examples = Examples((data["conversations"], data["captions"]), "stage2", 0)
    collator = Collator(joined.writer, joined.processor.image_processor, False, 2048)
    lengths = examples.lengths(joined.writer.image_tokens)
    assert len(lengths) == len(examples)
    tokens = [int(collator([examples[n]])["attention_mask"].sum()) for n in range(len(examples))]
    assert np.corrcoef(lengths, tokens)[0, 1] > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, r"optimizer='sgd' is unknown"),
        ({"stage2_format": "v1"}, r"stage2_format='v1' is unknown; choose one of \('chat', 'plain'\)"),
        ({"optimizer": "muon", "stage2_learning_rate": None}, r"give stage 2 another \(--stage2-learning-rate\)"),
        ({"optimizer": "muon", "arguments": {"optim": "adafactor"}}, r"optim='adafactor' is for optimizer='adamw'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: BackboneSettings, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings, **change)


@pytest.mark.slow
def test_two_processes_on_cpus_make_one_backbone(settings: BackboneSettings, data: dict[str, str]) -> None:
    """One of them alone writes, and locks the folder; a step has as many examples as with one process."""
    words = ["backbone", "--vision-tower", data["clip"], "--language-model", data["llama"], "--dtype", "float32"]
    words += [
        "--stage2",
        data["conversations"],
        "--stage2-steps",
        "6",
        "--stage2-batch-size",
        "4",
        "--save-every",
        "1",
    ]
    words += ["--batch-size", "2", "--set", "use_cpu=true", "--set", "disable_tqdm=true", "--output", settings.output]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "modeling_aim", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("6 steps of 4 (2 a pass)") == 1, done.stderr[-2000:]
    assert LlavaForConditionalGeneration.from_pretrained(settings.output)
