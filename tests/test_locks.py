"""One process writes in a folder, by a lock of the folder or, as on Windows, of a file in it; a kill releases it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import plugin
from test_bad_input import fails

from modeling_aim import DemonstrationBank, FusedDemonstrations, files_aim
from modeling_aim.bank.manifest import only_writer
from modeling_aim.files_aim import LOCK_FILE, only_one, staged_folder
from modeling_aim.training import TrainSettings
from modeling_aim.training.run import RECORD

TEXTS = [{"text": f"the thing number {number} lies here."} for number in range(4)]
HELD = """
import sys
from pathlib import Path
from modeling_aim import files_aim
from modeling_aim.bank.manifest import only_writer
if sys.argv[1] == "file":
    files_aim.fcntl = None
folder = Path(sys.argv[2])
(folder / "bank").mkdir()
with only_writer(folder / "bank"), files_aim.only_one(folder / "run", "aim train"):
    with files_aim.staged_folder(folder / "save") as stage:
        (stage / "half").write_text("half")
        print(stage, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(params=["folder", "file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is locked; `fcntl` is missing on Windows."""
    if request.param == "file":
        monkeypatch.setattr(files_aim, "fcntl", None)
    return request.param


def saved(folder: Path) -> None:
    with staged_folder(folder) as stage:
        (stage / "file").write_text("whole")


def test_another_process_is_kept_out_until_the_first_is_killed(kind: str, tmp_path: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HELD, kind, str(tmp_path)], **pipes)
    assert process.stdout is not None
    stage = Path(process.stdout.readline().strip())
    fused = FusedDemonstrations(torch.ones(3, 4), (1, 2), torch.arange(3), source={"backbone": "tiny"})
    run = only_one(tmp_path / "run", "aim train")
    fails(lambda: DemonstrationBank(fused).save_pretrained(tmp_path / "bank"), "Another process is writing a bank")
    fails(lambda: run.__enter__(), "Another `aim train` is at work", "another folder")
    saved(tmp_path / "save")
    assert (stage / "half").read_text() == "half", "the scratch folder of a living process was removed"
    process.kill()
    process.communicate()
    DemonstrationBank(fused).save_pretrained(tmp_path / "bank")
    with only_one(tmp_path / "run", "aim train"):
        fails(lambda: only_one(tmp_path / "run", "aim train").__enter__(), "Another `aim train` is at work")
    saved(tmp_path / "save")
    assert [path.name for path in (tmp_path / "save").iterdir()] == ["file"]
    assert not (tmp_path / "run").exists()  # it was empty, also of the lock
    assert not (tmp_path / "bank" / LOCK_FILE).exists()


def test_locks_leave_nothing_in_what_is_written(kind: str, tmp_path: Path) -> None:
    aim = plugin("llava")
    aim.model.save_pretrained(tmp_path / "repository")
    bank = DemonstrationBank.build(aim.model, iter(TEXTS), tmp_path / "bank", batch_size=2)
    bank.save_pretrained(tmp_path / "copy")
    assert len(bank) == len(TEXTS) and not [path for path in tmp_path.rglob("*") if "lock" in path.name]


def test_the_lock_itself_is_no_run_of_somebody_else(kind: str, tmp_path: Path) -> None:
    settings = TrainSettings(backbone="a", data=("pairs:b",), output=str(tmp_path))
    with only_one(tmp_path, "aim train"):
        assert (tmp_path / LOCK_FILE).exists() == (kind == "file")
        assert RECORD.earlier(settings) is None
        (tmp_path / "theirs").touch()
        fails(lambda: RECORD.earlier(settings), "holds theirs and more")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), OSError(errno.ENOTSUP, "Not supported")]
)
def test_where_the_file_system_has_no_locks_the_log_says_so(
    kind: str, error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*arguments: Any, **named: Any) -> None:
        raise error

    if kind == "folder":
        monkeypatch.setattr(files_aim.fcntl, "flock", none)
    else:
        monkeypatch.setattr(files_aim.FileLock, "acquire", none)
    monkeypatch.setattr(files_aim.logger, "propagate", True)
    monkeypatch.setattr(files_aim.logger.parent, "propagate", True)
    with only_writer(tmp_path), only_one(tmp_path, "aim train"):
        pass
    assert caplog.text.count("let only one process write there") == 2 and str(tmp_path) in caplog.text
