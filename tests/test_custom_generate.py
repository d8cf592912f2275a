"""hub_configs/aim-generate: a stock class of transformers answers as the plug-in without training, bit for bit."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, Backbone, build, on_disk, picture, run_without_package
from hub_server import HubServer
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, GenerationConfig, TextStreamer, set_seed
from transformers.dynamic_module_utils import get_relative_imports

from modeling_aim import AimForConditionalGeneration, AimProcessor, DemonstrationBank, FusedDemonstrations
from modeling_aim.files_aim import shipped_files
from modeling_aim.state_aim import answering

FOLDER = Path(__file__).resolve().parents[1] / "hub_configs" / "aim-generate"
STOCK = {"custom_generate": str(FOLDER), "trust_remote_code": True}
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


class SecondLikeliest:
    """A logits processor that forbids the likeliest token at each step; it keeps the ids that it saw."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.tolist()
        return scores.scatter(1, scores.argmax(dim=-1, keepdim=True), -torch.inf)


class AfterThree:
    """A stopping criterion: three tokens; it keeps the lengths that it saw."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(self.lengths) >= 3)


MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams returned": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "samples returned": {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3},
    "no cache": {**GREEDY, "use_cache": False},
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "generation_config": {"generation_config": GenerationConfig(max_length=200, min_length=150)},
    "prompt lookup": {**GREEDY, "prompt_lookup_num_tokens": 2},
}


def query(backbone: Backbone, *questions: str) -> dict[str, Any]:
    """A batch of questions with an image each, from the stock processor."""
    questions = questions or ("What is this?",)
    ask = AimProcessor(build(backbone.family).processor)
    texts = [ask.prompt(question) for question in questions]
    images = [[picture(9 + row)] for row in range(len(questions))]
    return dict(backbone.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"))


def answer(backbone: Backbone, inputs: dict[str, Any], demos: Any = DEMOS, **options: Any) -> Any:
    """What the stock class answers; greedily unless `options` say otherwise."""
    given = {"processor": backbone.processor, **(options or GREEDY)}
    return backbone.model.generate(**inputs, **STOCK, demos=demos, **given)


def plugin_on(backbone: Backbone, **settings: Any) -> AimForConditionalGeneration:
    """The plug-in without training on the same backbone, as a model of its own."""
    return AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor, **settings)


def flags(model: Any) -> tuple[dict[str, bool], dict[str, bool]]:
    """Which weights have gradients, and which modules are in training mode."""
    training = {name: module.training for name, module in model.named_modules()}
    return {name: weight.requires_grad for name, weight in model.named_parameters()}, training


@contextmanager
def images_seen(model: Any) -> Iterator[list[int]]:
    """The vision tower's calls inside the block."""
    calls: list[int] = []
    handle = model.get_encoder("image").register_forward_hook(lambda *given: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


# --- the same answers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_class_answers_as_the_plugin(family: str, mode: str) -> None:
    stock, model = build(family), plugin_on(build(family))
    inputs = query(stock)
    set_seed(0)
    found = answer(stock, inputs, **MODES[mode])
    set_seed(0)
    assert torch.equal(found, model.generate(**inputs, demos=DEMOS, **MODES[mode]))
    assert torch.equal(found[:1, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert type(stock.model).__module__.startswith("transformers.models.")


def test_the_callers_own_code_sees_the_callers_own_prompt() -> None:
    stock, model = build("llava"), plugin_on(build("llava"))
    inputs = query(stock)
    processors, criteria = [SecondLikeliest(), SecondLikeliest()], [AfterThree(), AfterThree()]
    given = [{"logits_processor": [p], "stopping_criteria": [c]} for p, c in zip(processors, criteria, strict=True)]
    found = answer(stock, inputs, **GREEDY, **given[0])
    assert torch.equal(found, model.generate(**inputs, demos=DEMOS, **GREEDY, **given[1]))
    length = inputs["input_ids"].shape[1]
    assert found.shape[1] == length + 3 and criteria[0].lengths == [length + 1, length + 2, length + 3]
    assert processors[0].seen == processors[1].seen == [found[0, : length + step].tolist() for step in range(3)]


@pytest.mark.parametrize("family", [*FAMILIES, "smolvlm", "idefics"])
def test_logits_are_bit_equal_for_a_batch_with_demonstrations_of_its_own_a_row(family: str) -> None:
    stock, other = build(family), build(family)
    inputs, rows = query(stock, "What is this?", "And what?", "?"), [DEMOS[:2], None, DEMOS[1:]]
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    found = answer(stock, inputs, rows, **options)
    wanted = plugin_on(other).generate(**inputs, demos=rows, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))
    alone = stock.model.generate(**inputs, **options)
    assert (found.logits[0][0] - alone.logits[0][0]).abs().max() > 1e-3  # the demonstrations have changed something


@pytest.mark.parametrize("depth", [0, 2, [1, 2]], ids=str)
def test_the_depth_is_the_users(depth: Any) -> None:
    stock, other = build("llava"), build("llava")
    inputs = query(stock)
    layers = [depth] if isinstance(depth, int) else depth
    wanted = plugin_on(other, read_layers=layers).generate(**inputs, demos=DEMOS, **GREEDY)
    assert torch.equal(answer(stock, inputs, depth=depth, **GREEDY), wanted)
    answer(stock, inputs)
    assert torch.equal(answer(stock, inputs, depth=depth, **GREEDY), wanted)


def test_a_streamer_shows_the_callers_own_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    stock = build("llava")
    inputs = query(stock)
    ids = answer(stock, inputs, streamer=TextStreamer(stock.processor.tokenizer), **GREEDY)
    assert capsys.readouterr().out.strip() == stock.processor.tokenizer.decode(ids[0]).strip()


@pytest.mark.parametrize("demos", [None, [], (), [None, None]], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_demonstrations_it_is_the_models_own_generate(family: str, demos: Any) -> None:
    stock, other = build(family), build(family)
    inputs = query(stock, "What is this?", "And what?")
    for options in (GREEDY, {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}):
        set_seed(0)
        wanted = other.model.generate(**inputs, **options)
        set_seed(0)
        assert torch.equal(answer(stock, inputs, demos, **options), wanted)
        set_seed(0)
        assert torch.equal(stock.model.generate(**inputs, **STOCK, **options), wanted)


def test_the_prompt_may_be_the_first_argument() -> None:
    stock = build("llava")
    inputs = query(stock)
    ids = inputs.pop("input_ids")
    given = {**STOCK, "demos": DEMOS, "processor": stock.processor, **GREEDY}
    found = stock.model.generate(ids, **inputs, **given)
    assert torch.equal(found, stock.model.generate(input_ids=ids, **inputs, **given))


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_demonstrations_need_no_processor(family: str, tmp_path: Path) -> None:
    stock, other = build(family), build(family)
    inputs, model = query(stock), plugin_on(other)
    model.read(DEMOS).save_pretrained(tmp_path)
    found = answer(stock, inputs, FusedDemonstrations.from_pretrained(tmp_path), processor=None, **GREEDY)
    assert torch.equal(found, model.generate(**inputs, demos=DEMOS, **GREEDY))
    kept = answer(stock, inputs, model.prefill(DEMOS))
    assert torch.equal(kept, model.generate(**inputs, demos=model.prefill(DEMOS), **GREEDY))


def test_a_bank_serves_a_stock_class(tmp_path: Path) -> None:
    stock, model = build("llava"), plugin_on(build("llava"))
    bank = DemonstrationBank.build(model, list(DEMOS), tmp_path / "bank")
    inputs = query(stock, "What is this?", "And what?")
    chosen = {"shots": 2, "select": "image", **GREEDY}
    assert torch.equal(answer(stock, inputs, bank, **chosen), model.generate(**inputs, demos=bank, **chosen))
    assert torch.equal(answer(stock, inputs, bank), answer(stock, inputs))


# --- what is kept between calls


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations_that_were_given_before_are_not_read_again(family: str) -> None:
    stock = build(family)
    inputs = query(stock)
    counts, answers = [], []
    for demos in (DEMOS, DEMOS[:3], DEMOS[::-1], [*DEMOS, (picture(30), "a new one.")]):
        with images_seen(stock.model) as calls:
            answers.append(answer(stock, inputs, demos))
        counts.append(len(calls))
        assert torch.equal(answers[-1], answer(build(family), inputs, demos))
    with images_seen(stock.model) as own:
        stock.model.generate(**inputs, **GREEDY)
    assert counts[0] > len(own) and counts[1:3] == [len(own)] * 2 and counts[3] == len(own) + 1
    with torch.no_grad():  # trained since
        next(iter(stock.model.get_decoder().layers[0].parameters())).mul_(1.5)
    with images_seen(stock.model) as calls:
        answer(stock, inputs)
    assert len(calls) == counts[0]


@pytest.mark.parametrize("quantized", [False, True], ids=["full", "4-bit"])
def test_nothing_keeps_the_model_alive(quantized: bool, tmp_path: Path) -> None:
    backbone = build("llava")
    if quantized:
        backbone.model.save_pretrained(tmp_path)
        for _ in range(2):  # bitsandbytes logs an exception once, whose frames keep the first one alive
            options = {"quantization_config": BitsAndBytesConfig(**FOUR_BIT)}
            backbone.model = AutoModelForImageTextToText.from_pretrained(tmp_path, **options)
    answer(backbone, query(backbone))
    answer(backbone, query(backbone), depth=2, **GREEDY)
    alive = [weakref.ref(one) for one in (backbone.model, backbone.processor.tokenizer)]
    del backbone
    gc.collect()
    assert [one() for one in alive] == [None, None]


def test_new_embeddings_after_the_first_call_are_found() -> None:
    stock, other = build("llava"), build("llava")
    inputs = query(stock)
    answer(stock, inputs)
    for backbone in (stock, other):
        set_seed(0)
        backbone.model.resize_token_embeddings(300)
    wanted = plugin_on(other).generate(**inputs, demos=DEMOS, **GREEDY)
    assert torch.equal(answer(stock, inputs), wanted)


def test_the_code_can_be_loaded_once_for_any_number_of_calls() -> None:
    stock = build("llava")
    inputs = query(stock)
    ask = stock.model.load_custom_generate(str(FOLDER), trust_remote_code=True)
    found = ask(model=stock.model, **inputs, demos=DEMOS, processor=stock.processor, **GREEDY)
    assert torch.equal(found, answer(stock, inputs))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_threads_with_demonstrations_of_their_own(family: str) -> None:
    stock, other = build(family), build(family)
    inputs = query(stock)
    given: list[Any] = [DEMOS, DEMOS[:1], None, DEMOS[2:], [(picture(20), "zup")], DEMOS[::-1]]
    wanted = [answer(other, inputs, demos) for demos in given]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda demos: answer(stock, inputs, demos), given * 2))
    assert all(torch.equal(*pair) for pair in zip(found, wanted * 2, strict=True))


# --- the model and its processor stay as they are


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_training_stays_as_it_is(family: str) -> None:
    stock, other = build(family, attention_dropout=0.5), build(family, attention_dropout=0.5)
    inputs = query(stock)
    wanted = plugin_on(build(family)).generate(**inputs, demos=DEMOS, **GREEDY)
    for backbone in (stock, other):
        backbone.model.train()
        backbone.model.get_encoder("image").eval().requires_grad_(False)
    before = flags(stock.model)
    weights = {name: weight.clone() for name, weight in stock.model.state_dict().items()}
    assert torch.equal(answer(stock, inputs), wanted)  # without dropout
    assert flags(stock.model) == before
    after = stock.model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    for backbone in (stock, other):
        set_seed(0)
        backbone.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for one, two in zip(stock.model.parameters(), other.model.parameters(), strict=True):
        assert one.grad is two.grad is None or torch.equal(one.grad, two.grad)
    with pytest.raises(ValueError, match="Demonstration 0 has no words"):
        answer(stock, inputs, [{"image": picture(0)}])
    with pytest.raises(ValueError, match="positions"):
        answer(stock, inputs, [{"text": "word " * 2000 + "."}])
    assert flags(stock.model) == before


def test_calls_that_overlap_leave_the_training_mode_that_the_first_found() -> None:
    model = build("llava").model.train()
    model.get_encoder("image").eval()
    before = flags(model)
    first, second = ExitStack(), ExitStack()
    first.enter_context(answering(model))
    second.enter_context(answering(model))
    first.close()
    assert not any(flags(model)[1].values())  # the second is still answering
    second.close()
    assert flags(model) == before


def test_a_processor_stays_as_it_is() -> None:
    stock = build("llava")
    tokenizer = stock.processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    inputs = query(build("llava"))
    found = answer(stock, inputs)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    assert torch.equal(found, answer(build("llava"), inputs))
    own = AimProcessor(build("llava").processor, label_template="Its name is {label}.")
    assert not torch.equal(
        answer(stock, inputs, [(picture(0), "dax")], processor=own, **GREEDY),
        answer(stock, inputs, [(picture(0), "dax")]),
    )


# --- where it is loaded from

ASK = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

found = {}
for family, folder in given["backbones"].items():
    for bits in ("full", "4-bit"):
        options = {} if bits == "full" else {"quantization_config": BitsAndBytesConfig(**given["four_bit"])}
        model = AutoModelForImageTextToText.from_pretrained(folder, **options)
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(images=Image.open(given["image"]), text=given["prompts"][family], return_tensors="pt")
        ids = model.generate(
            **inputs, **given["stock"], demos=given["demos"], processor=processor, max_new_tokens=6, do_sample=False
        )
        found[f"{family} {bits}"] = ids[0].tolist()
        assert type(model).__module__.startswith("transformers.models."), type(model)
        assert any("Linear4bit" == type(m).__name__ for m in model.modules()) == (bits == "4-bit")
print()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Stock backbones in folders with what a script asks them, and the plug-in's answers."""
    scratch = tmp_path_factory.mktemp("backbones")
    given: dict[str, Any] = {"backbones": {}, "prompts": {}, "four_bit": FOUR_BIT, **on_disk(scratch / "images")}
    wanted = {}
    for family in FAMILIES:
        backbone = build(family)
        backbone.model.save_pretrained(scratch / family)
        backbone.processor.save_pretrained(scratch / family)
        given["backbones"][family] = str(scratch / family)
        given["prompts"][family] = AimProcessor(backbone.processor).prompt(given["question"])
        for bits, options in (("full", {}), ("4-bit", {"quantization_config": BitsAndBytesConfig(**FOUR_BIT)})):
            backbone.model = AutoModelForImageTextToText.from_pretrained(scratch / family, **options)
            ids = plugin_on(backbone).generate(**query(backbone), demos=DEMOS, **GREEDY)
            wanted[f"{family} {bits}"] = ids[0].tolist()
    return given, wanted


def test_from_a_folder_without_the_package_in_full_precision_and_4_bit(stored: Any, tmp_path: Path) -> None:
    given, wanted = stored
    shutil.copytree(FOLDER, tmp_path / "aim-generate")  # the files that the links mean
    given = {**given, "stock": {"custom_generate": str(tmp_path / "aim-generate"), "trust_remote_code": True}}
    assert run_without_package(ASK, given) == wanted


def test_from_the_hub_by_id_and_revision_without_the_package(stored: Any, hub: HubServer) -> None:
    given, wanted = stored
    sha = hub.add_repo("me/aim-generate", FOLDER)
    hub.commit("me/aim-generate", {"custom_generate/generate.py": "raise RuntimeError('moved on')"})
    pinned = {"custom_generate": "me/aim-generate", "trust_remote_code": True, "revision": sha}
    hub.requests.clear()
    assert run_without_package(ASK, {**given, "stock": pinned}, hub.env()) == wanted
    assert {revision for revision, _ in hub.asked("me/aim-generate")} == {sha}


def test_in_the_repository_of_a_model_it_becomes_its_generate(tmp_path: Path) -> None:
    """transformers puts it in place of `model.generate`, which the plug-in itself calls."""
    stock = build("llava")
    stock.model.save_pretrained(tmp_path)
    shutil.copytree(FOLDER / "custom_generate", tmp_path / "custom_generate")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert "generate" in vars(model)
    inputs = query(stock)
    found = model.generate(**inputs, demos=DEMOS, processor=stock.processor, **GREEDY)
    assert torch.equal(found, answer(stock, inputs))
    assert torch.equal(model.generate(**inputs, **GREEDY), stock.model.generate(**inputs, **GREEDY))


def test_the_folder_holds_the_shipped_code_as_links_and_one_file_more() -> None:
    code = FOLDER / "custom_generate"
    shipped = {path.name: path for path in shipped_files()}
    assert {path.name for path in code.glob("*.py")} == {*shipped, "generate.py"}
    assert all((code / name).is_symlink() and (code / name).samefile(path) for name, path in shipped.items())
    named = {f"{name}.py" for name in get_relative_imports(code / "generate.py")}
    assert named == set(shipped)  # transformers 5.5 copies what the entry itself names


# --- bad input


def test_raw_demonstrations_without_a_processor(tmp_path: Path) -> None:
    stock = build("llava")
    expected = r"5 raw demonstrations.*processor is None.*processor=AutoProcessor.from_pretrained\("
    with pytest.raises(ValueError, match=expected):
        stock.model.generate(**query(stock), **STOCK, demos=DEMOS)
    stock.model.save_pretrained(tmp_path)
    named = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"from_pretrained\\('{tmp_path}'\\)"):
        named.generate(**query(stock), **STOCK, demos=[DEMOS[:2]])


def test_something_else_as_the_processor() -> None:
    stock = build("llava")
    for wrong in (stock.processor.image_processor, stock.processor.tokenizer, "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(ValueError, match=f"processor is a {type(wrong).__name__}; expected the model's"):
            answer(stock, query(stock), processor=wrong, **GREEDY)


@pytest.mark.parametrize("depth", [3, -1, 99, [1, 3], [1, 1], "2", 1.5, []], ids=repr)
def test_a_depth_that_the_model_does_not_have(depth: Any) -> None:
    stock = build("llava")
    with pytest.raises(ValueError, match=r"depth=.*(expected|states can be put back at 0\.\.2)"):
        answer(stock, query(stock), depth=depth, **GREEDY)


def test_demonstrations_for_another_number_of_rows_and_of_another_model() -> None:
    stock = build("llava")
    with pytest.raises(ValueError, match="demonstrations for 2 rows, but the batch has 1 rows"):
        answer(stock, query(stock), [DEMOS, DEMOS])
    fused = plugin_on(build("llava"), read_layers=[2]).read(DEMOS)
    with pytest.raises(ValueError, match=r"read by another model: read layers \[2\].*\[1\]"):
        answer(stock, query(stock), fused)
    assert torch.equal(
        answer(stock, query(stock), fused, depth=2, **GREEDY), answer(stock, query(stock), depth=2, **GREEDY)
    )
