"""`aim bench`: its command line, its prompts and methods on each family, and what it does without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import build
from packaging.version import Version
from PIL import Image
from typer.testing import CliRunner

from modeling_aim.backbone_aim import decoder_layers
from modeling_aim.cli.bench import BenchSettings, app
from modeling_aim.evaluation import EvalSettings
from modeling_aim.prefix_aim import prefix_kv, serves
from modeling_aim.speed import baselines, growth, measure
from modeling_aim.speed.baselines import AT_QUERY, NAMES
from modeling_aim.speed.counting import COUNTED, Twin, analytic_kv, count, count_flops, kv_bytes
from modeling_aim.speed.measure import Measuring, Memory
from modeling_aim.speed.methods import METHODS, Bench, Clock, call_of
from modeling_aim.speed.prompts import RandomPrompts
from modeling_aim.speed.report import picture
from modeling_aim.speed.shapes import PICTURES, SHAPES, random_backbone, shape_config, shape_picture
from modeling_aim.state_aim import continues_after_kv

WIDE = {"COLUMNS": "250"}
CURRENT = Version(transformers.__version__) >= Version("5.23")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env=WIDE)


# --- the command


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run on the smallest shape, with all methods."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    options = ["--shape", "tiny", "--shots", "2,0", "--methods", ",".join(METHODS), "--repeats", "2"]
    result = run(*options, "--max-new-tokens", "3", "--device", "cpu", "--output", str(folder))
    assert result.exit_code == 0, result.output
    return result.output, folder


def test_rows_of_a_run(measured: tuple[str, Path]) -> None:
    found = json.loads((measured[1] / "bench.json").read_text())
    assert (found["backbone"], found["visual_tokens"], found["dtype"], found["device"]) == (
        "tiny", 4, "float32", "cpu",
    )  # fmt: skip
    rows = {(row["method"], row["shots"]): row for row in found["rows"]}
    assert set(rows) == {("zero", 0), ("overhead", 0), *((method, 2) for method in METHODS)}
    for row in rows.values():
        assert row["failed"] is None
        assert 0 < row["ttft_ms"]["low"] <= row["ttft_ms"]["median"] <= row["ttft_ms"]["high"]
        assert row["ttft_ms"]["repeats"] == 2 and row["decode_ms"]["median"] > 0
        assert row["measured_kv_bytes"] == 2 * row["kv_bytes"]  # float32, counted in bfloat16
    zero, full, kept = (rows[name, 2] for name in ("zero", "full", "bank-kv"))
    assert (zero["prompt_tokens"], full["prompt_tokens"], kept["prompt_tokens"]) == (44, 44 + 2 * 34, 44 + 2 * 30)
    assert kept["full_over"] == full["ttft_ms"]["median"] / kept["ttft_ms"]["median"]
    assert kept["times_zero"] == kept["ttft_ms"]["median"] / zero["ttft_ms"]["median"]
    assert kept["counted_full_over"] == full["flops"] / kept["flops"] > 1
    assert 0 < rows["overhead", 0]["overhead_ms"] < rows["overhead", 0]["ttft_ms"]["median"]


def test_table_and_picture_of_a_run(measured: tuple[str, Path]) -> None:
    output, folder = measured
    written = (folder / "bench.md").read_text()
    for method in METHODS:
        assert method in output and f"| {method} | 2 |" in written
    assert "Without demonstrations, the plug-in adds" in output and "the plug-in adds" in written
    with Image.open(folder / "bench.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_picture_of_one_number_of_demonstrations(measured: tuple[str, Path], tmp_path: Path) -> None:
    rows = [row for row in json.loads((measured[1] / "bench.json").read_text())["rows"] if row["shots"] == 2]
    for name, shown in (("all", rows), ("one", [{**rows[0], "peak_bytes": None}])):
        picture(shown, "title", tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as drawn:
            blue = [color for _, color in drawn.convert("RGB").getcolors(2**24) if color == (31, 119, 180)]
        assert bool(blue) == (name == "all")  # bars of AIM's; rows[0] is the backbone alone


def test_count_only(tmp_path: Path) -> None:
    result = run(
        "--shape", "tiny", "--shots", "0,4", "--methods", ",".join(COUNTED), "--count-only", "--output", str(tmp_path)
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["method"], row["shots"]) for row in found["rows"]] == [("zero", 0), *((name, 4) for name in COUNTED)]
    assert all("ttft_ms" not in row and row["flops"] > 0 for row in found["rows"])
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_a_folder_of_settings_can_be_counted() -> None:
    folder = Path(__file__).resolve().parents[1] / "hub_configs" / "SmolVLM-256M"
    result = run("--backbone", str(folder), "--shots", "1", "--methods", "zero", "--count-only")
    assert result.exit_code == 0 and "1088 visual tokens" in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give one of --backbone and --shape"),
        (("--shape", "tiny", "--backbone", "x"), "Give one of --backbone and --shape"),
        (("--shape", "gpt-5"), "There is no shape 'gpt-5'; there are llava-1.5-7b"),
        (("--shape", "tiny", "--methods", "zero,fast"), "--methods has 'fast'; there are zero"),
        (("--shape", "tiny", "--methods", "overhead", "--count-only"), "--methods has 'overhead'"),
        (("--shape", "tiny", "--shots", "0,many"), "--shots 'many': expected a whole number"),
        (("--shape", "tiny", "--shots", "-1"), "--shots '-1': expected numbers of demonstrations"),
        (("--shape", "tiny", "--dtype", "int8"), "--dtype 'int8': expected float32, bfloat16 or float16"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert says in result.output


def test_a_shape_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_aim.speed.shapes.free_memory", lambda device: 2**20)
    result = run("--shape", "cpu-64", "--device", "cpu")
    assert result.exit_code == 1 and "--count-only" in result.output


def test_a_family_whose_images_are_unknown() -> None:
    with pytest.raises(ValueError, match="does not know how an image enters idefics2"):
        Twin(build("idefics2").model.config)


# --- prompts and methods


def can_see(twin: Twin) -> bool:
    """Whether this release of transformers can run the twin's vision tower without weights; the current one can."""
    try:
        return twin.image > 0
    except ValueError:
        assert not CURRENT
        return False


def countable(family: str, shots: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Twin, RandomPrompts, int]:
    """A tiny model, its twin without weights, prompts of so many shots, and the FLOPs of the LM head on a token."""
    monkeypatch.setattr("modeling_aim.speed.shapes.GRID", (8, 12))
    model = build(family).model
    model.generation_config.suppress_tokens = None
    twin = Twin(model.config, causal=False)
    if not can_see(twin):
        pytest.skip("with this release of transformers, this family cannot be counted")
    prompts = RandomPrompts(model.config, shots, 30, 40, "cpu", torch.float32)
    return model, twin, prompts, 2 * model.get_output_embeddings().weight.numel()


TWINS = ("qwen2_vl", "smolvlm", "vipllava")  # their images enter as those of qwen2_5_vl, idefics3 and llava


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f in TWINS else f for f in PICTURES])
def test_methods_cost_what_is_counted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real tiny model of each family: same KV, same FLOPs, and kept KV gives the same answer."""
    shots = 1
    model, twin, prompts, head = countable(family, shots, monkeypatch)
    made = Bench(model, prompts)
    answers = {}
    prefix = made.model.prefill(made.fused(shots))
    kept = continues_after_kv(model) and serves(prefix_kv(made.model, prefix, prompts.bos), padded=False)
    for name, prepare in METHODS.items():
        if name.endswith("bank-kv") and not kept:  # on the oldest releases of transformers
            continue
        call, caches = prepare(made, shots), []
        found = count_flops(lambda call=call, caches=caches: caches.append(call(Clock(), 1))).total
        counted = count(twin, "zero" if name == "overhead" else name, shots)
        assert found == pytest.approx(counted.flops + head, rel=0.01), name
        assert kv_bytes(caches[0]) == analytic_kv(model.config.get_text_config(), counted.prompt_tokens, 4), name
        clock = Clock()
        call(clock, 3)
        answers[name] = torch.cat([token.flatten() for token in clock.ids[1:]]).tolist()
        assert len(answers[name]) == 3
    assert answers["prefix-kv"] == answers["full"] and answers["overhead"] == answers["zero"]
    for form in ("", "depth-"):
        bank = answers[f"{form}bank"]
        assert answers[f"{form}cold"] == bank == answers.get(f"{form}bank-kv", bank)
    assert made.model.config.form["entry_layers"] == made.half.config.form["entry_layers"] == [0]
    assert made.depth.config.enters_at_depth and not list(made.depth.projector.parameters())


LARGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("cpu-576", "qwen2.5-vl-7b")]


@pytest.mark.parametrize("name", ["cpu-64", "tiny", "smolvlm-256m-whole", "qwen3-vl-4b", *LARGER])
def test_shapes_of_every_kind_can_be_counted(name: str) -> None:
    """Others: test_counted.py."""
    twin = Twin(shape_config(name), picture=shape_picture(name))
    if can_see(twin):
        zero = count(twin, "zero", 0)
        assert zero.prompt_tokens == twin.picture.tokens + 40 and 0 < twin.image < zero.flops, name


def test_an_image_of_every_shape_is_some_tokens() -> None:
    assert all(shape_picture(name).tokens > 0 for name in SHAPES)
    whole, split = (shape_picture(name).tokens for name in ("idefics3-8b-whole", "idefics3-8b"))
    assert (whole, split) == (169, 2873)


def test_random_weights_in_4_bit() -> None:
    pytest.importorskip("bitsandbytes")
    config = shape_config("tiny")
    model = random_backbone(config, torch.float32, "cpu", load_in_4bit=True)
    kinds = {type(m).__name__ for m in decoder_layers(model).modules() if hasattr(m, "in_features")}
    assert kinds == {"Linear4bit"}
    clock = Clock()
    METHODS["bank"](Bench(model, RandomPrompts(config, 1, 30, 40, "cpu", torch.float32)), 1)(clock, 2)
    assert len(clock.times) == 3


# --- memory


@pytest.fixture(scope="module")
def tiny() -> Bench:
    config = shape_config("tiny")
    model = random_backbone(config, torch.float32, "cpu")
    return Bench(model, RandomPrompts(config, 4, 30, 40, "cpu", torch.float32))


def measuring(bench: Bench, methods: list[str]) -> Measuring:
    return Measuring(bench, Twin(bench.backbone.config), methods, 1, 2, 30, 40)


def test_a_method_without_memory_is_a_row(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {row: count(Twin(tiny.backbone.config), row, 4).kv_bytes * 2 for row in ("full", "bank")}
    assert needed["bank"] < needed["full"]
    monkeypatch.setattr(measure, "free_memory", lambda device: needed["full"] - 1)
    rows = {row.method: row for row in measuring(tiny, ["zero", "full", "bank"]).run([4])}
    assert rows["full"].failed is not None and "out of memory with 4 demonstrations" in rows["full"].failed
    assert rows["full"].ttft_ms == [] and rows["bank"].failed is None and len(rows["bank"].ttft_ms) == 1


def test_what_other_methods_keep_is_given_back_first(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation that fails is tried again without what others keep, and only then is it a result."""
    calls: list[str] = []
    made = measuring(tiny, ["bank-kv", "full"])

    def greedy(bench: Bench, shots: int) -> Any:
        calls.append(",".join(made._ready))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(METHODS, "full", greedy)
    rows = {row.method: row for row in made.run([2])}
    assert calls == ["bank-kv", ""]
    assert rows["full"].failed == "out of memory with 2 demonstrations"
    assert rows["bank-kv"].failed is None and len(rows["bank-kv"].ttft_ms) == 1


def test_other_errors_are_not_results(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench, shots: int) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setitem(METHODS, "full", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        measuring(tiny, ["full"]).run([2])


def test_more_than_the_positions(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone computes such a prompt, and the row says so; the plug-in refuses it."""
    monkeypatch.setattr(tiny.backbone.config.get_text_config(), "max_position_embeddings", 100)
    rows = {row.method: row for row in measuring(tiny, ["zero", "full", "bank"]).run([4])}
    assert rows["zero"].positions is None
    assert rows["full"].positions == 100 and rows["full"].failed is None and rows["full"].ttft_ms
    assert rows["bank"].failed == "164 tokens, but the backbone has 100 positions"


@pytest.mark.skipif(not measure.STATUS.exists(), reason="the system does not say how much memory a process has")
def test_peak_memory() -> None:
    memory = Memory("cpu")
    before = memory.now()
    memory.forget_peak()
    block = torch.ones(2**24)
    del block
    peak, after = memory.peak(), memory.now()
    assert before is not None and peak is not None and after is not None
    assert peak - before == pytest.approx(2**26, rel=0.1) and after - before < 2**23
    memory.forget_peak()
    assert memory.peak() - after < 2**23


# --- methods of others

SETTINGS = ("text-kv", "text-kv:ratio=.5", "text-kv-together", "parallel-icl", "parallel-icl:chunks=1", "fastv",
            "fastv:ratio=.9:depth=1", "catp", "snapkv", "snapkv:ratio=.9:window=8", "task-vector")  # fmt: skip


def test_every_baseline_is_compared_with_its_count() -> None:
    compared = {name.partition(":")[0] for name in SETTINGS}
    kept_by_content = {"emloc"}  # what it keeps follows from the data
    assert compared == set(NAMES) - kept_by_content, "add the method to SETTINGS"


def test_a_baseline_without_a_count_says_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(baselines._Count, "text_kv")
    result = run("--shape", "tiny", "--methods", "full,text-kv", "--shots", "2", "--count-only")
    assert result.exit_code == 1 and "add text_kv(self, cold) to _Count" in result.output


@pytest.mark.parametrize("method", NAMES)
def test_help_names_every_baseline(method: str) -> None:
    assert method in (BenchSettings.__doc__ or ""), "name it in the docstring of BenchSettings, cli/bench.py"
    assert method in (EvalSettings.__doc__ or ""), "name it in the docstring of EvalSettings, evaluation/settings.py"


@pytest.mark.parametrize(
    "family", ["llava", "idefics3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_5_vl", "smolvlm"))]
)
def test_methods_of_others_cost_what_is_counted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what may be read before the query and without: same KV, same FLOPs; and both give the same answer."""
    shots = 3
    model, twin, prompts, head = countable(family, shots, monkeypatch)
    made = Bench(model, prompts)
    for name in SETTINGS:
        plain, _, settings = name.partition(":")
        answers = []
        for form in (name, f"{plain}-cold:{settings}".removesuffix(":"))[: 1 if plain in AT_QUERY else 2]:
            call, caches = call_of(made, form, shots), []
            found = count_flops(lambda call=call, caches=caches: caches.append(call(Clock(), 1))).total
            counted, experts = count(twin, form, shots), 3 if name == "parallel-icl" else 1
            assert found == pytest.approx(counted.flops + experts * head, rel=0.01), form
            assert kv_bytes(caches[0]) == 2 * counted.kv_bytes, form
            clock = Clock()
            call(clock, 3)
            answers.append(torch.cat([token.flatten() for token in clock.ids[1:]]).tolist())
        assert len(answers[0]) == 3 and answers[0] == answers[-1], name


def test_a_run_with_methods_of_others(tmp_path: Path) -> None:
    methods = "full,text-kv,snapkv-cold:ratio=.9,fastv:depth=1,emloc"
    options = ["--shape", "tiny", "--shots", "0,3", "--methods", "zero," + methods, "--repeats", "1"]
    result = run(*options, "--device", "cpu", "--max-new-tokens", "2", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"] if row["shots"]}
    assert set(rows) == {"zero", *methods.split(",")}
    for name in ("text-kv", "snapkv-cold:ratio=.9", "fastv:depth=1"):
        assert rows[name]["measured_kv_bytes"] == 2 * rows[name]["kv_bytes"] < rows["full"]["measured_kv_bytes"]
    assert rows["emloc"]["measured_kv_bytes"] <= 2 * rows["emloc"]["kv_bytes"]  # all rows are its bound
    assert "snapkv-cold:ratio=.9" in (tmp_path / "bench.md").read_text()
    result = run("--shape", "tiny", "--methods", "snapkv:share=1", "--count-only")
    assert result.exit_code == 1 and "is not a setting of snapkv" in result.output


def test_growth_is_counted_and_a_bank_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shape", "cpu-64", "--shots", "1", "16", "--bank", "100", "1000", "--measured", "100"]
    monkeypatch.setattr(
        "sys.argv", ["growth", *arguments, "--folder", str(tmp_path), "--output", str(tmp_path / "out")]
    )
    growth.main()
    found = json.loads((tmp_path / "out" / "growth.json").read_text())
    cost = {(row["method"], row["shots"]): row for row in found["prompts"]}
    for name in growth.GROWN:  # what stands in the context grows; what does not, does not
        grows = cost[name, 16]["kv_bytes"] / cost[name, 1]["kv_bytes"]
        assert grows == 1 if name in ("zero", "task-vector") else grows > 1.5, name
    assert cost["text-kv", 16]["kv_bytes"] == cost["bank-kv", 16]["kv_bytes"]
    small, large = found["banks"]
    assert small["measured"] and not large["measured"] and small["select_ms"] > 0
    for name in ("bank_gb", "word_kv_gb", "read_pflops", "select_ms"):
        assert large[name] == pytest.approx(10 * small[name])
    printed = capsys.readouterr().out
    assert "| `text-kv` |" in printed and "(extended)" in printed and "aim-bank" not in str(list(tmp_path.iterdir()))
    assert (tmp_path / "out" / "growth.png").stat().st_size > 5000


def test_all_methods_at_all_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SHAPES", {name: SHAPES[name] for name in ("cpu-64", "tiny")})
    monkeypatch.setattr("sys.argv", ["growth", "--shape", "all", "--shots", "4", "--output", str(tmp_path)])
    growth.main()
    rows = {row["method"]: row for row in json.loads((tmp_path / "shapes.json").read_text())["shapes"]}
    assert set(NAMES) | {"zero", "full", "prefix-kv", "bank", "bank-kv", "cold", "depth-cold"} <= set(rows)
    for name in NAMES:
        if f"{name}-cold" in rows:
            assert rows[f"{name}-cold"]["flops"] > rows[name]["flops"], name
    written = (tmp_path / "shapes.md").read_text()
    assert written.count("| `cpu-64` (64) |") == 3 and "`tiny`" not in written


def test_the_share_of_selecting(measured: tuple[str, Path], tmp_path: Path) -> None:
    file = measured[1] / "bench.json"
    answer = next(row for row in json.loads(file.read_text())["rows"] if row["method"] == "depth-bank")["ttft_ms"]
    assert growth.answer_time(file) == answer["median"]
    row = {"demonstrations": 1000, "bank_gb": 1.0, "word_kv_gb": 1.0, "whole_kv_gb": 1.0, "read_pflops": 1.0,
           "open_ms": 1.0, "select_ms": 5.0, "measured": True}  # fmt: skip
    assert "| 20.0 % |" in growth.bank_table([row], answer_ms=20.0)
    other = tmp_path / "bench.json"
    other.write_text('{"rows": [{"method": "zero"}]}')
    with pytest.raises(ValueError, match="has no measured depth-bank: run aim bench"):
        growth.answer_time(other)
