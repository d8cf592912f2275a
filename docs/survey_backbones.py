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

import argparse
import copy
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
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
STATUS = {
    "works": "a tiny random model of the real class, with its processor, was tried on the properties of `aim check`",
    "answers text": "a small random model reads words and answers with fused tokens; images were not tried",
    "by construction": "the class has what AIM needs; nothing was run",
    "not known": "transformers cannot build it here",
    "cannot": "for the reason given",
}
NEEDS_IMAGE = "it takes no prompt without an image"
WHY = {  # what the backbone itself, without AIM, does otherwise; tried on it alone
    "blip": NEEDS_IMAGE,
    "blip-2": NEEDS_IMAGE,
    "emu3": "images of a batch are padded to one size, and padding changes the tokens they become",
    "fuyu": "its processor takes one image a prompt",
    "gemma3n": "its decoder layers hand on several streams of states, of which no inner layer is read; AIM needs a "
    'trained projector at the input (`preset="paper"`)',
    "hunyuan_vl": "it numbers images across the rows of a batch, and an image's number is one of its positions",
    "instructblip": NEEDS_IMAGE,
    "instructblipvideo": NEEDS_IMAGE,
    "kosmos-2": NEEDS_IMAGE,
    "minimax_m3_vl": "padding moves its blocks of keys: once there are more than it chooses, a row of a padded batch "
    "differs from the row alone",
    "perception_lm": "its processor takes no images with different numbers of tiles at once",
}
LENGTH, FUSED = 9, 4  # of the words of the prompt, and of the fused tokens before them


@dataclass
class Row:
    """What is known of a model type.

    Args:
        model_type: of transformers.
        status: a key of `STATUS`.
        untrained: whether it answers without training: `"yes"`, `"no"`, or `"not known"`.
        remark: what else is to be said, or why.
        tried: how many properties apply to it.
        failed: what went wrong, by the name of the property that does not hold.
        seconds: how long it took.
    """

    model_type: str
    status: str
    untrained: str
    remark: str = ""
    tried: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """The row as it is printed meanwhile."""
        held = f"{self.tried - len(self.failed)} of {self.tried} properties; " if self.tried else ""
        failed = "".join(f"\n    not {name}: {problem}" for name, problem in self.failed.items())
        text = f"{self.model_type}: {self.status}; without training: {self.untrained}; {held}{self.remark}"
        return f"{text.rstrip(' ;')} ({self.seconds:.1f} s){failed}"


def survey(model_type: str) -> Row:
    """How far AIM goes with a model type, and whether it does so without training."""
    start = time.perf_counter()
    try:
        row = run_properties(model_type) if model_type in families.FAMILIES else run_small(model_type)
    except ImportError as error:
        row = Row(model_type, "not known", "not known", f"it needs the package {missing_package(error)}")
    row.seconds = time.perf_counter() - start
    return row


def run_properties(model_type: str) -> Row:
    """The properties of `aim check` on a tiny model of its real class with its real processor."""
    backbone = build(model_type)
    names = {tried.sentence: name for name, tried in PROPERTIES.items()}
    results = dict(run_checks(without_training(backbone.model, backbone.processor, {})))
    failed = {names[sentence]: problem for sentence, problem in results.items() if problem is not None}
    if len(failed) == len(results):
        return Row(model_type, "cannot", "no", next(iter(failed.values())))
    untrained = "no" if "without_training" in failed else "yes"
    return Row(model_type, "works", untrained, WHY.get(model_type, ""), len(results), failed)


def run_small(model_type: str) -> Row:
    """What the class is by its default configuration, and what a small model of it answers to words."""
    try:
        config = CONFIG_MAPPING[model_type]()
        with torch.device("meta"):
            model = model_class(config)._from_config(config)
        reason = why_not(model)
    except ImportError:
        raise
    except Exception as error:
        return Row(
            model_type, "not known", "not known", f"its default configuration does not build: {in_short(error)}"
        )
    if reason is not None:
        return Row(model_type, "cannot", "no", reason)
    try:
        check_depth(model)
        untrained, layers = "not known", f"{len(decoder_layers(model))} decoder layers"
    except ValueError:
        untrained, layers = "no", "no decoder layers that can be told apart"
    try:
        reason = answer_text(model_type)
        return Row(model_type, "answers text", "no" if reason else "yes", reason or "")
    except NotAnswered as error:
        return Row(model_type, "cannot", "no", str(error))
    except Exception as error:
        package = missing_package(error)
        reason = WHY.get(model_type, f"no small model was made: {in_short(error)}")
        reason = reason if package is None else f"it needs the package {package}"
        return Row(model_type, "by construction", untrained, f"{layers}; not run, as {reason}")


class NotAnswered(Exception):
    """A small model was made, and it does not answer with fused tokens; why."""


def answer_text(model_type: str) -> str | None:
    """Why a small random model does not answer words without training, images aside; `None` where it does.

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
        return None
    except Exception as error:
        reason = in_short(error)
    try:
        answer_words(AimForConditionalGeneration.from_backbone(backbone, preset="paper"), inputs)
    except Exception as error:
        raise NotAnswered(in_short(error)) from error
    return reason


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
    return f"{type(error).__name__}: {words}"[:200]


def prepare() -> None:
    """Make a process quiet, and tell it the tiny models."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("modeling_aim").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for some in (more_families, popular_families, further_families, timm_families):
        families.FAMILIES.update(some.BUILDERS)
    families.FAMILIES.update(families.MORE_FAMILIES)


def main() -> None:
    """Survey the model types that are given, or all and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one a core by default")
    args = parser.parse_args()
    unknown = sorted(set(args.model_types) - set(NAMES))
    if unknown:
        parser.error(f"AutoModelForImageTextToText has no model type {', '.join(unknown)}")
    chosen, rows = args.model_types or list(NAMES), []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.workers, len(chosen)), spawn, initializer=prepare) as pool:
        for row in pool.map(survey, chosen):
            rows.append(row)
            print(row.line, flush=True)
    if not args.model_types:
        (ROOT / "docs" / "BACKBONES.md").write_text(page(rows), encoding="utf-8")


def page(rows: list[Row]) -> str:
    """The page docs/BACKBONES.md."""
    rows = sorted(rows, key=lambda row: row.model_type)
    of = {status: [row for row in rows if row.status == status] for status in STATUS}
    links = [f"[{status}](#{status.replace(' ', '-')})" for status in STATUS]
    counts = zip(links, of.values(), STATUS.values(), strict=True)
    lines = [
        "# Which backbones AIM works with",
        "",
        f"The {len(rows)} model types of AutoModelForImageTextToText in transformers {transformers.__version__}, "
        "tried by `python docs/survey_backbones.py`. `aim check BACKBONE` tries yours.",
        "",
        "| | model types | |",
        "|---|---|---|",
        *(f"| {link} | {len(some)} | {meaning} |" for link, some, meaning in counts),
        "",
        '**Without training** (`preset="untrained"`, the default): states put back at the depth where they were read '
        "change the answer, and so do the images of the demonstrations.",
        "",
        *works(of["works"]),
        *answers_text(of["answers text"]),
    ]
    for status in ("by construction", "not known"):
        lines += [f"## {status.capitalize()}", "", "| model type | remark |", "|---|---|"]
        lines += [*(f"| `{row.model_type}` | {cell(row.remark)} |" for row in of[status]), ""]
    reasons = dict.fromkeys(row.remark for row in of["cannot"])
    same = ([row for row in of["cannot"] if row.remark == reason] for reason in reasons)
    lines += ["## Cannot", "", *(f"- {listed(some)}: {reason}" for some, reason in zip(same, reasons, strict=True))]
    return "\n".join(lines) + "\n"


def works(rows: list[Row]) -> list[str]:
    """The section of the model types that work."""
    failed = [name for name in PROPERTIES if any(name in row.failed for row in rows)]
    table = [
        f"| `{row.model_type}` | {row.untrained} | {row.tried - len(row.failed)} of {row.tried} | {limits(row)} |"
        for row in rows
    ]
    return [
        "## Works",
        "",
        "| model type | without training | properties | what does not hold |",
        "|---|---|---|---|",
        *table,
        "",
        "Where the backbone itself, without AIM, does not do what a property is about, the property is not counted. "
        "Those named above:",
        "",
        *(f"- `{name}`: {PROPERTIES[name].sentence}" for name in failed),
        "",
    ]


def answers_text(rows: list[Row]) -> list[str]:
    """The section of the model types that answer text."""
    untrained = [row for row in rows if row.untrained == "yes"]
    others = [
        f"With a trained projector at the input alone: `{row.model_type}` ({row.remark})."
        for row in rows
        if row not in untrained
    ]
    return ["## Answers text", "", f"Without training, with words: {listed(untrained)}.", "", *others, ""]


def limits(row: Row) -> str:
    """What does not hold on a model type that works, for a cell of a table."""
    names = ", ".join(f"`{name}`" for name in row.failed)
    reason = row.remark or "; ".join(dict.fromkeys(row.failed.values()))
    return f"{names}: {cell(reason)}" if names else cell(reason)


def listed(rows: list[Row]) -> str:
    """The model types of rows, in a sentence."""
    return ", ".join(f"`{row.model_type}`" for row in rows)


def cell(text: str) -> str:
    """A text that a cell of a table can hold."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
