"""The README's snippets: the offline one prints what the README says, and the others use names that exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_offline_snippet_prints_what_the_readme_says() -> None:
    [snippet] = [code for code in SNIPPETS if "hub_configs/aim-tiny/backbone" in code]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "this is gacre ."
    assert f"prints `{done.stdout.strip()}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quick_start_is_the_offline_snippet_on_another_backbone(tmp_path: Path) -> None:
    """It runs as it stands, with aim-tiny's backbone and words in place of the published ones."""
    [quick] = [code for code in SNIPPETS if "llava-hf/llava-1.5-7b-hf" in code]
    quick = quick.replace('"llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device_map="auto"', "BACKBONE, PROCESSOR")
    quick = quick.replace("What is this?", "what is this ?")
    tiny = 'from modeling_aim import AimProcessor\nBACKBONE = "hub_configs/aim-tiny/backbone"\n'
    tiny += 'PROCESSOR = AimProcessor.from_pretrained("hub_configs/aim-tiny")\n'
    done = subprocess.run([sys.executable, "-c", tiny + quick], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "this is gacre ."


def test_every_snippet_parses_and_every_command_exists() -> None:
    for snippet in SNIPPETS:
        ast.parse(snippet)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"`?aim (answer|init|check|tune|train|bank|eval|publish|bench)\b", text))
    from modeling_aim.cli.main import COMMANDS

    assert commands <= set(COMMANDS) and len(commands) == 9


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
