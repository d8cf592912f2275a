"""Fixtures: every family with an untrained plug-in on it, and a process that cannot reach the network."""

from __future__ import annotations

import atexit
import gc
import ipaddress
import os
import random
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before huggingface_hub is imported, which reads them once. Tests with a Hub server turn to it by themselves.
HOME = tempfile.mkdtemp(prefix="aim-tests-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ |= {"HF_HOME": HOME, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {"HF_MODULES_CACHE": os.path.join(HOME, "modules"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every script compiles the package again
sys.dont_write_bytecode = False
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: more threads only wait for one another, in scripts too
sys.path.insert(0, str(Path(__file__).parent))  # subprocesses and workers import the helpers beside the tests

import backbones  # noqa: E402
import hub_server  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from modeling_aim.llava.text_model import LocalModel

LONG = {f"test_{name}.py" for name in ("transformers_serve", "hub_configs", "examples", "serve_command",
        "distributed", "training_runs", "bank_fuzz", "training")}  # fmt: skip
SEED = int(os.environ.get("AIM_TEST_SEED", "0"))
torch.set_num_threads(1)
hub = hub_server.hub  # the fixture: a Hub that this process uses too


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed every test alike, so that it does not depend on the tests before it or on the process that runs it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes, files with few but long tests begin first, so that the processes end together."""
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name not in LONG, -counts[item.path], item.path))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported stays: collections of garbage, of which `aim bench` makes many, need not visit it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"seed {SEED} (another one: AIM_TEST_SEED=1)")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] != "localhost" and not _is_loopback(address[0]):
            raise OSError(f"A test tried to reach {address}; tests run without a network.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", params=list(backbones.FAMILIES))
def aim(request: pytest.FixtureRequest) -> backbones.Plugin:
    """A plug-in of each family, shared by all tests: nobody changes it."""
    return backbones.plugin(request.param)


@pytest.fixture(scope="session", params=list(backbones.FAMILIES))
def aim_at_input(request: pytest.FixtureRequest) -> backbones.Plugin:
    """A plug-in of each family whose fused tokens enter at the input embeddings: the paper's."""
    return backbones.plugin(request.param, preset="paper")


@pytest.fixture(scope="session")
def llava() -> backbones.Plugin:
    """The plug-in on LLaVA, where the family makes no difference; nobody changes it."""
    return backbones.plugin("llava")


@pytest.fixture(scope="session")
def self_contained(aim: backbones.Plugin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in saved together with its backbone."""
    folder = tmp_path_factory.mktemp(aim.family) / "repository"
    aim.model.save_pretrained(folder, include_backbone=True)
    return folder


@pytest.fixture
def listing() -> Any:
    """Everything below a folder, with its content: to see that nothing was changed."""

    def contents(folder: Path) -> dict[str, bytes | None]:
        paths = sorted(Path(folder).rglob("*"))
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}

    return contents


@pytest.fixture
def without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed, but for tests marked `draws`: pictures take as long as a tiny run."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """Lone surrogates in captured output, which some tests make on purpose, cannot be sent between processes."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let endpoints on this machine be asked, which huggingface_hub does not offline, and retry after short waits."""
    from modeling_aim.llava import asking

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="session")
def chat_model() -> LocalModel:
    """Writes questions, answers and scores of the small world."""
    from endpoints import tiny_chat

    return tiny_chat()
