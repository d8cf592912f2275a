"""`.ci/drift`: the report on versions of transformers names each property that broke, and of what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRIFT = ROOT / ".ci" / "drift"
SUITE = """
import pytest

@pytest.mark.parametrize("family", ["llava", "idefics"])
def test_row_of_a_batch_is_batch_of_one(family):
    assert family in {families!r}, f"{{family}} differs"

def test_saved_is_loaded():
    pass
"""


def report(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DRIFT), "--report", str(folder)], capture_output=True, text=True)


def run_suite(folder: Path, name: str, families: list[str]) -> None:
    """The result of a small suite, as pytest writes it."""
    (folder / "test_batches.py").write_text(SUITE.format(families=families))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--junitxml={folder / name}.xml",
        "-c",
        os.devnull,
    ]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([*command, "test_batches.py"], cwd=folder, env=environment, capture_output=True, check=False)
    (folder / f"{name}.txt").write_text(f"transformers of {name}\n")


def test_the_report_names_properties_versions_and_families(tmp_path: Path) -> None:
    for name, families in (("oldest", ["llava", "idefics"]), ("newest", ["llava"]), ("development", [])):
        run_suite(tmp_path, name, families)
    done = report(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "| oldest | transformers of oldest | 3 | 0 |" in done.stdout
    assert "| newest | transformers of newest | 3 | 1 |" in done.stdout
    _, section = done.stdout.split("## row of a batch is batch of one (`test_batches`)")
    assert "- newest (idefics): `AssertionError: idefics differs" in section
    assert "- development (idefics, llava): `AssertionError: llava differs" in section
    assert "saved" not in done.stdout and (tmp_path / "report.md").read_text() + "\n" == done.stdout


def test_all_is_well_where_every_version_ran_and_held(tmp_path: Path) -> None:
    for name in ("oldest", "newest"):
        run_suite(tmp_path, name, ["llava", "idefics"])
    assert report(tmp_path).returncode == 1 and "| development |  | did not run | |" in report(tmp_path).stdout
    run_suite(tmp_path, "development", ["llava", "idefics"])
    assert report(tmp_path).returncode == 0


def test_an_unknown_version_is_refused() -> None:
    done = subprocess.run([sys.executable, str(DRIFT), "latest"], capture_output=True, text=True)
    assert done.returncode == 2 and "expected some of oldest, newest, development" in done.stderr
