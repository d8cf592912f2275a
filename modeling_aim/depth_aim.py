"""Choose the depth at which states enter, on the user's own demonstrations: leave each one out and score its answer.

Everything that uses a model's hooks is a method of the model, since a class loaded as remote code has its own context
variables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .backbone_aim import check_depth, longest_prompt
from .batching_aim import CPU_PASS_TOKENS, PASS_TOKENS
from .choice_aim import DepthChoice, LeftOut, chosen_depth, drawn_demonstrations, raw_tasks
from .configuration_aim import AimConfig, deepest_entry, default_depth
from .demonstrations_aim import Demonstration, Demos, FusedDemonstrations
from .injection_aim import FusedPrompt, injected
from .state_aim import preserved_state

if TYPE_CHECKING:
    from .processing_aim import AimProcessor

MOST_DEPTHS = 12  # in a deep decoder, evenly spread; plus the default depth and the model's own
ASKED = ("chat", "plain")


class DepthMixin:
    """What `AimForConditionalGeneration` does to choose a depth; `self` is the model."""

    @torch.no_grad()
    def choose_depth(
        self: Any,
        demos: Demos,
        depths: Sequence[int] | None = None,
        *,
        most: int = 32,
        prompts: str = "chat",
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> DepthChoice:
        """Choose the depth at which states should enter, from demonstrations alone; the model is not changed.

        Each demonstration is left out in turn and becomes a query that is answered from the others of its task. Its
        score is the likelihood of its answer: its label, the answer to its question, or the whole text of a caption.
        Where texts repeat, the words that all of them begin with are part of the query. A labelled demonstration is
        left out only if another one has the same label.

        All demonstrations are read once, for all depths together. Their states are kept in memory (not on the
        accelerator) until this returns: words x depths x hidden size numbers. The pass that reads them holds those of
        at most 8192 positions (1024 on a CPU) on the accelerator.

        Args:
            demos: raw demonstrations of a task, or a list of such lists, one for each task: several tasks give more
                evidence.
            depths: the candidates, from 1 to one less than the number of decoder layers. `None`: all of them, or about
                a dozen, evenly spread, in a deep decoder.
            most: demonstrations of each task that are used, drawn with `seed` where there are more, labels in turn.
            prompts: how the left-out question is written: `"chat"`, in the backbone's chat template where it has one,
                or `"plain"`, as demonstrations are read. Labels and captions are always written as they are read.
            seed: of the random choice of demonstrations.
            progress: called after each demonstration read and each batch of scored prompts, with the number of
                computed prompts and their total.

        Raises:
            ValueError: the model has weights, which are bound to their depth; the backbone has no stack of decoder
                layers; there are fewer than two demonstrations, or no label occurs twice; a demonstration is too long
                for the backbone; or a setting is out of its range.
        """
        check_depth(self.backbone)
        check_weightless(self.config)
        candidates = _candidates(self.config, depths)
        if prompts not in ASKED or most < 2:
            raise ValueError(f"prompts={prompts!r}, most={most}: expected one of {', '.join(ASKED)}, and at least 2.")
        tasks = raw_tasks(demos, self.image_rules)
        used, left_out, notes = drawn_demonstrations(tasks, self.processor, most, seed)
        total, done = len(used) + len(left_out) * (len(candidates) + 2), 0

        def computed(prompts: int) -> None:
            nonlocal done
            done += prompts
            if progress is not None:
                progress(done, total)

        states: dict[int, torch.Tensor] = {}
        for number, read, _ in self._read_batches(used, layers=candidates):
            states[number] = read.cpu().unflatten(-1, (len(candidates), -1))
            computed(1)
        words = self.text_token_ids(used)
        sources = [None, 0, *candidates]
        scores: dict[int | None, list[float]] = {source: [] for source in sources}
        right: dict[int | None, list[bool]] = {source: [] for source in sources}
        shown_counts: list[int] = []
        for batch in _batches(self, used, left_out, words):
            inputs, mask = _encoded(self.processor, [(used[query.number], query.known) for query in batch], prompts)
            contexts = [_fitting(self, query, used, words, inputs["input_ids"].shape[1]) for query in batch]
            shown_counts += map(len, contexts)
            inputs = inputs.to(self.device, self.dtype)
            for source in sources:
                fused = [_fused(self, query, source, candidates, states, words) for query in contexts]
                batch_scores = _answer_scores(self, inputs, mask, fused, source)
                scores[source] += batch_scores[0]
                right[source] += batch_scores[1]
                computed(len(batch))
        others = [len(query.others) for query in left_out]
        if sum(shown_counts) < sum(others):
            notes.append(
                f"Of up to {max(others)} other demonstrations {min(shown_counts)} to {max(shown_counts)} were shown: "
                f"more do not fit into the backbone's {longest_prompt(self.backbone.config)} positions."
            )
        return chosen_depth(self.config, scores, right, len(used), notes)

    def set_depth(self: Any, depth: int) -> None:
        """Read and put back states at another depth from now on; no other thread may be answering meanwhile.

        What was read at the earlier depth is then refused, by its source. Save the model to keep the new depth.

        Args:
            depth: from 1 to one less than the decoder's layers, less where its last layers have no keys and values of
                their own; 0 uses the embeddings of the words.

        Raises:
            ValueError: the model has weights, which are bound to their depth; or there is no such depth.
        """
        check_depth(self.backbone)
        check_weightless(self.config)
        deepest = deepest_entry(self.config.get_text_config())
        if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= deepest:
            raise ValueError(f"depth={depth!r}: expected a whole number from 0 to {deepest}.")
        self.config.read_layers, self.config.entry_layers = [depth], [depth]
        self.read_cache.clear()
        self.prefix_cache.clear()


def check_weightless(config: AimConfig) -> None:
    """Raise `ValueError` where a model has a projector, whose weights are bound to their depth."""
    if config.projector_form == "identity":
        return
    name = config.backbone_name_or_path or "BACKBONE"
    raise ValueError(
        f"This model has weights ({config.projector_form}, read at {config.read_layers}, entering at "
        f"{config.entry_layers}), and they are bound to their depth. To choose a depth for its backbone without "
        "weights: type(model).from_backbone(model.backbone, model.processor).choose_depth(demos), or aim tune "
        f"--backbone {name}. Weights for another depth are trained there: aim train --read-layers K."
    )


def _candidates(config: AimConfig, depths: Sequence[int] | None) -> list[int]:
    """The depths that are compared, in order."""
    text = config.get_text_config()
    layers, deepest = text.num_hidden_layers, deepest_entry(text)
    inner = list(range(1, deepest + 1))
    if depths is None:
        if not inner:
            raise ValueError(f"The decoder has {layers} layers; to choose a depth between layers takes two or more.")
        if len(inner) <= MOST_DEPTHS:
            return inner
        spread = {inner[i * (len(inner) - 1) // (MOST_DEPTHS - 1)] for i in range(MOST_DEPTHS)}
        return sorted(spread | {default_depth(text)} | set(config.entry_layers).intersection(inner))
    if not depths or not set(depths) <= set(inner) or len(set(depths)) < len(depths):
        raise ValueError(f"depths={list(depths)}: expected different whole numbers from 1 to {deepest}.")
    return sorted(depths)


def _batches(
    model: Any, used: Sequence[Demonstration], left_out: Sequence[LeftOut], words: Sequence[torch.Tensor]
) -> Iterator[list[LeftOut]]:
    """Left-out demonstrations by pass: all with or all without images, of similar length, bounded in positions."""
    lengths = dict(enumerate(model.processor.reading_lengths(used)))
    shown_tokens = {query.number: sum(len(words[other]) for other in query.others) for query in left_out}
    max_tokens = CPU_PASS_TOKENS if model.device.type == "cpu" else PASS_TOKENS
    order = sorted(left_out, key=lambda query: (bool(used[query.number].images), lengths[query.number], query.number))
    batch: list[LeftOut] = []
    longest = 0
    for query in order:
        longest = max(longest, lengths[query.number] + shown_tokens[query.number])
        other = batch and bool(used[query.number].images) != bool(used[batch[0].number].images)
        if batch and (other or (len(batch) + 1) * longest > max_tokens):
            yield batch
            batch, longest = [], lengths[query.number] + shown_tokens[query.number]
        batch.append(query)
    yield batch


# --- one pass


def _encoded(
    processor: AimProcessor, queries: Sequence[tuple[Demonstration, int]], prompts: str
) -> tuple[Any, torch.Tensor]:
    """Queries followed by their answers, and a mask of the answers' tokens.

    Args:
        processor: the model's.
        queries: demonstrations, each with the number of characters of its text that are part of the query.
        prompts: as for `choose_depth`.
    """
    texts, spans = [], []
    for demo, known in queries:
        front = processor.front(len(demo.images))
        words, start, end = processor.apply_template(demo)
        question = words[: start + known]
        if demo.question is not None and prompts == "chat" and processor.chat_template is not None:
            front, question = "", processor.prompt(demo.question, images=len(demo.images))
            question += "" if question[-1:].isspace() else " "
        texts.append(front + question + words[start + known : end])
        spans.append((len(front + question), len(texts[-1])))
    inputs, mask = processor.encode_spans([list(demo.images) for demo, _ in queries], texts, spans)
    empty = [demo.text for (demo, _), row in zip(queries, mask, strict=True) if not bool(row.any())]
    if empty:
        raise ValueError(f"The tokenizer finds no token in the answers of these demonstrations: {empty[:3]}.")
    return inputs, mask


def _fitting(
    model: Any, query: LeftOut, used: Sequence[Demonstration], words: Sequence[torch.Tensor], length: int
) -> list[int]:
    """The other demonstrations that fit before a prompt of `length` tokens, in their order."""
    longest = longest_prompt(model.backbone.config)
    room = None if longest is None else longest - length
    chosen: list[int] = []
    for other in query.others:
        if room is None or len(words[other]) <= room:
            chosen.append(other)
            room = None if room is None else room - len(words[other])
    if not chosen:
        shortest = min(len(words[other]) for other in query.others)
        raise ValueError(
            f"The demonstration {used[query.number].text[:40]!r} takes {length} tokens as a query, and the shortest "
            f"of the others {shortest}, but the backbone has {longest} positions: none fits before it. Give shorter "
            "demonstrations, or fewer or smaller images in each."
        )
    return sorted(chosen)


def _fused(
    model: Any,
    context: Sequence[int],
    depth: int | None,
    candidates: Sequence[int],
    states: Mapping[int, torch.Tensor],
    words: Sequence[torch.Tensor],
) -> FusedDemonstrations | None:
    """Demonstrations as they enter at a depth; at 0 the embeddings of their words, which equals a prompt of words."""
    if depth is None:
        return None
    ids = torch.cat([words[i] for i in context])
    if depth == 0:
        vectors = model.backbone.get_input_embeddings()(ids.to(model.device)[None])[0]
    else:
        vectors = torch.cat([states[i][:, candidates.index(depth)] for i in context]).to(model.device)
    return FusedDemonstrations(vectors, tuple(len(words[i]) for i in context), ids)


def _answer_scores(
    model: Any,
    inputs: Mapping[str, Any],
    mask: torch.Tensor,
    fused: Sequence[FusedDemonstrations | None],
    depth: int | None,
) -> tuple[list[float], list[bool]]:
    """Mean log-likelihood of the tokens of each row's answer, and whether each of them is the most likely one.

    Args:
        model: the model.
        inputs: the queries with their answers, padded on the left.
        mask: `(batch, length)`, true at the tokens of the answer.
        fused: demonstrations of each row.
        depth: where they enter, `None` where there are none.
    """
    prompt_inputs, prompt = dict(inputs), None
    if depth is not None:
        bos = getattr(model.config.get_text_config(), "bos_token_id", None)
        prompt = FusedPrompt(prompt_inputs, fused, bos, model.backbone, (depth,))
        prompt_inputs = prompt.inputs
    kept = mask.shape[1] - int(mask.int().argmax(dim=1).min()) + 1  # from the token before the first answer
    if "logits_to_keep" in inspect.signature(model.backbone.forward).parameters:
        prompt_inputs["logits_to_keep"] = kept
    with preserved_state(model.backbone), injected(prompt):
        logits = model.backbone(**prompt_inputs, use_cache=False, return_dict=True).logits
    logits = logits[:, -kept:-1].float().log_softmax(dim=-1)
    ids, here = (tensor[:, 1 - kept :].to(logits.device) for tensor in (inputs["input_ids"], mask))
    token_scores = logits.gather(-1, ids[..., None])[..., 0]
    likeliest = ((logits.argmax(dim=-1) == ids) | ~here).all(dim=1)
    return (torch.where(here, token_scores, 0.0).sum(dim=1) / here.sum(dim=1)).tolist(), likeliest.tolist()
