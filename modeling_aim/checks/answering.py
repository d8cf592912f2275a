"""Properties of answering: demonstrations in every way to generate, in batches, chats, threads and from a bank."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from ..bank import DemonstrationBank
from ..prefix_aim import prefilled, serves
from ..state_aim import continues_after_kv
from .alone import under_rounding
from .case import LONG_QUESTION, NEW, QUESTION, Case, NotApplicable, difference, holds, noise, require

NO_CACHE: dict[str, Any] = {"use_cache": False}
STATIC: dict[str, Any] = {"cache_implementation": "static"}
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 2}


def _alone(case: Case, **options: Any) -> Exception | None:
    """What goes wrong when the backbone itself generates in some way, without AIM."""
    try:
        case.model.backbone.generate(**case.query(), max_new_tokens=NEW, **options)
    except Exception as error:
        return error
    return None


def _same_alone(case: Case, change: dict[str, Any], inputs: Any = None, **options: Any) -> bool:
    """Whether the backbone itself, without AIM, answers the same with options that should change nothing."""
    inputs = case.query() if inputs is None else inputs
    try:
        expected, actual = (case.answered_alone(inputs, **options, **more) for more in ({}, change))
    except Exception:
        return False
    return case.why_other(actual, expected) is None


@holds("without demonstrations it is the backbone, bit for bit")
def no_demonstrations(case: Case) -> None:
    inputs = case.query()
    theirs = case.model.backbone.generate(**inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    ours = case.answer(inputs)
    require(torch.equal(theirs[:, inputs["input_ids"].shape[1] :], ours), "the answers differ")
    with torch.no_grad():
        logits = case.model.backbone(**inputs).logits[:, -1].float()
    require(torch.equal(case.logits(inputs), logits), "the logits differ")
    require(torch.equal(case.answer(inputs, demos=[]), ours), "an empty list of demonstrations answers otherwise")


@holds("demonstrations reach the answer, and their order and content count")
def demonstrations_reach(case: Case) -> None:
    inputs = case.query()
    fused = case.fused
    plain, with_demos = case.logits(inputs), case.logits(inputs, fused)
    turned, fewer = case.logits(inputs, fused[[2, 1, 0]]), case.logits(inputs, fused[:1])
    for other in (plain, turned, fewer):
        require(not torch.allclose(with_demos, other, atol=1e-4), "another prompt gives the same logits")


@holds("raw, read and per-row demonstrations answer the same")
def read_or_raw(case: Case) -> None:
    inputs = case.query()
    fused = case.model.read(case.demos)
    require(case.model.read(fused) is fused, "what has been read is read again")
    expected = case.answered(inputs, fused)
    for demos in (case.demos, [fused], [case.demos]):
        case.require_same(case.answered(inputs, demos), expected)


@holds("a row of a left-padded batch is the batch of one, whatever the other rows have")
def rows_of_a_batch(case: Case) -> None:
    both = case.query(QUESTION, LONG_QUESTION)
    fused = case.fused
    pictures = [noise(10), noise(20)]
    own = partial(under_rounding, case, [case.query(QUESTION), case.query(LONG_QUESTION)])
    for row, (question, demos) in enumerate(zip((QUESTION, LONG_QUESTION), (fused, fused[:1]), strict=True)):
        single = case.processor(
            images=[[pictures[row]]], text=[case.processor.prompt(question)], return_tensors="pt"
        ).to(case.model.device, case.model.dtype)
        case.require_close(case.logits(both, [fused, fused[:1]])[row], case.logits(single, demos)[0], own)
        given = [None, fused] if row else [fused, None]
        case.require_close(case.logits(both, given)[row], case.logits(single, fused)[0], own)


# --- ways to generate


@holds("an answer without KV cache is the cached one")
def without_cache(case: Case) -> None:
    if not _same_alone(case, NO_CACHE):
        raise NotApplicable("without a cache, the backbone itself fails or answers otherwise")
    inputs, fused = case.query(), case.fused
    case.require_same(case.answered(inputs, fused, use_cache=False), case.answered(inputs, fused))


@holds("a cache object given by the caller is used")
def given_cache(case: Case) -> None:
    inputs, fused = case.query(), case.fused
    cache = DynamicCache(config=case.model.backbone.config.get_text_config())
    case.require_same(case.answered(inputs, fused, past_key_values=cache), case.answered(inputs, fused))
    require(cache.get_seq_length(), "the cache is empty")


@holds("a static cache answers as the dynamic one")
def static_cache(case: Case) -> None:
    inputs, fused = case.query(), case.fused
    if not _same_alone(case, STATIC):
        raise NotApplicable("with a static cache, the backbone itself fails or answers otherwise")
    case.require_same(case.answered(inputs, fused, **STATIC), case.answered(inputs, fused))


@holds("beam search and several return sequences")
def beams(case: Case) -> None:
    inputs, fused = case.query(), case.fused
    if (problem := _alone(case, num_beams=3)) is not None:
        raise NotApplicable(f"the backbone's own beam search fails: {problem}")
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    answer = case.answered(inputs, fused, **options)
    require(answer.ids.shape == (2, NEW), f"two sequences have the shape {tuple(answer.ids.shape)}")
    if _same_alone(case, NO_CACHE, **options):
        case.require_same(answer, case.answered(inputs, fused, use_cache=False, **options))


@holds("sampling repeats with its seed")
def sampling(case: Case) -> None:
    inputs, fused = case.query(), case.fused
    if (problem := _alone(case, do_sample=True, num_return_sequences=3)) is not None:
        raise NotApplicable(f"the backbone's own sampling of several answers fails: {problem}")
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(case.answer(inputs, fused, do_sample=True, num_return_sequences=3))
    require(drawn[0].shape == (3, NEW), f"three sequences have the shape {tuple(drawn[0].shape)}")
    require(torch.equal(*drawn), "the same seed draws other tokens")


@holds("prompt-lookup decoding answers as greedy decoding")
def prompt_lookup(case: Case) -> None:
    if case.model.backbone._is_stateful:
        raise NotApplicable("the backbone has a recurrent state")
    if not _same_alone(case, LOOKUP, inputs=case.query(" ".join([LONG_QUESTION] * 3), images=0)):
        raise NotApplicable("with prompt-lookup decoding, the backbone itself fails or answers otherwise")
    inputs, fused = case.query(images=0), case.fused  # it may propose image tokens it has seen
    case.require_same(case.answered(inputs, fused, **LOOKUP), case.answered(inputs, fused))


@holds("repetition penalty and stop strings work with demonstrations")
def penalties(case: Case) -> None:
    inputs, fused = case.query(), case.fused
    answer = case.answer(inputs, fused, repetition_penalty=1.3)
    require(answer.shape == (1, NEW), f"the answer has the shape {tuple(answer.shape)}")
    words = case.processor.decode(case.answer(inputs, fused)[0, :2])
    if words.strip():
        stopped = case.model.generate(
            **inputs, demos=fused, do_sample=False, max_new_tokens=NEW, stop_strings=[words],
            tokenizer=case.processor.tokenizer,
        )  # fmt: skip
        require(stopped.shape[1] <= inputs["input_ids"].shape[1] + NEW, "a stop string does not stop")


class _Collector:
    """A streamer that keeps what it is shown."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.reshape(-1).cpu())

    def end(self) -> None:
        pass


@holds("a streamer sees the query and every new token, and no fused token")
def streaming(case: Case) -> None:
    inputs, fused = case.query(), case.fused
    streamer = _Collector()
    new = case.answer(inputs, fused, streamer=streamer)
    expected = torch.cat([inputs["input_ids"][0].cpu(), new[0].cpu()])
    require(torch.equal(torch.cat(streamer.tokens), expected), "the streamer sees other tokens")


@holds("eager and sdpa attention answer the same")
def attention_kinds(case: Case) -> None:
    backbone, inputs = case.model.backbone, case.query()
    before, by_kind = backbone.config._attn_implementation, []
    if not backbone._supports_sdpa:
        raise NotApplicable("the backbone has eager attention only")
    try:
        for kind in ("eager", "sdpa"):
            backbone.set_attn_implementation(kind)
            by_kind.append(case.logits(inputs, case.demos))
    finally:
        backbone.set_attn_implementation(before)
    case.require_close(by_kind[1], by_kind[0], partial(under_rounding, case, [inputs, case.query(LONG_QUESTION)]))


@holds("an answer from the KV of a prefix is the uncached one: alone, in a padded batch, with beams, in two threads")
def kept_prefix(case: Case) -> None:
    if not continues_after_kv(case.model.backbone):
        raise NotApplicable("with this version of transformers, prompts of this backbone do not go on behind given KV")
    fused = case.fused
    prefix = case.model.prefill(case.demos)
    queries = case.query(), case.query(QUESTION, LONG_QUESTION)
    kept = [value for value, _ in case.model.prefix_cache._values.values()]
    used = prefilled(case.model, [(prefix,)], queries[0]) is not None
    require(kept and used == all(serves(cache, padded=False) for cache in kept), "the KV is not used")
    lengths = [cache and cache.get_seq_length() for cache in kept]
    for inputs in queries:
        for beams in (1, 3) if _alone(case, num_beams=3) is None else (1,):
            expected, actual = (case.answered(inputs, demos, num_beams=beams) for demos in (fused, prefix))
            case.require_same(actual, expected)
    expected = case.answered(queries[0], fused)
    with ThreadPoolExecutor(3) as pool:
        for actual in pool.map(lambda _: case.answered(queries[0], prefix), range(3)):
            case.require_same(actual, expected)
    after = [cache and cache.get_seq_length() for cache in kept]
    require(after == lengths, "an answer changed the KV that is kept")


# --- what queries and demonstrations hold


@holds("queries and demonstrations with no image")
def image_counts(case: Case) -> None:
    case.answer(case.query(images=0), case.demos)
    case.answer(case.query(), [{"text": "A dax is a kind of wug."}, *case.demos])


@holds("queries and demonstrations with two images")
def several_images(case: Case) -> None:
    of_query, of_demo, refused = [noise(10), noise(11)], [noise(5), noise(6, 50, 70)], None
    two = {"images": of_demo, "text": "Two daxes here."}
    for images in (of_query, of_demo):
        try:
            if images is of_query:
                case.answer(case.query(images=2), case.demos)
            else:
                case.model.read([two])
                case.answer(case.query(), [two, *case.demos])
        except Exception as error:
            if (refused := _refused_alone(case, images)) != str(error):
                raise
    if refused is not None:
        raise NotApplicable(f"the backbone's own processor does not take two such images: {refused}")


def _refused_alone(case: Case, images: list[Image.Image]) -> str | None:
    """The error of the backbone's own processor for a prompt with some images; `None` where it takes them."""
    text = [case.processor.prompt(QUESTION, images=len(images))]
    try:
        case.processor.processor(images=[images], text=text, return_tensors="pt")
    except Exception as error:
        return str(error)
    return None


@holds("the earlier turns of a chat become demonstrations")
def few_shot_chat(case: Case) -> None:
    if case.processor.chat_template is None:
        raise NotApplicable("the backbone has no chat template")
    chat: list[dict[str, Any]] = []
    for demo in case.demos:
        words = demo.get("label") or demo.get("answer") or demo["text"]
        question_parts = [{"type": "image", "image": demo["image"]}, {"type": "text", "text": QUESTION}]
        chat += [{"role": "user", "content": question_parts}]
        chat += [{"role": "assistant", "content": [{"type": "text", "text": words}]}]
    last = [{"type": "image", "image": noise(10)}, {"type": "text", "text": QUESTION}]
    chat += [{"role": "user", "content": last}]
    inputs = case.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(case.model.device, case.model.dtype)
    require(len(inputs["chat_demos"]) == len(case.demos), f"{len(inputs['chat_demos'])} turns became demonstrations")
    case.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


@holds("a chat keeps its system turn when earlier turns become demonstrations")
def system_turn(case: Case) -> None:
    rule = "Answer with one word."
    system = {"role": "system", "content": [{"type": "text", "text": rule}]}
    query = {"role": "user", "content": [{"type": "image", "image": noise(10)}, {"type": "text", "text": QUESTION}]}
    try:
        plain = case.processor.apply_chat_template([system, query], add_generation_prompt=True)
    except Exception as error:
        raise NotApplicable("the backbone's chat template takes no system turn") from error
    if rule not in plain:
        raise NotApplicable("the backbone's chat template leaves system turns out")
    image_turn = [{"type": "image", "image": noise(1)}, {"type": "text", "text": "What do you see?"}]
    answered = {"role": "assistant", "content": [{"type": "text", "text": "A dax."}]}
    chat = [system, {"role": "user", "content": image_turn}, answered, query]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    options["return_tensors"] = "pt"
    inputs = case.processor.apply_chat_template(chat, **options).to(case.model.device, case.model.dtype)
    alone = case.processor.apply_chat_template([system, query], **options)
    same = torch.equal(inputs["input_ids"].cpu(), alone["input_ids"])
    require(same, "the prompt is not system turn and query")
    require([demo.text for demo in inputs["chat_demos"]] == ["A dax."], "the turns are not the demonstrations")
    case.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


@holds("demonstrations are chosen from a bank for each row of a batch, by the backbone's own features")
def chosen_for_each_row(case: Case) -> None:
    demos = [{"image": noise(seed), "label": f"name{seed}"} for seed in (10, 20, 30, 40)]  # two are the queries'
    inputs = case.query(QUESTION, LONG_QUESTION)
    with tempfile.TemporaryDirectory() as folder:
        bank = DemonstrationBank.build(case.model, demos, folder)
        chosen = bank.select_rows(case.model, inputs, 2, "image")
        alike = [row.texts[-1] for row in chosen] == [bank.texts()[0], bank.texts()[1]]
        require(alike, "the most similar image is not the chosen one")
        for by in ("image", "text", "fused", "mmices", "random"):
            rows = [[number for number, _ in bank.choose(None, 2)]] * 2
            if by != "random":
                features = bank.query_features(inputs, by)
                queries = [{kind: values[row] for kind, values in features.items()} for row in range(2)]
                rows = [[number for number, _ in bank.choose(query, 2, by)] for query in queries]
            expected = case.answered(inputs, [bank[row] for row in rows])
            case.require_same(case.answered(inputs, bank, shots=2, select=by), expected)


# --- calls beside one another


@holds("a read or an answer leaves no state behind for the next call")
def nothing_leaks(case: Case) -> None:
    short = case.query()
    try:
        long = case.query(images=2)
    except ValueError:  # a processor of one image a prompt
        long = case.query(LONG_QUESTION)
    fused = case.fused
    before = case.logits(short, fused)
    case.answer(long, fused)
    case.model.read(case.demos[::-1])
    require(difference(case.logits(short, fused), before) == 0, "the same call gives other logits after another call")
    expected = case.answered(short, fused)
    case.answer(long)
    case.model.read(case.demos[:1])
    case.require_same(case.answered(short, fused), expected)


@holds("two threads with different demonstrations get the answers they get alone")
def two_threads(case: Case) -> None:
    inputs, fused = case.query(), case.fused
    given = [fused, fused[[2]], fused[[1, 0]], None]
    alone = [case.answered(inputs, demos) for demos in given]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda demos: case.answered(inputs, demos), given * 2)
        for actual, expected in zip(together, alone * 2, strict=True):
            case.require_same(actual, expected)
