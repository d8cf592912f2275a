"""The notebook runs from its folder, as it stands, and shows what its text says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from jupyter_client import KernelManager, kernelspec

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "aim_in_five_minutes.ipynb"


class ThisPython(kernelspec.KernelSpecManager):
    """The kernel of the environment that runs the tests, whatever else is installed."""

    def get_kernel_spec(self, kernel_name: str) -> kernelspec.KernelSpec:
        return kernelspec.KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What each code cell prints."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    manager: Any = KernelManager(kernel_spec_manager=ThisPython())
    client = nbclient.NotebookClient(
        notebook, timeout=240, km=manager, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out["text"] for out in cell.outputs if out.output_type == "stream") for cell in cells]


@pytest.mark.slow  # CI runs it by name: .ci/run
def test_the_notebook_runs_and_demonstrations_help(printed: list[str]) -> None:
    text = "\n".join(printed)
    without, questions, with_demos = map(int, re.search(r"right: (\d+) of (\d+) without, (\d+) with", text).groups())
    assert without == 0 and with_demos >= 0.8 * questions
    assert "beats words only" in text
    [tuned] = re.findall(r"right at depth \d: (\d+)", text)
    [whole] = re.findall(r"all of them: +(\d+)", text)
    assert tuned == whole  # the bank holds what was read
    assert int(re.findall(r"most similar images: (\d+)", text)[0]) >= 0.8 * questions
    assert "'step': 8" in text and "residual_mlp" in text


def test_the_notebook_opens_in_colab_and_installs_from_git() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    head, install = notebook.cells[:2]
    address = re.search(r"https://colab\.research\.google\.com/github/(\S+?)/blob/main/(\S+?)\)", head.source)
    assert address is not None and (ROOT / address[2]).samefile(NOTEBOOK)
    assert f'"https://github.com/{address[1]}"' in install.source and '"git", "clone"' in install.source
    assert all(not cell.get("outputs") for cell in notebook.cells)
    for target in re.findall(r"\]\((\.\./[^)]+)\)", "".join(cell.source for cell in notebook.cells)):
        assert (NOTEBOOK.parent / target).exists()
