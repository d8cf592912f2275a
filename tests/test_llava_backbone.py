"""`aim backbone`: a stock LLaVA from a tiny vision tower and a tiny language model, in two stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llava_parts
import pytest
import torch
import transformers as hf
from backbones import picture
from families import QWEN_SPECIAL, make_tokenizer, text_settings
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration
from modeling_aim.checks import PROPERTIES, check_model, run_checks
from modeling_aim.cli import app
from modeling_aim.llava import BackboneSettings, build_backbone
from modeling_aim.llava import build as building
from modeling_aim.llava.chat import V1, ChatWriter, accept_images
from modeling_aim.llava.data import Collator, Examples
from modeling_aim.llava.parts import join
from modeling_aim.llava.stages import StageTrainer, run_stage, stages_of

TOWERS = {"clip": llava_parts.save_clip, "siglip": llava_parts.save_siglip}
MODELS = {"llama": llava_parts.save_llama, "qwen": llava_parts.save_qwen, "qwen3": llava_parts.save_qwen3}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of towers and language models, and specs of captions and conversations."""
    folder = tmp_path_factory.mktemp("parts")
    saved = {name: save(folder / name) for name, save in (TOWERS | MODELS).items()}
    captions, conversations = llava_parts.save_data(folder / "data")
    return {**saved, "captions": captions, "conversations": conversations, "folder": str(folder)}


@pytest.fixture
def settings(parts: dict[str, str], tmp_path: Path) -> BackboneSettings:
    """Two steps of each stage, of CLIP and Llama."""
    return BackboneSettings(
        vision_tower=parts["clip"], language_model=parts["llama"], output=str(tmp_path / "out"),
        stage1=(parts["captions"],), stage2=(parts["conversations"],), dtype="float32", batch_size=2,
        stage1_batch_size=4, stage2_batch_size=4, stage2_learning_rate=1e-3, save_every=1, log_every=1,
        arguments={"use_cpu": True, "disable_tqdm": True},
    )  # fmt: skip


def weights_of(model: Any) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(before: Weights, after: Weights) -> set[str]:
    """Names of the weights that are not the same."""
    return {name for name, weight in before.items() if not torch.equal(weight.float(), after[name].float())}


def saved_weights(folder: Path) -> Weights:
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return weights_of(model)


@pytest.mark.parametrize(
    ("tower", "model"),
    [
        ("clip", "llama"),
        ("siglip", "qwen"),
        pytest.param("clip", "qwen3", marks=pytest.mark.slow),
        pytest.param("siglip", "llama", marks=pytest.mark.slow),
    ],
)
def test_what_comes_out_passes_aim_check(
    parts: dict[str, str], settings: BackboneSettings, tower: str, model: str
) -> None:
    """Widths differ: 32 (CLIP) and 48 (SigLIP) of the tower, 64 of the language model."""
    output = build_backbone(replace(settings, vision_tower=parts[tower], language_model=parts[model], stage2=()))
    results = list(run_checks(check_model(str(output))))
    assert len(results) >= len(PROPERTIES) - 3
    assert [(sentence, problem) for sentence, problem in results if problem] == []
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["vision_feature_select_strategy"] == {"clip": "default", "siglip": "full"}[tower]
    processor = AutoProcessor.from_pretrained(output)
    assert type(processor).__name__ == "LlavaProcessor" and processor.tokenizer.pad_token is not None


def test_stage_1_trains_the_connector_and_stage_2_never_the_vision_tower(settings: BackboneSettings) -> None:
    joined = join(settings)
    first, second = stages_of(settings)
    start = weights_of(joined.model)
    connector = {name for name in start if "multi_modal_projector" in name}
    run_stage(joined, first, Examples(first.specs, "stage1", 0), settings)
    middle = weights_of(joined.model)
    assert changed(start, middle) == connector and len(connector) == 4
    run_stage(joined, second, Examples(second.specs, "stage2", 0), settings)
    moved = changed(middle, weights_of(joined.model))
    assert connector < moved and not any("vision_tower" in name for name in moved)
    assert {name.split(".")[1] for name in moved - connector} == {"language_model", "weight"}  # the head too


@pytest.mark.parametrize(
    ("model", "lead", "end"), [("llama", " ", " </s>"), ("qwen", "", "<|im_end|>"), ("qwen3", "", "<|im_end|>")]
)
def test_the_loss_counts_the_tokens_of_answers_alone(
    parts: dict[str, str], settings: BackboneSettings, model: str, lead: str, end: str
) -> None:
    """With the token that ends an answer; captions with the line break that ends theirs."""
    joined = join(replace(settings, language_model=parts[model]))
    tokenizer, images = joined.processor.tokenizer, joined.processor.image_processor
    for option, captions in (("stage1", True), ("stage2", False)):
        examples = Examples((parts["captions" if captions else "conversations"],), option, 0)
        for number in range(4):
            batch = Collator(joined.writer, images, captions, 2048)([examples[number]])
            ids, labels = batch["input_ids"][0], batch["labels"][0]
            answers = [answer for _, answer in examples[number].turns]
            expected = f"{answers[0]}\n" if captions else "".join(lead + answer + end for answer in answers)
            assert tokenizer.decode(ids[labels != -100]) == expected
            assert torch.equal(labels[labels != -100], ids[labels != -100])
            shown = int((ids == joined.model.config.image_token_id).sum())
            assert shown == 4 * len(examples[number].images)  # patches of 14 in 28 x 28 pixels
            assert ("pixel_values" in batch) == bool(examples[number].images)
            question = tokenizer.decode(ids[labels == -100])
            assert (examples[number].turns[0][0].replace("<image>", "").strip() in question) != captions


TEMPLATES = {
    "strings": (llava_parts.LLAMA_CHAT, "<s>"),
    "strings, no BOS": (llava_parts.QWEN2_CHAT, None),
    "strings and parts": (llava_parts.QWEN3_CHAT, None),
    "v1": (V1, "<s>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_takes_images_and_writes_what_training_reads(name: str, tmp_path: Path) -> None:
    template, bos = TEMPLATES[name]
    tokenizer = make_tokenizer(["<image>", *QWEN_SPECIAL], bos)
    tokenizer.chat_template = accept_images(tokenizer, template, "<image>")
    turns = [("<image>\nWhat is it?", "A dax."), ("Is it {{ red }}?", "No, <b>blue</b>.")]
    chat = []
    for place, (asked, answer) in enumerate(turns):
        text = {"type": "text", "text": asked.removeprefix("<image>\n")}
        content = [{"type": "image"}, text] if place == 0 else [text]
        chat += [{"role": "user", "content": content}]
        chat += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    written = ChatWriter(tokenizer, "<image>", 1).conversation(turns)
    assert written.text == tokenizer.apply_chat_template(chat, tokenize=False)
    assert written.text.count("<image>\nWhat is it?") == 1 and len(written.spans) == 2
    prompt = tokenizer.apply_chat_template(chat[:3], tokenize=False, add_generation_prompt=True)
    assert written.text[: written.spans[1][0]] == prompt  # what is scored begins where an answer is asked for
    strings = [{"role": turn["role"], "content": turn["content"][-1]["text"]} for turn in chat[2:]]
    again = tokenizer.apply_chat_template(strings, chat_template=template, tokenize=False)
    assert tokenizer.apply_chat_template(strings, tokenize=False) == again  # and strings as before
    tokenizer.save_pretrained(tmp_path)
    assert hf.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False) == written.text


class Killed(BaseException):
    """Ends a run as a kill does, without any clean-up of its own."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """End the process' work at a call of a function."""
    real, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def test_killed_and_resumed_gives_the_same_weights_and_lora_is_merged(
    settings: BackboneSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in stage 1, in stage 2 and while the repository is written; LoRA draws dropout at every step."""
    settings = replace(settings, lora_rank=4, vision_tower=settings.vision_tower)
    whole = saved_weights(build_backbone(settings))
    assert not any("lora" in name for name in whole)
    broken = replace(settings, output=str(tmp_path / "broken"))
    output = Path(broken.output)
    for owner, name, call in ((StageTrainer, "training_step", 4), (StageTrainer, "training_step", 6),
                              (building, "draw_losses", 1)):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, owner, name, call)
            build_backbone(broken)
        assert not (output / "config.json").exists() and not (output / "README.md").exists()
    capsys.readouterr()
    build_backbone(broken)
    assert capsys.readouterr().err.count("is finished; its weights are taken") == 2
    assert changed(whole, saved_weights(output)) == set()
    assert not list(output.glob("stage*")) and (output / "loss.png").stat().st_size > 1000
    card = (output / "README.md").read_text()
    assert "LoRA of rank 4" in card and "`llava:captions.json,images=images`" in card and str(tmp_path) not in card
    assert build_backbone(broken) == output  # finished: nothing is done again
    with pytest.raises(ValueError, match="lora_rank was 4, is 8"):
        build_backbone(replace(broken, lora_rank=8))


def test_merged_lora_answers_as_it_was_trained(settings: BackboneSettings) -> None:
    settings = replace(settings, lora_rank=4, stage1=())
    (stage,) = stages_of(settings)
    joined = join(settings)
    examples = Examples(stage.specs, "stage2", 0)
    model = run_stage(joined, stage, examples, replace(settings, output=f"{settings.output}-unmerged")).eval()
    batch = Collator(joined.writer, joined.processor.image_processor, False, 2048)([examples[0]])
    batch.pop("skipped")
    with torch.no_grad():
        expected = model(**batch).logits
    merged = saved_weights(build_backbone(settings))
    stock = LlavaForConditionalGeneration.from_pretrained(settings.output).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, expected, rtol=1e-3, atol=1e-4)
    start = weights_of(join(settings).model)
    moved = changed(start, merged)
    assert moved and all("proj" in name for name in moved)  # the decoder's linear layers and the connector


def test_4_bit_lora_is_merged_into_the_published_weights(parts: dict[str, str], settings: BackboneSettings) -> None:
    settings = replace(settings, lora_rank=4, load_in_4bit=True, stage2_steps=1, stage1=(), dtype="bfloat16")
    merged = saved_weights(build_backbone(settings))
    published = weights_of(join(settings).model)
    moved = changed(published, merged)
    decoder = {name for name in moved if "language_model" in name}
    assert len(decoder) == 3 * 7 and not any("vision_tower" in name for name in moved)
    for name in decoder:  # a step of LoRA, and no rounding to 4 bits
        assert float((published[name] - merged[name]).abs().max()) < 0.02 * float(published[name].abs().max())


def test_aim_reads_a_llava_whose_image_processor_has_no_crop_size(settings: BackboneSettings, parts: Any) -> None:
    """As SigLIP's is in published LLaVAs; LLaVA's processor cannot say there how many tokens an image has."""
    joined = join(replace(settings, vision_tower=parts["siglip"]))
    joined.processor.image_processor.crop_size = None
    model = AimForConditionalGeneration.from_backbone(joined.model, joined.processor)
    fused = model.read([(picture(0), "a dax")])
    assert fused.lengths[0] > 0


def test_a_whole_clip_checkpoint_gives_its_vision_half(
    parts: dict[str, str], settings: BackboneSettings, tmp_path: Path
) -> None:
    whole = join(replace(settings, vision_tower=llava_parts.save_clip(tmp_path / "clip", whole=True)))
    model = hf.CLIPModel.from_pretrained(tmp_path / "clip")
    expected = weights_of(model.vision_model)
    tower = getattr(whole.vision_tower, "vision_model", whole.vision_tower)  # releases before 5.23 have one class more
    assert changed(expected, weights_of(tower)) == set()


def test_what_cannot_be_read_is_left_out_and_counted(
    parts: dict[str, str], settings: BackboneSettings, tmp_path: Path
) -> None:
    llava_parts.save_data(tmp_path / "data", 12)
    (tmp_path / "data" / "images" / "0.png").write_bytes(b"no image")
    path = tmp_path / "data" / "conversations.json"
    rows = json.loads(path.read_text())
    rows[1]["conversations"][0]["value"] = "<image><image> Two?"
    rows[2]["conversations"][1]["value"] = "An <image>."
    path.write_text(json.dumps([*rows, {"id": "x"}, {"conversations": [{"from": "human", "value": "Hm?"}]}]))
    spec = f"llava:{path},images={tmp_path / 'data' / 'images'}"
    output = build_backbone(replace(settings, stage1=(), stage2=(spec,)))
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    last = [row for row in log if "loss" in row][-1]
    assert last["skipped/conversation with other images than image tokens"] == 2
    assert last["skipped/unreadable or missing image"] == 1
    assert (
        "record without a conversation: 1, turn without its question or answer: 1"
        in (output / "README.md").read_text()
    )


# --- errors


def _rewritten(parts: dict[str, str], folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Conversations with each record changed."""
    source = Path(parts["folder"]) / "data" / "conversations.json"
    rows = json.loads(source.read_text())
    for row in rows:
        change(row)
    path = folder / "rewritten.json"
    path.write_text(json.dumps(rows))
    return f"llava:{path},images={source.parent / 'images'}"


def _no_answers(row: dict[str, Any]) -> None:
    row["conversations"] = row["conversations"][::2]


def _empty_answers(row: dict[str, Any]) -> None:
    for turn in row["conversations"][1::2]:
        turn["value"] = ""


def _other_place(row: dict[str, Any]) -> None:
    row["image"] = "elsewhere.png"


def _no_image(row: dict[str, Any]) -> None:
    row["image"] = "../conversations.json"


def _without_template(parts: dict[str, str], folder: Path) -> str:
    llava_parts.save_llama(folder)
    hf.AutoTokenizer.from_pretrained(folder)
    make_tokenizer([], "<s>").save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return str(folder)


def _bert(parts: dict[str, str], folder: Path) -> str:
    tokenizer = make_tokenizer([], "<s>", llava_parts.LLAMA_CHAT)
    sizes = {name: value for name, value in text_settings(tokenizer).items() if name != "num_key_value_heads"}
    hf.BertLMHeadModel(hf.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _t5(parts: dict[str, str], folder: Path) -> str:
    hf.T5Config().save_pretrained(folder)
    return str(folder)


def _other_size(parts: dict[str, str], folder: Path) -> str:
    size = {"height": 56, "width": 56}
    hf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)
    return str(folder)


def _biased(parts: dict[str, str], folder: Path) -> str:
    """Its head has a bias, for which LLaVA's class has no place."""
    tokenizer = make_tokenizer([], "<s>", llava_parts.LLAMA_CHAT)
    sizes = {name: value for name, value in text_settings(tokenizer).items() if name != "num_key_value_heads"}
    model = hf.PhiForCausalLM(hf.PhiConfig(**sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ERRORS: dict[str, tuple[str, Callable[[dict[str, str], Path], Any], str]] = {
    "no chat template": ("language_model", _without_template, r"no chat template.*--chat-template v1"),
    "an encoder": ("language_model", _bert, r"no causal language model: it is a bert model.*come later"),
    "an encoder-decoder": ("language_model", _t5, r"no causal language model: it is a t5 model"),
    "a head with a bias": ("language_model", _biased, r"LLaVA's class does not compute what PhiForCausalLM does"),
    "no model": ("language_model", lambda parts, f: str(f / "no"), r"does not exist. Give a folder, or a Hub id"),
    "a tower of text": ("vision_tower", lambda parts, f: parts["llama"], r"has no image encoder: it is a llama model"),
    "another image size": ("image_processor", _other_size, r"makes images of 56 x 56 pixels, but .* takes 28 x 28"),
    "no image processor": ("image_processor", lambda parts, f: parts["llama"], r"has no image processor"),
    "no layer": ("vision_feature_layer", lambda parts, f: -9, r"vision_feature_layer=-9: .* the states of 3 layers"),
    "no answers": ("stage2", lambda p, f: _rewritten(p, f, _no_answers), r"stage2 .* holds nothing to train on.*: 10"),
    "empty answers": ("stage2", lambda p, f: _rewritten(p, f, _empty_answers), r"stage2: no answer in 8 "),
    "no images": ("stage2", lambda p, f: _rewritten(p, f, _other_place), r"8 of 8 images .*elsewhere.png"),
    "files that are no images": (
        "stage2", lambda p, f: _rewritten(p, f, _no_image), r"stage2: none of 8 examples .* missing image: 8"
    ),
    "another kind": ("stage1", lambda parts, f: "lcl:x.json", r"lcl:x.json"),
    "no file": ("stage1", lambda parts, f: f"llava:{f / 'no.json'}", r"no.json"),
    "4-bit alone": ("load_in_4bit", lambda parts, f: True, r"load_in_4bit .* is for LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_work_is_said_before_training(
    parts: dict[str, str], settings: BackboneSettings, case: str, tmp_path: Path
) -> None:
    name, make, message = ERRORS[case]
    (tmp_path / "given").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        build_backbone(replace(settings, **{name: make(parts, tmp_path / "given")}))
    assert not (Path(settings.output) / "config.json").exists()


def test_the_command_takes_lists_and_says_errors_in_one_line(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "5000")
    words = ["backbone", "--vision-tower", parts["clip"], "--language-model", parts["llama"], "--dtype", "float32"]
    words += ["--stage1", parts["captions"]]
    words += ["--set", "use_cpu=true", "--set", "disable_tqdm=true"]
    done = CliRunner().invoke(app, [*words, "--stage1-steps", "1", "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "Stage 1 trains the connector: 6,272 of" in done.stderr and "step 1 of 1: loss" in done.stderr
    done = CliRunner().invoke(app, [*words, "--stage1-steps", "2", "--output", str(tmp_path / "out")])
    lines = [line for line in done.stderr.splitlines() if line.startswith("aim backbone:")]
    assert done.exit_code == 1 and len(lines) == 1 and "stage1_steps was 1, is 2" in lines[0]
