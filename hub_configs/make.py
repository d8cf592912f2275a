"""Write the folders of hub_configs/: for each backbone people use, an AIM repository that works without training.

A folder can be loaded, or uploaded to the Hub, as it is: config.json, processor_config.json, a card, and the code as
links to modeling_aim/. So can hub_configs/aim-tiny, which also has a trained projector and its backbone, and
hub_configs/aim-generate, which has no backbone: it serves any stock model by `generate(custom_generate=...)`.

    python hub_configs/make.py            # (re)write the folders and docs/HUB_CONFIGS.md
    python hub_configs/make.py --check    # only say whether they are up to date

The numbers, those of the published config.json of each backbone, are in modeling_aim/speed/published.py.
`aim init BACKBONE --output DIR` makes such a folder for any backbone, from the backbone itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_aim import AimConfig, AimProjector
from modeling_aim.configuration_aim import PRESETS
from modeling_aim.files_aim import model_card, shipped_files
from modeling_aim.speed.published import BACKBONES

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "hub_configs"
TABLE = ROOT / "docs" / "HUB_CONFIGS.md"
CODE = [*BACKBONES, "aim-tiny", "aim-generate/custom_generate"]  # folders with links to the code


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
    (target / "README.md").write_text(card)


def link_code(target: Path) -> None:
    """Put links to the code that a repository carries into its folder, and remove what is no longer shipped."""
    shipped = {path.name: path for path in shipped_files()}
    for path in target.glob("*_aim.py"):
        if path.name not in shipped or not path.is_symlink():
            path.unlink()
    for name, path in shipped.items():
        if not (target / name).is_symlink():
            (target / name).symlink_to(os.path.relpath(path, target))


def table() -> str:
    """The table of docs/HUB_CONFIGS.md, counted on the meta device at real size."""
    lines = [
        "# Backbones with settings in `hub_configs/`",
        "",
        "Counted on the meta device at real size by `python hub_configs/make.py`; the published sizes are beside it.",
        "A demonstration costs one fused token a text token: about 30 for a short caption or question and answer.",
        "Each folder works without training, with states that are read and put back at the depth named here. The last",
        "two columns are the sizes of a projector, for those who train one: that of `aim train`, and the paper's",
        "([TRAINING.md](TRAINING.md)).",
        "",
        "| folder | backbone | parameters (published) | visual tokens an image | depth | `trained` | `paper` |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder, (hub_id, _, visual, published) in BACKBONES.items():
        config = aim_config(folder)
        with torch.device("meta"):
            backbone = AutoModelForImageTextToText.from_config(config.backbone_config)
            forms = [AimConfig(config.backbone_config, **PRESETS[name]) for name in ("trained", "paper")]
            sizes = [sum(p.numel() for p in AimProjector(form).parameters()) for form in forms]
        counted = sum(p.numel() for p in backbone.parameters()) / 1e9
        depth = f"{config.read_layers[0]} of {config.num_layers}"
        projectors = " | ".join(f"{size:,}" for size in sizes)
        lines.append(
            f"| `{folder}` | `{hub_id}` | {counted:.2f} B ({published:g} B) | {visual} | {depth} | {projectors} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        for folder in BACKBONES:
            write(folder, HERE / folder)
        for folder in CODE:
            link_code(HERE / folder)
        TABLE.write_text(table())
        return
    shipped = {path.name for path in shipped_files()}
    for folder in CODE:
        if {path.name for path in (HERE / folder).glob("*_aim.py") if path.is_symlink() and path.exists()} != shipped:
            sys.exit(f"{HERE / folder} has other code than is shipped: run python hub_configs/make.py")
    with tempfile.TemporaryDirectory() as scratch:
        for folder in BACKBONES:
            write(folder, Path(scratch) / folder)
            for path in (Path(scratch) / folder).iterdir():
                kept = HERE / folder / path.name
                if not kept.exists() or kept.read_text() != path.read_text():
                    sys.exit(f"{kept} is not up to date: run python hub_configs/make.py")


if __name__ == "__main__":
    main()
