"""Which backbones AIM works with, for every class that AutoModelForImageTextToText maps; writes docs/BACKBONES.md.

    python docs/survey_backbones.py --results survey.jsonl              # all of them; rerun to resume
    python docs/survey_backbones.py internvl kosmos-2 --dtype bfloat16  # some, printed only

A model type "works" when a tiny random model of its real class, with its real processor, has passed the properties
of `aim check`, in each precision. Of the others, the text decoder is made small and the rest shallow, and the model
answers a prompt of words with fused tokens before it: it "answers text", and nothing has been shown about images.
Where that cannot be made from its default configuration, the class is built without weights and asked for what AIM
needs: "by construction".
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
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
from modeling_aim.checks import try_properties
from modeling_aim.checks.run import without_training
from modeling_aim.reading_aim import read_hidden_states

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "docs")]

import families  # noqa: E402
import further_families  # noqa: E402
import more_families  # noqa: E402
import popular_families  # noqa: E402
import timm_families  # noqa: E402
from backbones import build  # noqa: E402
from survey_page import DTYPES, Row, page  # noqa: E402

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
NEEDS_IMAGE = "it takes no prompt without an image"
WHY = {  # what the backbone itself, without AIM, does otherwise; tried on it alone
    "blip": NEEDS_IMAGE,
    "blip-2": "its own prompt-lookup decoding answers otherwise than greedy decoding, and its images stand before BOS",
    "emu3": "it pads the images of a batch to one size before they become tokens",
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
BASIC = {"demonstrations_reach", "read_or_raw"}  # a type for which one of these fails does not work
LENGTH, FUSED = 9, 4  # of the words of the prompt, and of the fused tokens before them


def survey(model_type: str, dtype: str = "float32") -> Row:
    """How far AIM goes with a model type, and whether it does so without training.

    Args:
        model_type: of transformers.
        dtype: precision of a model on which the properties are tried; the others are in float32.
    """
    start = time.perf_counter()
    try:
        row = run_properties(model_type, dtype) if model_type in families.FAMILIES else run_small(model_type)
    except ImportError as error:
        row = Row(model_type, "not known", "not known", f"it needs the package {missing_package(error)}")
    row.dtype, row.seconds = dtype, time.perf_counter() - start
    return row


def run_properties(model_type: str, dtype: str) -> Row:
    """The properties of `aim check` on a tiny model of its real class with its real processor."""
    backbone = build(model_type)
    model = without_training(backbone.model.to(getattr(torch, dtype)), backbone.processor, {})
    outcomes = list(try_properties(model))
    failed = {outcome.name: outcome.problem for outcome in outcomes if outcome.problem is not None}
    beside = {outcome.name: outcome.beside for outcome in outcomes if outcome.beside is not None}
    tried = len(outcomes) - len(beside)
    if len(failed) == tried or BASIC & failed.keys():
        return Row(model_type, "cannot", "no", failed[min(failed, key=lambda name: name not in BASIC)])
    untrained = "no" if "without_training" in {**failed, **beside} else "yes"
    return Row(model_type, "works", untrained, WHY.get(model_type, ""), tried, failed, beside)


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
    """The class that AutoModelForImageTextToText builds from a configuration."""
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
    """Survey the model types that are given, or all; write the page where all are known in each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="precisions; all by default")
    parser.add_argument("--results", type=Path, help="JSON lines: what is there is not tried again, the rest is added")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one a core by default")
    args = parser.parse_args()
    unknown = sorted(set(args.model_types) - set(NAMES))
    if unknown:
        parser.error(f"AutoModelForImageTextToText has no model type {', '.join(unknown)}")
    prepare()
    known = read_results(args.results)
    jobs = [job for job in jobs_of(args.model_types or list(NAMES), args.dtype) if job not in known]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, initializer=prepare) as pool:
        for number, future in enumerate(as_completed([pool.submit(survey, *job) for job in jobs]), 1):
            row = future.result()
            known[row.model_type, row.dtype] = row
            print(f"[{number}/{len(jobs)}] {row.line}", flush=True)
            add_result(args.results, row)
    every = jobs_of(list(NAMES), DTYPES)
    if not args.model_types and known.keys() >= set(every):
        (ROOT / "docs" / "BACKBONES.md").write_text(page([known[job] for job in every]), encoding="utf-8")


def jobs_of(model_types: list[str], dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """Model types with precisions; in float32 alone those whose properties are not tried."""
    return [
        (model_type, dtype)
        for model_type in model_types
        for dtype in (dtypes if model_type in families.FAMILIES else DTYPES[:1])
    ]


def add_result(path: Path | None, row: Row) -> None:
    """Store the result of a model type in one precision, for a later run."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def read_results(path: Path | None) -> dict[tuple[str, str], Row]:
    """What an earlier run has written, by model type and precision."""
    if path is None or not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row.model_type, row.dtype): row for row in rows}


if __name__ == "__main__":
    main()
