"""Write the folders of hub_configs/: for each backbone people use, the settings of an AIM repository, without weights.

The code in hub_configs/aim-tiny, the one complete repository, is brought up to date as well.

    python hub_configs/make.py            # (re)write the folders and docs/HUB_CONFIGS.md
    python hub_configs/make.py --check    # only say whether they are up to date

The numbers, those of the published config.json of each backbone, are in modeling_aim/speed/published.py.
`aim init BACKBONE --output DIR` makes the same folder for any backbone, with an untrained projector of the right
scale, from the backbone itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_aim import AimConfig, AimProjector
from modeling_aim.files_aim import copy_shipped_files, model_card, shipped_files
from modeling_aim.speed.published import BACKBONES

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "hub_configs"
TABLE = ROOT / "docs" / "HUB_CONFIGS.md"


def aim_config(folder: str) -> AimConfig:
    """The AIM configuration of one folder."""
    hub_id, backbone, _, _ = BACKBONES[folder]
    config = AutoConfig.for_model(**backbone)
    config.dtype = "bfloat16"
    return AimConfig(backbone_config=config, backbone_name_or_path=hub_id)


def write(folder: str, target: Path) -> None:
    """Write one folder: config.json, processor_config.json and the model card."""
    config = aim_config(folder)
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    saved = json.loads((target / "config.json").read_text())
    saved.pop("transformers_version", None)
    (target / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    processor = {
        "processor_class": "AimProcessor",
        "auto_map": {"AutoProcessor": "processing_aim.AimProcessor"},
        "backbone_name_or_path": BACKBONES[folder][0],
        "aim": {},
    }
    (target / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    with torch.device("meta"):
        card = model_card(config, AimProjector(config))
    note = "> **Settings only.** This folder has no trained projector: make one with `aim init` and train it.\n\n"
    (target / "README.md").write_text(card.replace("# AIM plug-in", note + "# AIM plug-in", 1))


def table() -> str:
    """The table of docs/HUB_CONFIGS.md, counted on the meta device at real size."""
    lines = [
        "# Backbones with settings in `hub_configs/`",
        "",
        "Counted on the meta device at real size by `python hub_configs/make.py`; the published sizes are beside it.",
        "A demonstration costs one fused token a text token: about 30 for a short caption or question and answer.",
        "The projector is the paper's, one matrix; `aim train` makes a larger one ([TRAINING.md](TRAINING.md)).",
        "",
        "| folder | backbone | parameters (published) | visual tokens an image | projector parameters | in bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for folder, (hub_id, _, visual, published) in BACKBONES.items():
        config = aim_config(folder)
        with torch.device("meta"):
            backbone = AutoModelForImageTextToText.from_config(config.backbone_config)
            projector = AimProjector(config)
        counted = sum(p.numel() for p in backbone.parameters()) / 1e9
        new = sum(p.numel() for p in projector.parameters())
        lines.append(
            f"| `{folder}` | `{hub_id}` | {counted:.2f} B ({published:g} B) | {visual} | {new:,} | "
            f"{new * 2 / 2**20:.1f} MiB |"
        )
    return "\n".join(lines) + "\n"


def stale() -> list[Path]:
    """Code in aim-tiny that is no longer shipped."""
    shipped = {path.name for path in shipped_files()}
    return [path for path in (HERE / "aim-tiny").glob("*_aim.py") if path.name not in shipped]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        for folder in BACKBONES:
            write(folder, HERE / folder)
        for path in stale():
            path.unlink()
        copy_shipped_files(HERE / "aim-tiny")
        TABLE.write_text(table())
        return
    if stale():
        sys.exit(f"{stale()[0]} is not shipped any more: run python hub_configs/make.py")
    with tempfile.TemporaryDirectory() as scratch:
        for folder in [*BACKBONES, "aim-tiny"]:
            made = Path(scratch) / folder
            made.mkdir()
            copy_shipped_files(made) if folder == "aim-tiny" else write(folder, made)
            for path in (Path(scratch) / folder).iterdir():
                kept = HERE / folder / path.name
                if not kept.exists() or kept.read_text() != path.read_text():
                    sys.exit(f"{kept} is not up to date: run python hub_configs/make.py")


if __name__ == "__main__":
    main()
