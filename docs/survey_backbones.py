"""Which backbones AIM works with, for every class that AutoModelForImageTextToText maps; writes docs/BACKBONES.md.

    python docs/survey_backbones.py                    # all of them, some minutes
    python docs/survey_backbones.py internvl kosmos-2  # some, printed only

A model type "works" when a tiny random model of its real class, with its real processor, has passed the properties
of `aim check`. Of the others, the text decoder is made small and the rest shallow, and the model answers a prompt of
words with fused tokens before it: it "answers text", and nothing has been shown about images. Where that cannot be
made from its default configuration, the class is built without weights and asked for what AIM needs: "by
construction".
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

from modeling_aim import AimForConditionalGeneration, FusedDemonstrations
from modeling_aim.backbone_aim import check_depth, decoder_layers, why_not
from modeling_aim.checks import PROPERTIES, run_checks
from modeling_aim.checks.run import without_training
from modeling_aim.reading_aim import read_hidden_states

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import families  # noqa: E402
import further_families  # noqa: E402
import more_families  # noqa: E402
import popular_families  # noqa: E402
import timm_families  # noqa: E402
from backbones import build  # noqa: E402

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 1,  # of their full size, which the sections of rotary positions add up to
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
}
WHY = {  # what the backbone itself, without AIM, does otherwise; tried on it alone
    "blip-2": "the model takes no prompt without an image",
    "emu3": "images of a batch are padded to one size, and padding changes the tokens they become",
    "fuyu": "its processor takes one image a prompt",
    "gemma3n": "its decoder layers hand on several streams of states, of which no inner layer is read",
    "minimax_m3_vl": "padding moves its blocks of keys: once there are more than it chooses, a row of a padded batch "
    "differs from the row alone",
    "perception_lm": "its processor takes no images with different numbers of tiles at once",
}
UNTRAINED = {  # why not, in the words of a reader of the table
    "gemma3n": "several streams of states between its layers; with a trained projector at the input, as in the paper",
}
LENGTH, FUSED = 9, 4  # of the words of the prompt, and of the fused tokens before them


def survey(model_type: str) -> tuple[str, str, str]:
    """How far AIM goes with a model type, whether it does so without training, and a remark."""
    if model_type in families.FAMILIES:
        try:
            return run_properties(model_type)
        except ImportError as error:
            return "not known", "not known", f"it needs the package {missing_package(error)}, not installed here"
    try:
        config = CONFIG_MAPPING[model_type]()
        with torch.device("meta"):
            model = model_class(config)._from_config(config)
        reason = why_not(model)
        if reason is not None:
            return "cannot", "no", reason
    except Exception as error:
        package = missing_package(error)
        if package is not None:
            return "not known", "not known", f"it needs the package {package}, not installed here"
        return "not known", "not known", f"its default configuration does not build: {in_short(error)}"
    try:
        check_depth(model)
        depth, layers = "by construction", f"{len(decoder_layers(model))} decoder layers"
    except ValueError as error:
        depth, layers = f"no: {in_short(error)}", "no decoder layers that can be told apart"
    try:
        return "answers text", answer_text(model_type), "no processor was tried"
    except NotAnswered as error:
        return "cannot", "no", str(error)
    except Exception as error:
        package = missing_package(error)
        if package is not None:
            return "by construction", depth, f"{layers}; to run, it needs the package {package}, not installed here"
        return "by construction", depth, f"{layers}; not run, as no small model was made: {in_short(error)}"


def run_properties(model_type: str) -> tuple[str, str, str]:
    """The properties of `aim check` on a tiny model of its real class with its real processor."""
    backbone = build(model_type)
    results = dict(run_checks(without_training(backbone.model, backbone.processor, {})))
    problem = results[PROPERTIES["without_training"].sentence]
    untrained = "yes" if problem is None else f"no: {problem}"
    if model_type in UNTRAINED:
        untrained = f"no: {UNTRAINED[model_type]}"
    failed = [f"{statement} ({problem})" for statement, problem in results.items() if problem is not None]
    said = PROPERTIES["without_training"].sentence  # it has a column of its own
    remark = f"{len(results) - len(failed)} of {len(results)} properties"
    if len(failed) == len(results):
        return "cannot", "no", failed[0]
    remark += "".join(f"; not: {text}" for text in failed if not text.startswith(said))
    return "works", untrained, remark + (f"; the backbone itself: {WHY[model_type]}" if model_type in WHY else "")


class NotAnswered(Exception):
    """A small model was made, and it does not answer with fused tokens; why."""


def answer_text(model_type: str) -> str:
    """A small random model reads and answers words, without images; whether it does so without training.

    Raises:
        NotAnswered: it does neither with states put back at depth nor with fused tokens at the input.
    """
    config = small(CONFIG_MAPPING[model_type]())
    torch.manual_seed(0)
    backbone = model_class(config)._from_config(config).eval()
    backbone.generation_config.eos_token_id = None
    backbone.generation_config.pad_token_id = 0
    ids = torch.arange(20, 20 + LENGTH)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    backbone.generate(**inputs, do_sample=False, max_new_tokens=3)  # what fails here has nothing to do with AIM
    try:
        answer_words(AimForConditionalGeneration.from_backbone(backbone), inputs)
        return "yes, with words; images were not tried"
    except Exception as error:
        reason = in_short(error)
    try:
        answer_words(AimForConditionalGeneration.from_backbone(backbone, preset="paper"), inputs)
    except Exception as error:
        raise NotAnswered(in_short(error)) from error
    return f"no: {reason}"


def answer_words(model: AimForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> None:
    """Raise unless the model reads words, and answers with fused tokens that are not the same for others."""
    ids = inputs["input_ids"]
    states = read_hidden_states(model.backbone, inputs, model.config.read_layers)
    width = len(model.config.read_layers) * model.config.get_text_config().hidden_size
    if states.shape != (1, LENGTH, width):
        raise ValueError(f"{LENGTH} tokens are read as hidden states of the shape {tuple(states.shape)}.")
    size = model.config.projector_norm if model.config.entry_layers == [0] else float(states.norm(dim=-1).mean())
    options = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for _ in range(2):
        vectors = size * torch.nn.functional.normalize(torch.randn(FUSED, width), dim=-1)
        demos = FusedDemonstrations(vectors, (FUSED,), ids[0, :FUSED], source=model.source)
        found.append(model.generate(**inputs, demos=demos, **options))
    if found[0].sequences.shape != (1, LENGTH + 3) or not torch.equal(found[0].sequences[:, :LENGTH], ids):
        raise ValueError("what it generates does not start with the prompt.")
    if torch.allclose(found[0].logits[0], found[1].logits[0], atol=1e-6):
        raise ValueError("other fused tokens give the same answer.")


def model_class(config: Any) -> Any:
    """The class that AutoModelForImageTextToText makes of a configuration."""
    found = CLASSES[type(config)]
    return found[0] if isinstance(found, tuple) else found


def small(config: Any) -> Any:
    """`config` with a small text decoder, and few layers everywhere."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))
    for part in (getattr(config, name) for name in config.sub_configs):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 1)
    for name, value in SMALL.items():
        try:
            if isinstance(getattr(text, name, None), int):
                setattr(text, name, value)
        except Exception:
            continue  # it has a value for each layer
    text.num_hidden_layers = max(2, len(kinds))
    if kinds:
        text.layer_types = kinds if len(kinds) > 1 else 2 * kinds
    return config


def missing_package(error: Exception) -> str | None:
    """The package that is not installed, where an error says so: Python's own, or transformers'."""
    if not isinstance(error, ImportError):
        return None
    asked = re.search(r"requires the (\S+) library", str(error))
    return asked[1] if asked else error.name


def in_short(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    words = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {words}"[:160].replace("|", "\\|")


def main(chosen: list[str]) -> None:
    """Survey the model types `chosen`, or all and write the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("modeling_aim").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for some in (more_families, popular_families, further_families, timm_families):
        families.FAMILIES.update(some.BUILDERS)
    families.FAMILIES.update(families.MORE_FAMILIES)
    rows = []
    for model_type in chosen or NAMES:
        status, untrained, remark = survey(model_type)
        rows.append((status, model_type, untrained.replace("|", "\\|"), remark))
        print(f"{model_type}: {status}; without training: {untrained}; {remark}", flush=True)
    if not chosen:
        write_table(rows)


def write_table(rows: list[tuple[str, str, str, str]]) -> None:
    """Write docs/BACKBONES.md from status, model type, what holds without training and remark of each."""
    order = ["works", "answers text", "by construction", "not known", "cannot"]
    rows = sorted(rows, key=lambda row: (order.index(row[0]), row[1]))
    lines = [f"| `{name}` | {status} | {untrained} | {remark} |" for status, name, untrained, remark in rows]
    counts = ", ".join(f"{sum(row[0] == status for row in rows)} {status}" for status in order)
    (ROOT / "docs" / "BACKBONES.md").write_text(
        "# Which backbones AIM works with\n\n"
        f"All that AutoModelForImageTextToText maps in transformers {transformers.__version__}: {counts}. "
        "Made by `python docs/survey_backbones.py`; your own backbone is tried by `aim check BACKBONE`.\n\n"
        "| | |\n|---|---|\n"
        "| works | a tiny random model of the real class, with its processor, has the properties of `aim check` |\n"
        "| answers text | a small random model reads words and answers with fused tokens; images were not tried |\n"
        "| by construction | the class has what AIM needs; nothing was run |\n"
        "| not known | transformers cannot build it from its default configuration |\n"
        "| cannot | for the reason given |\n\n"
        "**Without training**: states put back at the depth where they were read change the answer, and so do their "
        "images. *By construction* there: the decoder has a stack of layers; nothing was run.\n\n"
        "| model type | AIM | without training | remark |\n|---|---|---|---|\n" + "\n".join(lines) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
