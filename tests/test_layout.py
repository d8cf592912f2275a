"""How the package is laid out: which room may import which, and what the command line loads before it has to."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType

import pytest
from backbones import DEMOS, plugin

import modeling_aim

PACKAGE = Path(modeling_aim.__file__).parent
MOST_SHIPPED_FILES = 21  # whoever sets trust_remote_code reads what they trust
MOST_LINES = 450


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> list[tuple[str, str]]:
    """Modules of the package that a module imports anywhere in its file, also for types, with the names it takes."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            submodule = ".".join([*base, alias.name])
            found.append((submodule, "") if submodule in MODULES else (".".join(base), alias.name))
    return found


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


def test_no_import_cycle() -> None:
    graph = {name: {target for target, _ in imports(name)} for name in MODULES}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
    assert set(order) == set(MODULES)


def test_no_private_name_is_imported() -> None:
    found = {
        (name, taken)
        for name in MODULES
        for _, taken in imports(name)
        if taken.startswith("_") and taken != "__version__"
    }
    assert not found


def test_shipped_files_are_few_and_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.glob("*_aim.py")}
    assert len(lengths) <= MOST_SHIPPED_FILES, sorted(lengths)
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_rooms_below_do_not_import_those_above() -> None:
    forbidden = {
        "data": {"training", "evaluation", "speed", "cli"},
        "training": {"evaluation", "speed", "cli"},
        "evaluation": {"training", "speed", "cli"},
        "speed": {"evaluation", "cli"},
    }
    for name in MODULES:
        rooms = {room(target) for target, _ in imports(name)}
        assert not rooms & forbidden.get(room(name), set()), f"{name} imports {rooms}"
        if "evaluation.tasks" in name:
            assert not any(target.endswith(("modeling_aim", ".subject", ".runner")) for target, _ in imports(name))


def test_models_are_registered_wherever_the_package_loads_one() -> None:
    """`from .. import AimForConditionalGeneration` registers the classes; importing its file alone does not."""
    for name in MODULES:
        if not name.endswith(("_aim", ".registered")):
            assert ("modeling_aim.modeling_aim", "AimForConditionalGeneration") not in imports(name), name


def package_file(frame: FrameType) -> str | None:
    """The name of the package's file in which a frame runs; `None` for other code."""
    path = Path(frame.f_code.co_filename)
    return path.name if path.is_relative_to(PACKAGE) else None


def test_generate_is_followed_through_the_eight_files_that_contributing_lists() -> None:
    """Whatever else runs is a helper: it is called from these files, and calls back into none of them."""
    guide = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    route = re.findall(r"^\d\. `(\w+\.py)`", guide, re.MULTILINE)
    assert len(route) == 8
    aim = plugin("llava")
    inputs = aim.query()
    running: set[str] = set()
    calls_back: set[tuple[str, str]] = set()

    def follow(frame: FrameType, event: str, arg: object) -> None:
        called = package_file(frame)
        if called is None:
            return
        running.add(called)
        caller = frame.f_back
        while caller is not None and package_file(caller) is None:  # code of torch or transformers in between
            caller = caller.f_back
        if caller is not None and called in route and package_file(caller) not in route:
            calls_back.add((caller.f_code.co_name, frame.f_code.co_name))

    tracer = sys.gettrace()
    sys.settrace(follow)
    try:
        aim.model.generate(**inputs, demos=list(DEMOS), max_new_tokens=2, do_sample=False)
    finally:
        sys.settrace(tracer)
    assert set(route) <= running
    assert calls_back == set()
    unnamed = {name for name in running - set(route) if f"`{name}`" not in guide.split("| shipped file |")[0]}
    assert unnamed == set(), "CONTRIBUTING.md names every helper that runs"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bank", "--help"], ["answer", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = "import sys, runpy\ntry:\n    runpy.run_module('modeling_aim', run_name='__main__')\n"
    code += "finally:\n    print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    expected = ("modeling-aim", "transformers", "torch", "bitsandbytes") if arguments == ["--version"] else ("Usage",)
    assert all(word in done.stdout for word in expected)
