"""Demonstrations for vLLM: transformers, assembling a prompt as vLLM does, gives the logits of `generate(demos=)`.

vLLM renders the chat with one sentinel token for each part, expands sentinels and image placeholders, counts both as
its M-RoPE does (a sentinel is text), and puts the embeddings in their places.
"""

from __future__ import annotations

import base64
import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, picture, plugin
from families import FAMILIES, MORE_FAMILIES
from typer.testing import CliRunner

from modeling_aim import DemonstrationBank
from modeling_aim.cli import app
from modeling_aim.serving.vllm import SENTINEL, SERVED, begins_with_bos, chat_message, chat_template, check_exportable

QUESTION = "What is this?"
GOLDEN = Path(__file__).parent / "golden_vllm_chat.json"
QUERY = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}


def tensors_of(message: dict[str, Any]) -> list[torch.Tensor]:
    """The embeddings of a message, as a server decodes them."""
    data = [base64.b64decode(part["data"]) for part in message["content"]]
    return [torch.load(io.BytesIO(one), weights_only=True) for one in data]


def rendered_as_vllm(message: dict[str, Any]) -> dict[str, Any]:
    """A message as the chat template gets it: a text with the sentinel for each part with embeddings."""
    parts = [{"type": "text", "text": SENTINEL} for part in message["content"] if part["type"] == "prompt_embeds"]
    return {"role": message["role"], "name": message["name"], "content": parts}


def assembled(aim: Plugin, message: dict[str, Any], template: str) -> dict[str, Any]:
    """What vLLM gives to the decoder: embeddings and positions."""
    tensors = tensors_of(message)
    inner = copy.deepcopy(aim.processor.processor)
    inner.tokenizer.add_special_tokens({"additional_special_tokens": [SENTINEL]}, replace_extra_special_tokens=False)
    [sentinel] = inner.tokenizer.encode(SENTINEL, add_special_tokens=False)
    text = inner.apply_chat_template(
        [rendered_as_vllm(message), QUERY], chat_template=template, add_generation_prompt=True
    )
    inputs = inner(images=[picture(9)], text=[text], return_tensors="pt", add_special_tokens=False)
    lengths = iter(len(tensor) for tensor in tensors)
    expanded = [one for i in inputs["input_ids"][0].tolist() for one in [i] * (next(lengths) if i == sentinel else 1)]
    ids = torch.tensor([expanded])
    fused, backbone = ids == sentinel, aim.backbone
    ids[fused] = 0  # text, of whatever word
    embeddings = backbone.get_input_embeddings()(ids)
    pictures = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    features = backbone.model.get_image_features(**pictures)
    features = getattr(features, "pooler_output", features)
    embeddings[ids == backbone.config.image_token_id] = torch.cat([part.reshape(-1, 64) for part in features])
    embeddings[fused] = torch.cat(tensors)
    if "image_grid_thw" not in inputs:
        return {"inputs_embeds": embeddings}
    kinds = (ids == backbone.config.image_token_id).int()
    positions, _ = backbone.model.get_rope_index(ids, kinds, image_grid_thw=inputs["image_grid_thw"])
    return {"inputs_embeds": embeddings, "position_ids": positions}


@pytest.mark.parametrize("family", SERVED)
def test_logits_are_those_of_generate(family: str) -> None:
    aim = plugin(family, preset="paper")
    demos = [demo for demo in DEMOS if not (isinstance(demo, dict) and "images" in demo)]
    fused = aim.model.read(demos)
    template = chat_template(aim.processor, begins_with_bos(aim.model))
    message = json.loads(json.dumps(chat_message(fused)))
    with torch.no_grad():
        found = aim.backbone(**assembled(aim, message, template)).logits[0, -1]
    scores = aim.model.generate(
        **aim.query(), demos=fused, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(found, scores.logits[0][0], rtol=1e-4, atol=1e-4)
    without = aim.model.generate(
        **aim.query(), max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert not torch.allclose(found, without.logits[0][0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", SERVED)
def test_the_template_changes_nothing_else(family: str) -> None:
    """A chat without demonstrations is rendered as before; one with them, and a system turn, as before behind them."""
    aim = plugin(family, preset="paper")
    inner, system = aim.processor.processor, {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    template = chat_template(aim.processor, begins_with_bos(aim.model))
    message = rendered_as_vllm(chat_message(aim.model.read(DEMOS[:2])))
    bos = "<s>" if family == "llava" else ""
    for chat in ([QUERY], [system, QUERY]):
        own = inner.apply_chat_template(chat, add_generation_prompt=True)
        assert inner.apply_chat_template(chat, chat_template=template, add_generation_prompt=True) == own
        shown = inner.apply_chat_template([message, *chat], chat_template=template, add_generation_prompt=True)
        assert shown == bos + SENTINEL * 2 + own
    joined = {**message, "content": "\n".join([SENTINEL] * 2)}  # `--chat-template-content-format string`
    shown = inner.apply_chat_template([joined, QUERY], chat_template=template, add_generation_prompt=True)
    assert shown == bos + SENTINEL * 2 + inner.apply_chat_template([QUERY], add_generation_prompt=True)


def test_a_template_that_writes_bos_itself_writes_it_once() -> None:
    aim = plugin("llava", preset="paper")
    aim.processor.chat_template = "{{ bos_token }}" + aim.processor.chat_template
    template = chat_template(aim.processor, True)
    message = rendered_as_vllm(chat_message(aim.model.read(DEMOS[:1])))
    shown = aim.processor.processor.apply_chat_template([message, QUERY], chat_template=template)
    assert shown.startswith("<s>" + SENTINEL + "USER") and shown.count("<s>") == 1
    aim.processor.chat_template = "### " + aim.processor.chat_template
    with pytest.raises(ValueError, match="cannot be extended"):
        chat_template(aim.processor, True)
    aim.processor.chat_template = aim.processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_template(aim.processor, True)


@pytest.mark.parametrize("family", [name for name in {**FAMILIES, **MORE_FAMILIES} if name not in SERVED])
def test_other_backbones_are_refused_with_the_reason(family: str) -> None:
    reason = {"qwen3_vl": "several of its layers", "idefics": "cross-attention"}.get(family, "vLLM")
    with pytest.raises(ValueError, match=f"of a {family} backbone cannot be given to vLLM: .*{reason}.*aim serve"):
        check_exportable(plugin(family, preset="paper").model)


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    aim = plugin("llava", preset="paper")
    aim.model.save_pretrained(tmp_path / "repo", include_backbone=True)
    bank = DemonstrationBank.build(
        aim.model, [(picture(0), "dax"), (picture(1), "a blue wug is here.")], tmp_path / "bank"
    )
    arguments = ["export-chat", "--repo", str(tmp_path / "repo"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--bank", str(tmp_path / "bank")])
    assert done.exit_code == 0, done.output
    assert "2 demonstrations" in done.output and "--enable-prompt-embeds" in done.output
    message = json.loads((tmp_path / "out" / "demonstrations.json").read_text())
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    tensors = tensors_of(message)
    assert all(torch.equal(found, wanted.vectors) for found, wanted in zip(tensors, bank, strict=True))
    for part, tensor in zip(message["content"], tensors, strict=True):
        part["data"] = f"{tensor.dtype} {tuple(tensor.shape)}"
    assert {"message": message, "chat_template": template} == json.loads(GOLDEN.read_text())
    (tmp_path / "demos.jsonl").write_text('{"text": "A sentence."}\n{"label": "dax"}\n')
    done = CliRunner().invoke(app, [*arguments, "--demos", str(tmp_path / "demos.jsonl"), "--shots", "1"])
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "out" / "demonstrations.json").read_text())["content"]) == 1
    for more, wanted in (
        (["--bank", "a", "--demos", "b"], "one of them"), ([], "one of them"),
        (["--bank", str(tmp_path / "bank"), "--shots", "3"], "bank that has 2"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, [*arguments, *more])
        assert done.exit_code == 1 and wanted in " ".join(done.output.split()), done.output


def test_states_at_depth_are_refused(llava: Plugin) -> None:
    with pytest.raises(ValueError, match=r"enter at the depths \[1\] of the decoder.*--entry-layers 0"):
        check_exportable(llava.model)
