"""Every page of the docs: its snippets run on aim-tiny, its commands parse, its links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hub_server import HubServer
from PIL import Image
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration, AimProcessor, DemonstrationBank
from modeling_aim.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BACKBONE = "hub_configs/aim-tiny/backbone"
# What a snippet names and no machine of this project has: published backbones, datasets, a repository of the reader's.
STAND_INS = {
    r'from_backbone\(\s*"[\w.-]+/[\w.-]+"': f'from_backbone("{BACKBONE}", PROCESSOR',
    r'from_pretrained\("llava-hf/[\w.-]+"': f'from_pretrained("{BACKBONE}"',
    r'"hub_configs/llava-1.5-7b"': '"hub_configs/aim-tiny"',
    r"load_dataset\(.*\)": "DATASET",
    r'push_to_hub\("me/my-bank"': 'push_to_hub("user/my-bank", token=TOKEN',
    r'"me/my-bank", model': '"user/my-bank", model, token=TOKEN',
    r"total=50_000": "total=2",
    r"What is this\?": "what is this ?",
}
DIFFERENT = [
    {"image": Image.new("RGB", (32, 32), (15 * i, 0, 99)), "label": ("fibra", "gacre")[i % 2]} for i in range(16)
]
NOT_RUN = {
    "client.chat.completions": "it needs a server: tests/test_serving.py and tests/test_export_chat.py talk to one",
    "TrainSettings": "tests/test_training_runs.py trains through the same call; here it would need a corpus",
    "METHODS[": "tests/test_eval_untrained.py adds a method in the same way",
    'search="faiss"': "tests/test_select.py; this bank is too small for FAISS",
}


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What snippets take from the text around them, in a folder with the files that they name."""
    for folder in ("hub_configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    pictures = ROOT / "examples" / "images"
    labelled = {"a": "fibra-1", "b": "gacre-1", "dax1": "fibra-1", "wug1": "gacre-1", "query": "query"}
    for name, picture in labelled.items():
        (tmp_path / f"{name}.png").symlink_to(pictures / f"{picture}.png")
    monkeypatch.chdir(tmp_path)
    processor = AimProcessor.from_pretrained("hub_configs/aim-tiny")
    model = AimForConditionalGeneration.from_backbone(BACKBONE, processor)
    demos = [
        {"image": f"examples/images/{name}-{i}.png", "label": name} for i in (1, 2) for name in ("fibra", "gacre")
    ]
    inputs = processor(images="query.png", text=processor.prompt("what is this ?"), return_tensors="pt")
    rows = {"img": [Image.open("a.png"), Image.open("b.png")], "fine_label": ["fibra", "gacre"]}
    return {
        "PROCESSOR": processor, "DATASET": Dataset.from_dict(rows), "model": model, "processor": processor,
        "inputs": inputs, "demos": demos, "demos_a": demos, "bank": DemonstrationBank.build(model, DIFFERENT, "bank"),
        "llava": model.backbone, "a": "a.png", "query": "query.png", "repo": "hub_configs/aim-tiny",
        "AimForConditionalGeneration": AimForConditionalGeneration, "AimProcessor": AimProcessor,
        "DemonstrationBank": DemonstrationBank,
    }  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=lambda page: page.stem)
def test_snippets_run(page: Path, names: dict[str, Any], hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the page, with aim-tiny in place of what no machine of this project has."""
    names["TOKEN"] = hub.token
    for snippet in snippets(page, "python"):
        if any(mark in snippet for mark in NOT_RUN):
            ast.parse(snippet)
            continue
        if "DemonstrationBank.build" in snippet:
            names["demos"] = DIFFERENT
        for pattern, stand_in in STAND_INS.items():
            snippet = re.sub(pattern, stand_in, snippet)
        if "demos_b" in snippet:
            names["inputs"] = names["processor"](
                images=["a.png", "b.png"], text=[names["processor"].prompt("what is this ?")] * 2, return_tensors="pt"
            )
            names["demos_b"] = names["demos"][:2]
        exec(compile(snippet, str(page), "exec"), names)
    answers = {"README": 1, "QUICKSTART": 1}.get(page.stem, 0)  # the first page says what its snippets print
    assert capsys.readouterr().out.count("this is gacre .\n") >= answers


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `aim` command in the shell blocks of a page."""
    for block in snippets(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["aim"]:
                yield words[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.stem)
def test_commands_have_the_options_they_name(page: Path) -> None:
    """Unknown commands and options are errors before `--help` is looked at."""
    for words in commands(page):
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0, f"{page.name}: aim {shlex.join(words)}: {result.output}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """`make docs`: links, anchors and the API reference; warnings are errors."""
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (site / "errors" / "index.html").read_text(encoding="utf-8")
    assert "expected (batch, length)" in page and (site / "API" / "index.html").exists()


def test_links_lead_somewhere() -> None:
    """Also those to scripts and folders, which the site has no page for."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def raised_messages() -> Iterator[tuple[str, str]]:
    """File and text of each message of a `raise` in the package that is a sentence; values are `{}`."""
    for path in sorted((ROOT / "modeling_aim").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            text = call.args[0] if isinstance(call, ast.Call) and call.args else None
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            words = [part.value if isinstance(part, ast.Constant) else "{}" for part in parts]
            message = "".join(word for word in words if isinstance(word, str))
            if message.endswith((".", "!")) and re.search("[a-z]{3}", message):
                yield path.name, message


def test_every_message_is_covered_by_the_page_on_errors() -> None:
    """The last table of docs/TROUBLESHOOTING.md has words of each message, with causes; and no word that none has."""
    page = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8").split("## Any other message")[1]
    phrases = [
        phrase for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for phrase in re.findall("`(.*?)`", row)
    ]
    messages = list(raised_messages())
    assert len(messages) > 400 and len(phrases) > 50
    assert [(name, text) for name, text in messages if not any(phrase in text for phrase in phrases)] == []
    assert [phrase for phrase in phrases if not any(phrase in text for _, text in messages)] == []
