"""Properties that hold on every backbone AIM works with: what `aim check` runs, and the tests on each family.

A property is a function that takes a `Case` and raises `AssertionError` (or whatever breaks) when it does not hold;
its docstring is the line a user reads. Nothing here needs a trained projector.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

from . import AimForConditionalGeneration
from .backbone_aim import check_usable, decoder_layers, goes_on_behind_kv, laptop_quantization_config
from .bank import DemonstrationBank
from .configuration_aim import AimConfig
from .demonstrations_aim import Demonstration
from .prefix_aim import prefilled, serves
from .processing_aim import AimProcessor


class NotApplicable(Exception):
    """The backbone itself does not do what a property is about."""


NEW = 5  # new tokens of a test answer
QUESTION = "What is this?"


def noise(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A picture of coloured noise, the same for the same seed."""
    drawn = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(drawn.to(torch.uint8).numpy())


@dataclass
class Case:
    """A model with demonstrations and a query to try it on."""

    model: AimForConditionalGeneration
    demos: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"image": noise(1), "label": "dax"},
            {"image": noise(2, 60, 120), "question": QUESTION, "answer": "It is a small wug."},
            {"image": noise(3, 130, 50), "text": "Here we see a blicket."},
        ]
    )

    @property
    def processor(self) -> AimProcessor:
        """The model's processor."""
        return self.model.processor

    def query(self, *questions: str, images: int = 1) -> Any:
        """Inputs of one query, or of a padded batch of them, with `images` images each."""
        questions = questions or (QUESTION,)
        pictures = [[noise(10 * (row + 1) + i) for i in range(images)] for row in range(len(questions))]
        return self.processor(
            images=pictures if images else None,
            text=[self.processor.prompt(question, images=images) for question in questions],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)

    def answer(self, inputs: Any, demos: Any = None, **options: Any) -> torch.Tensor:
        """New tokens of a greedy answer, as many in each row."""
        options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
        ids = self.model.generate(**inputs, demos=demos, **options)
        length = inputs["input_ids"].shape[1]
        assert torch.equal(ids[: len(inputs["input_ids"]), :length], inputs["input_ids"]), "the query's ids are lost"
        return ids[:, length:]

    def logits(self, inputs: Any, demos: Any = None) -> torch.Tensor:
        """Logits at the last position of each query, `(batch, vocabulary)`."""
        with torch.no_grad():
            return self.model(**inputs, demos=demos).logits[:, -1].float()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equality within the float tolerance of the tensors' size."""
    scale = float(expected.abs().max()) or 1.0
    gap = float((found - expected).abs().max()) / scale
    assert gap < 2e-3, f"they differ by {gap:.1e} of the largest value"


def _alone(case: Case, **options: Any) -> Exception | None:
    """What goes wrong when the backbone itself generates in some way, without AIM."""
    try:
        case.model.backbone.generate(**case.query(), max_new_tokens=NEW, **options)
    except Exception as error:
        return error
    return None


def _needs_no_cache(case: Case, **options: Any) -> bool:
    """Whether the backbone itself, without AIM, answers the same with and without KV cache."""
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    try:
        with_cache, without = (
            case.model.backbone.generate(**case.query(), use_cache=use_cache, **options) for use_cache in (True, False)
        )
    except Exception:
        return False
    return torch.equal(with_cache, without)


# --- properties


def no_demonstrations(case: Case) -> None:
    """without demonstrations it is the backbone, bit for bit"""
    inputs = case.query()
    theirs = case.model.backbone.generate(**inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    assert torch.equal(theirs[:, inputs["input_ids"].shape[1] :], case.answer(inputs))
    assert torch.equal(case.logits(inputs), case.model.backbone(**inputs).logits[:, -1].float())
    assert torch.equal(case.answer(inputs, demos=[]), case.answer(inputs))


def demonstrations_reach(case: Case) -> None:
    """demonstrations reach the answer, and their order and content count"""
    inputs = case.query()
    fused = case.model.read(case.demos)
    plain, shown = case.logits(inputs), case.logits(inputs, fused)
    turned, fewer = case.logits(inputs, fused[[2, 1, 0]]), case.logits(inputs, fused[:1])
    for other in (plain, turned, fewer):
        assert not torch.allclose(shown, other, atol=1e-4), "another prompt gives the same logits"


def read_or_raw(case: Case) -> None:
    """raw, read and per-row demonstrations answer the same"""
    inputs = case.query()
    fused = case.model.read(case.demos)
    assert case.model.read(fused) is fused
    expected = case.answer(inputs, fused)
    assert torch.equal(case.answer(inputs, case.demos), expected)
    assert torch.equal(case.answer(inputs, [fused]), expected)
    assert torch.equal(case.answer(inputs, [case.demos]), expected)


def images_matter(case: Case) -> None:
    """what is read depends on the demonstration's image"""
    one, other = (case.model.read([(noise(seed), "dax")]).vectors for seed in (1, 2))
    assert not torch.allclose(one, other, atol=1e-6), "another image is read to the same fused tokens"


def batch_reading(case: Case) -> None:
    """a padded batch of demonstrations is read as each alone"""
    together = case.model.read(case.demos, batch_size=3).vectors.float()
    alone = torch.cat([case.model.read([demo]).vectors for demo in case.demos]).float()
    close(together, alone)


def early_stop(case: Case) -> None:
    """a read of an inner layer runs no layer behind it, and gives what a whole pass gives there"""
    backbone = case.model.backbone
    try:
        layers = decoder_layers(backbone)
    except ValueError as error:
        raise NotApplicable("the backbone has no stack of decoder layers") from error
    middle = len(layers) // 2
    if not middle:
        raise NotApplicable("the backbone has a single layer")
    demos = [Demonstration.of(demo) for demo in case.demos]
    stopping, whole = (
        AimForConditionalGeneration.from_backbone(backbone, case.processor, preset="paper", read_layers=read_layers)
        for read_layers in ([middle], [middle, -1])
    )
    ran: list[Any] = []
    watching = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in layers[middle:]]
    try:
        found = stopping.read_states(demos)
        assert not ran, f"{len(ran)} layers ran behind the one that is read"
        expected = whole.read_states(demos)
        assert ran
    finally:
        for handle in watching:
            handle.remove()
    for states, joined in zip(found, expected, strict=True):
        close(states.float(), joined[:, : states.shape[1]].float())


def equal_images(case: Case) -> None:
    """demonstrations of one image, which is encoded once for all of them, are read as each alone"""
    first, second = noise(1), noise(2)
    demos = [(first, "a dax is here."), (second, "a wug"), (first, QUESTION, "It is a dax."), (first, "blicket")]
    together = case.model.read(demos, batch_size=len(demos)).vectors.float()
    alone = torch.cat([case.model.read([demo]).vectors for demo in demos]).float()
    close(together, alone)


def rows_of_a_batch(case: Case) -> None:
    """a row of a left-padded batch is the batch of one, whatever the other rows have"""
    first, second = QUESTION, "Which of the names that you were told goes with this?"
    both = case.query(first, second)
    fused = case.model.read(case.demos)
    pictures = [noise(10), noise(20)]
    for row, (question, demos) in enumerate(zip((first, second), (fused, fused[:1]), strict=True)):
        single = case.processor(
            images=[[pictures[row]]], text=[case.processor.prompt(question)], return_tensors="pt"
        ).to(case.model.device, case.model.dtype)
        close(case.logits(both, [fused, fused[:1]])[row], case.logits(single, demos)[0])
        close(case.logits(both, [None, fused] if row else [fused, None])[row], case.logits(single, fused)[0])


def without_cache(case: Case) -> None:
    """an answer without KV cache is the cached one"""
    if not _needs_no_cache(case):
        raise NotApplicable("without a cache, the backbone itself fails or answers otherwise")
    inputs, fused = case.query(), case.model.read(case.demos)
    assert torch.equal(case.answer(inputs, fused, use_cache=False), case.answer(inputs, fused))


def given_cache(case: Case) -> None:
    """a cache object given by the caller is used"""
    inputs, fused = case.query(), case.model.read(case.demos)
    cache = DynamicCache(config=case.model.backbone.config.get_text_config())
    assert torch.equal(case.answer(inputs, fused, past_key_values=cache), case.answer(inputs, fused))


def static_cache(case: Case) -> None:
    """a static cache answers as the dynamic one"""
    inputs, fused = case.query(), case.model.read(case.demos)
    if (problem := _alone(case, cache_implementation="static")) is not None:
        raise NotApplicable(f"the backbone's own static cache fails: {problem}")
    assert torch.equal(case.answer(inputs, fused, cache_implementation="static"), case.answer(inputs, fused))


def beams(case: Case) -> None:
    """beam search and several return sequences"""
    inputs, fused = case.query(), case.model.read(case.demos)
    if (problem := _alone(case, num_beams=3)) is not None:
        raise NotApplicable(f"the backbone's own beam search fails: {problem}")
    found = case.answer(inputs, fused, num_beams=3, num_return_sequences=2)
    assert found.shape == (2, NEW)
    if _needs_no_cache(case, num_beams=3, num_return_sequences=2):
        assert torch.equal(found, case.answer(inputs, fused, num_beams=3, num_return_sequences=2, use_cache=False))


def sampling(case: Case) -> None:
    """sampling repeats with its seed"""
    inputs, fused = case.query(), case.model.read(case.demos)
    if (problem := _alone(case, do_sample=True, num_return_sequences=3)) is not None:
        raise NotApplicable(f"the backbone's own sampling of several answers fails: {problem}")
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(case.answer(inputs, fused, do_sample=True, num_return_sequences=3))
    assert drawn[0].shape == (3, NEW) and torch.equal(*drawn)


def prompt_lookup(case: Case) -> None:
    """prompt-lookup decoding answers as greedy decoding"""
    if case.model.backbone._is_stateful:
        raise NotApplicable("the backbone has a recurrent state")
    inputs, fused = case.query(images=0), case.model.read(case.demos)  # it may propose image tokens it has seen
    assert torch.equal(case.answer(inputs, fused, prompt_lookup_num_tokens=2), case.answer(inputs, fused))


def penalties(case: Case) -> None:
    """repetition penalty and stop strings work with demonstrations"""
    inputs, fused = case.query(), case.model.read(case.demos)
    assert case.answer(inputs, fused, repetition_penalty=1.3).shape == (1, NEW)
    words = case.processor.decode(case.answer(inputs, fused)[0, :2])
    if words.strip():
        stopped = case.model.generate(
            **inputs, demos=fused, do_sample=False, max_new_tokens=NEW, stop_strings=[words],
            tokenizer=case.processor.tokenizer,
        )  # fmt: skip
        assert stopped.shape[1] <= inputs["input_ids"].shape[1] + NEW


class _Collector:
    """A streamer that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.shown.append(value.reshape(-1).cpu())

    def end(self) -> None:
        pass


def streaming(case: Case) -> None:
    """a streamer sees the query and every new token, and no fused token"""
    inputs, fused = case.query(), case.model.read(case.demos)
    streamer = _Collector()
    new = case.answer(inputs, fused, streamer=streamer)
    assert torch.equal(torch.cat(streamer.shown), torch.cat([inputs["input_ids"][0].cpu(), new[0].cpu()]))


def image_counts(case: Case) -> None:
    """queries and demonstrations with no image"""
    case.answer(case.query(images=0), case.demos)
    case.answer(case.query(), [{"text": "A dax is a kind of wug."}, *case.demos])


def several_images(case: Case) -> None:
    """queries and demonstrations with two images"""
    case.answer(case.query(images=2), case.demos)
    case.answer(case.query(), [{"images": [noise(5), noise(6, 50, 70)], "text": "Two daxes here."}, *case.demos])


def few_shot_chat(case: Case) -> None:
    """the earlier turns of a chat become demonstrations"""
    if case.processor.chat_template is None:
        raise NotApplicable("the backbone has no chat template")
    chat: list[dict[str, Any]] = []
    for demo in case.demos:
        words = demo.get("label") or demo.get("answer") or demo["text"]
        asked = [{"type": "image", "image": demo["image"]}, {"type": "text", "text": QUESTION}]
        chat += [{"role": "user", "content": asked}]
        chat += [{"role": "assistant", "content": [{"type": "text", "text": words}]}]
    last = [{"type": "image", "image": noise(10)}, {"type": "text", "text": QUESTION}]
    chat += [{"role": "user", "content": last}]
    inputs = case.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(case.model.device, case.model.dtype)
    assert len(inputs["chat_demos"]) == len(case.demos)
    case.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


def system_turn(case: Case) -> None:
    """a chat keeps its system turn when earlier turns become demonstrations"""
    rule = "Answer with one word."
    system = {"role": "system", "content": [{"type": "text", "text": rule}]}
    query = {"role": "user", "content": [{"type": "image", "image": noise(10)}, {"type": "text", "text": QUESTION}]}
    try:
        plain = case.processor.apply_chat_template([system, query], add_generation_prompt=True)
    except Exception as error:
        raise NotApplicable("the backbone's chat template takes no system turn") from error
    if rule not in plain:
        raise NotApplicable("the backbone's chat template leaves system turns out")
    shown = [{"type": "image", "image": noise(1)}, {"type": "text", "text": "What do you see?"}]
    answered = {"role": "assistant", "content": [{"type": "text", "text": "A dax."}]}
    chat = [system, {"role": "user", "content": shown}, answered, query]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = case.processor.apply_chat_template(chat, **options).to(case.model.device, case.model.dtype)
    alone = case.processor.apply_chat_template([system, query], **options)
    assert torch.equal(inputs["input_ids"].cpu(), alone["input_ids"]), "the prompt is not system turn and query"
    assert [demo.text for demo in inputs["chat_demos"]] == ["A dax."]
    case.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


def attention_kinds(case: Case) -> None:
    """eager and sdpa attention answer the same"""
    backbone, inputs = case.model.backbone, case.query()
    before, found = backbone.config._attn_implementation, []
    if not backbone._supports_sdpa:
        raise NotApplicable("the backbone has eager attention only")
    try:
        for kind in ("eager", "sdpa"):
            backbone.set_attn_implementation(kind)
            found.append(case.logits(inputs, case.demos))
    finally:
        backbone.set_attn_implementation(before)
    close(*found)


def kept_prefix(case: Case) -> None:
    """an answer from the KV of a prefix is the uncached one: alone, in a padded batch, with beams, in two threads"""
    if not goes_on_behind_kv(case.model.backbone):
        raise NotApplicable("with this version of transformers, prompts of this backbone do not go on behind given KV")
    fused = case.model.read(case.demos)
    prefix = case.model.prefill(case.demos)
    queries = case.query(), case.query(QUESTION, "Which of the names that you were told goes with this?")
    kept = [value for value, _ in case.model.prefix_cache._values.values()]
    used = prefilled(case.model, [(prefix,)], queries[0]) is not None
    assert kept and used == all(serves(cache, padded=False) for cache in kept), "the KV is not used"
    lengths = [cache and cache.get_seq_length() for cache in kept]
    for inputs in queries:
        for beams in (1, 3) if _alone(case, num_beams=3) is None else (1,):
            options: dict[str, Any] = {"num_beams": beams, "do_sample": False, "max_new_tokens": NEW}
            options |= {"min_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
            expected = case.model.generate(**inputs, demos=fused, **options)
            found = case.model.generate(**inputs, demos=prefix, **options)
            assert torch.equal(found.sequences, expected.sequences)
            close(found.logits[0].float(), expected.logits[0].float())
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: case.answer(queries[0], prefix), range(3)))
    assert all(torch.equal(answer, case.answer(queries[0], fused)) for answer in answers)
    assert [cache and cache.get_seq_length() for cache in kept] == lengths, "an answer changed the KV that is kept"


def chosen_for_each_row(case: Case) -> None:
    """demonstrations are chosen from a bank for each row of a batch, by the backbone's own features"""
    demos = [
        {"image": noise(seed), "label": f"name{seed}"} for seed in (10, 20, 30, 40)
    ]  # two are the queries' images
    inputs = case.query(QUESTION, "Which of the names that you were told goes with this?")
    with tempfile.TemporaryDirectory() as folder:
        bank = DemonstrationBank.build(case.model, demos, folder)
        chosen = bank.select_rows(case.model, inputs, 2, "image")
        assert [row.texts[-1] for row in chosen] == [bank.texts()[0], bank.texts()[1]], "not the most alike image"
        for by in ("image", "text", "fused", "mmices", "random"):
            rows = [[number for number, _ in bank.choose(None, 2)]] * 2
            if by != "random":
                features = bank.query_features(inputs, by)
                queries = [{kind: found[row] for kind, found in features.items()} for row in range(2)]
                rows = [[number for number, _ in bank.choose(query, 2, by)] for query in queries]
            expected = case.answer(inputs, [bank[row] for row in rows])
            assert torch.equal(case.answer(inputs, bank, shots=2, select=by), expected)


def gradients(case: Case) -> None:
    """the loss has gradients for the projector alone, with and without gradient checkpointing"""
    inputs, model = case.query(), case.model
    if not len(model.projector.layers):  # as it is trained
        layers = model.config.read_layers
        model = AimForConditionalGeneration.from_backbone(
            model.backbone, case.processor, preset="trained", read_layers=layers
        )
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        try:
            model(**{**inputs, "labels": inputs["input_ids"]}, demos=case.demos).loss.backward()
        finally:
            if checkpointing:
                model.gradient_checkpointing_disable()
            model.eval()
        got = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        assert got and all(name.startswith("projector.") for name in got), sorted(got)[:3]
        assert all(bool(gradient.isfinite().all()) for gradient in got.values())
        found.append(torch.cat([gradient.reshape(-1) for gradient in got.values()]))
        model.zero_grad()
    assert bool(found[0].any()), "no gradient reaches the projector"
    close(found[1], found[0])


def nothing_leaks(case: Case) -> None:
    """a read or an answer leaves no state behind for the next call"""
    short = case.query()
    try:
        long = case.query(images=2)
    except ValueError:  # a processor of one image a prompt
        long = case.query("Which of the names that you were told goes with this?")
    fused = case.model.read(case.demos)
    before = case.logits(short, fused)
    case.answer(long, fused)
    case.model.read(case.demos[::-1])
    assert torch.equal(case.logits(short, fused), before)
    expected = case.answer(short, fused)
    case.answer(long)
    case.model.read(case.demos[:1])
    assert torch.equal(case.answer(short, fused), expected)


def two_threads(case: Case) -> None:
    """two threads with different demonstrations get the answers they get alone"""
    inputs, fused = case.query(), case.model.read(case.demos)
    given = [fused, fused[[2]], fused[[1, 0]], None]
    alone = [case.answer(inputs, demos) for demos in given]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda d: case.answer(inputs, d), given * 2), alone * 2, strict=True):
            assert torch.equal(found, expected)


def reload(case: Case) -> None:
    """saved and loaded again, it answers the same"""
    inputs = case.query()
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = AimForConditionalGeneration.from_pretrained(folder, backbone=case.model.backbone)
        found = again.generate(**inputs, demos=case.demos, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    assert torch.equal(found[:, inputs["input_ids"].shape[1] :], case.answer(inputs, case.demos))


PROPERTIES: dict[str, Callable[[Case], None]] = {
    name: function
    for name, function in list(globals().items())
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["case"]
}


def run_checks(model: AimForConditionalGeneration) -> Iterator[tuple[str, str | None]]:
    """Try every property that applies to `model`; yields what it says and, where it does not hold, why."""
    case = Case(model)
    for function in PROPERTIES.values():
        try:
            function(case)
            problem = None
        except NotApplicable:
            continue
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:300] or type(error).__name__
        yield (function.__doc__ or function.__name__).strip(), problem


def check_model(
    backbone: str,
    revision: str | None = None,
    from_config: bool = False,
    load_in_4bit: bool = False,
    device_map: str | None = None,
) -> AimForConditionalGeneration:
    """The model to check: an AIM repository, or a backbone with a new projector.

    Args:
        backbone: folder or Hub id of either.
        revision: its revision.
        from_config: build the backbone with random weights and two text layers from its config; needs no weights.
        load_in_4bit: load the backbone in 4-bit.
        device_map: where the backbone goes.
    """
    place: dict[str, Any] = {} if revision is None else {"revision": revision}
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if load_in_4bit:
        options["quantization_config"] = laptop_quantization_config()
    config = AutoConfig.from_pretrained(backbone, **place)
    if isinstance(config, AimConfig):
        return AimForConditionalGeneration.from_pretrained(backbone, **place, **options)
    if not from_config:
        return AimForConditionalGeneration.from_backbone(backbone, **place, **options)
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, 2)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    torch.manual_seed(0)
    random = AutoModelForImageTextToText.from_config(config)
    check_usable(random)
    return AimForConditionalGeneration.from_backbone(random, AimProcessor.from_pretrained(backbone, **place))
