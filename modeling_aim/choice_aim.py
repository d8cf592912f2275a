"""The choice of a depth: which demonstrations are left out, what answers them, and the statistics of their scores."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .configuration_aim import AimConfig, default_depth
from .demonstrations_aim import Demonstration, Demos, RawDemonstration, kind_of, parse_demos
from .images_aim import ImageRules

if TYPE_CHECKING:
    from .processing_aim import AimProcessor

SIGNIFICANCE_LEVEL = 0.05  # significance level of a difference to words only
FEW_ANSWERS = 20  # with fewer answers, a difference that is not significant may still be real
NEGLIGIBLE = 0.02  # nats a token: a smaller difference is no reason to leave the default
MAX_SIGN_FLIPS = 4096  # random sign vectors; all of them where there are no more


@dataclass(frozen=True)
class DepthScore:
    """How likely the left-out answers are for one depth, or for a baseline.

    Args:
        name: `"zero-shot"`, `"words only"` or `"depth 13"`.
        depth: where states enter; 0 is words only, `None` no demonstrations.
        log_likelihood: mean log-likelihood of a token of the answer, in nats; each answer counts the same.
        error: its standard error.
        over_words: mean of the paired differences to words only.
        over_words_error: standard error of that difference.
        accuracy: share of answers whose every token is the most likely one after those before it.
    """

    name: str
    depth: int | None
    log_likelihood: float
    error: float
    over_words: float
    over_words_error: float
    accuracy: float


@dataclass(frozen=True)
class DepthChoice:
    """The result of `choose_depth`. Nothing changes before `apply`.

    Args:
        depth: the best depth, or the model's own where the result is not significant.
        beats_words: whether states at that depth are better than the demonstrations' words alone, beyond chance.
        verdict: the result in a sentence.
        rows: zero-shot, words only, and each depth.
        left_out: number of left-out answers.
        demonstrations: number of demonstrations that were read.
        notes: remarks: what was not left out, what did not fit, and so on.
    """

    depth: int
    beats_words: bool
    verdict: str
    rows: tuple[DepthScore, ...]
    left_out: int
    demonstrations: int
    notes: tuple[str, ...] = ()

    def apply(self, model: Any) -> Any:
        """Have `model` read and put back states at this depth from now on (`model.set_depth`), and return it."""
        model.set_depth(self.depth)
        return model

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'':12}{'log-likelihood':>18}{'over words only':>20}{'accuracy':>10}"]
        for row in self.rows:
            likelihood = f"{row.log_likelihood:.3f} ± {row.error:.3f}"
            over = "" if row.depth == 0 else f"{row.over_words:+.3f} ± {row.over_words_error:.3f}"
            chosen = "  <" if self.beats_words and row.depth == self.depth else ""
            lines.append(f"{row.name:12}{likelihood:>18}{over:>20}{row.accuracy:>10.2f}{chosen}")
        return "\n".join([*lines, self.verdict, *self.notes])


@dataclass(frozen=True)
class LeftOut:
    """A demonstration that is left out and becomes a query.

    Args:
        number: its index among those that are read.
        others: indices of the demonstrations it may be answered from, in order of preference; as many as fit are
            shown.
        known: number of characters that all texts of its task begin with ("this is"); they are part of the query.
    """

    number: int
    others: tuple[int, ...]
    known: int = 0


# --- what is left out


def raw_tasks(demos: Demos, rules: ImageRules | None = None) -> list[list[Any]]:
    """The raw demonstrations of each task, none of them opened; `rules` say which images may be."""

    def are_raw(value: object) -> bool:
        return isinstance(value, (list, tuple)) and all(kind_of(entry) == "demonstration" for entry in value)

    if kind_of(demos) is None and isinstance(demos, (list, tuple)):
        if are_raw(demos):
            return [list(demos)]
        if all(kind_of(task) is None and are_raw(task) for task in demos):
            return [list(task) for task in demos]
    parsed = parse_demos(demos, rules)  # raises for an unknown kind
    read = parsed if isinstance(parsed, list) else [parsed]
    kinds = sorted({str(kind_of(part)) for part in read})
    raise ValueError(
        "choose_depth reads demonstrations at many depths, so it takes raw ones: a list of (image, text), (image, "
        f"question, answer) or dicts with these, or one such list a task. Got {', '.join(kinds)}."
    )


def _bare(demo: RawDemonstration) -> Demonstration:
    """A raw demonstration without its images, which are not opened."""
    if isinstance(demo, Mapping):
        return Demonstration.of({key: value for key, value in demo.items() if key not in ("image", "images")})
    return Demonstration.of(([], *demo[1:]) if isinstance(demo, (list, tuple)) else demo)


def drawn_demonstrations(
    tasks: Sequence[Sequence[Any]], processor: AimProcessor, most: int, seed: int
) -> tuple[list[Demonstration], list[LeftOut], list[str]]:
    """The demonstrations that are read, those of them that are left out, and notes for the user."""
    used: list[Demonstration] = []
    left_out: list[LeftOut] = []
    open_ended = not_drawn = 0
    for number, task in enumerate(tasks):
        rng = random.Random(f"{seed} {number}")
        bare = [_bare(demo) for demo in task]
        named = _is_naming(bare, processor)
        drawn = [Demonstration.of(task[i], processor.image_rules) for i in _pool(bare, most, named, rng)]
        not_drawn += len(task) - len(drawn)
        pool = list({demo.key: demo for demo in drawn}.values())  # an equal one would give the answer away
        says = Counter(map(_says, pool))
        known = _shared_words(pool) if named and not any(map(processor.is_label, pool)) else 0
        first = len(used)
        used += pool
        for place, demo in enumerate(pool):
            has_query = bool(demo.images) or demo.question is not None
            if not has_query or len(pool) < 2 or (named and says[_says(demo)] < 2):
                continue
            open_ended += not named
            others = [other for other in range(len(pool)) if other != place]
            rng.shuffle(others)
            others.sort(key=lambda other: _says(pool[other]) != _says(demo))  # its own label must be shown
            left_out.append(LeftOut(first + place, tuple(first + other for other in others), known))
    if not left_out:
        raise ValueError(_nothing_left_out(used, max(map(len, tasks), default=0)))
    notes = []
    if not_drawn:
        notes.append(f"{len(used)} demonstrations were used, {not_drawn} not (most={most} a task, drawn at random).")
    if len(left_out) < len(used):
        notes.append(
            f"{len(used) - len(left_out)} demonstrations were shown but not asked for: no other one has their label, "
            "or they have neither image nor question."
        )
    if open_ended:
        notes.append(
            f"{open_ended} answers are captions or sentences that do not repeat: the other demonstrations show their "
            "style more than their content, so this is weak evidence. Labels are better evidence."
        )
    return used, left_out, notes


def _is_naming(demos: Sequence[Demonstration], processor: AimProcessor) -> bool:
    """Whether the texts of demonstrations are labels: bare names, or texts of which at least half repeat."""
    says = Counter(map(_says, demos))
    again = sum(count for count in says.values() if count > 1)
    return all(processor.is_label(demo) for demo in demos) or 2 * again >= len(demos)


def _shared_words(demos: Sequence[Demonstration]) -> int:
    """Number of characters that all texts begin with, in whole words; at least one word is left. 0 with questions."""
    if not demos or any(demo.question is not None for demo in demos):
        return 0
    words = [demo.text.split(" ") for demo in demos]
    shared = 0
    while all(len(row) > shared + 1 and row[: shared + 1] == words[0][: shared + 1] for row in words):
        shared += 1
    return len(" ".join([*words[0][:shared], ""]))


def _says(demo: Demonstration) -> tuple[str | None, str]:
    return demo.question, demo.text


def _pool(task: Sequence[Demonstration], most: int, named: bool, rng: random.Random) -> list[int]:
    """Indices of at most `most` demonstrations, in their order; labels in turn, at least two of each."""
    if len(task) <= most:
        return list(range(len(task)))
    order = rng.sample(range(len(task)), len(task))
    if not named:
        return sorted(order[:most])
    groups: dict[Any, list[int]] = {}
    for i in order:
        groups.setdefault(_says(task[i]), []).append(i)
    several = [group for group in groups.values() if len(group) > 1][: max(most // 2, 1)]
    turns = [
        group[turn] for turn in range(max(map(len, several), default=0)) for group in several if turn < len(group)
    ]
    rest = [i for i in order if i not in set(turns)]
    return sorted([*turns, *rest][:most])


def _nothing_left_out(used: Sequence[Demonstration], most: int) -> str:
    """Why nothing can be left out of the demonstrations, of which a task has at most `most`."""
    if most < 2 or len(used) < 2:
        return (
            f"choose_depth got {len(used)} demonstration{'s' * (len(used) != 1)} a task (equal ones count once): when "
            "one is left out, no other is there to answer it from. Give at least 2 of one task, better 16 or more."
        )
    return (
        f"Each of the {len(used)} demonstrations says something else ({', '.join(d.text[:20] for d in used[:4])}, "
        "...), or has neither image nor question: when one is left out, no other one has its label, so leaving out "
        "cannot tell a depth. Give at least two demonstrations of a label."
    )


# --- the verdict


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)
    return float(values.mean()), float(error)


def chosen_depth(
    config: AimConfig,
    scores: Mapping[int | None, Sequence[float]],
    right: Mapping[int | None, Sequence[bool]],
    demonstrations: int,
    notes: list[str],
) -> DepthChoice:
    """Choose a depth from the scores of all answers."""
    exact = {source: torch.tensor(row, dtype=torch.float64) for source, row in scores.items()}
    rows = []
    for source, values in exact.items():
        name = {None: "zero-shot", 0: "words only"}.get(source, f"depth {source}")
        figures = (*_mean_and_error(values), *_mean_and_error(values - exact[0]))
        rows.append(DepthScore(name, source, *figures, sum(right[source]) / len(values)))
    zero, words, *deep = rows
    start = default_depth(config.get_text_config())
    own = config.entry_layers[0] if len(config.entry_layers) == 1 and config.entry_layers[0] > 0 else start
    p_values = corrected_p_values(torch.stack([exact[row.depth] - exact[0] for row in deep]))
    better = [row for row, p_value in zip(deep, p_values, strict=True) if p_value <= SIGNIFICANCE_LEVEL]
    level = _level_with_best(better, exact)
    pick = min(level, key=lambda row: abs((row.depth or 0) - start), default=None)  # the first is the best
    best = max(deep, key=lambda row: row.log_likelihood)
    count = len(exact[0])
    over = f"{(pick or best).over_words:+.3f} ± {(pick or best).over_words_error:.3f} nats a token"
    if pick is not None:
        verdict = f"Depth {pick.depth} beats words only by {over[1:]} ({count} answers)."
        if pick is not level[0]:
            verdict += f" Depth {level[0].depth} is level with it, but further from the default."
    elif (count < FEW_ANSWERS and best.over_words > 0) or 2.0**-count > SIGNIFICANCE_LEVEL:
        verdict = (
            f"Too few demonstrations to tell ({count} answers): the best depth, {best.depth}, is at {over} to words "
            f"only, which may be chance. Depth {own} stays."
        )
    else:
        verdict = (
            f"No depth beats words only: the best, {best.depth}, is at {over} to it ({count} answers). What the "
            f"images of the demonstrations show does not help here. Depth {own} stays."
        )
    if zero.log_likelihood > max(best.log_likelihood, words.log_likelihood):
        notes = [*notes, "Zero-shot is better than all of them: these demonstrations do not help this backbone."]
    depth = own if pick is None else pick.depth or start
    return DepthChoice(depth, pick is not None, verdict, tuple(rows), count, demonstrations, tuple(notes))


def _level_with_best(rows: Sequence[DepthScore], scores: Mapping[int | None, torch.Tensor]) -> list[DepthScore]:
    """The depths below the best by at most the standard error of the difference or `NEGLIGIBLE`; best first."""
    level: list[DepthScore] = []
    for row in sorted(rows, key=lambda row: -row.log_likelihood):
        deficit, error = _mean_and_error(scores[(level or [row])[0].depth] - scores[row.depth])
        if deficit <= max(error, NEGLIGIBLE):
            level.append(row)
    return level


def corrected_p_values(differences: torch.Tensor) -> list[float]:
    """The p-value of each depth's mean difference to words only, corrected for the number of depths.

    A sign-flip permutation test: under the null hypothesis the sign of an answer's differences is arbitrary, so one
    random sign per answer is applied to all depths. The statistic of a draw is the largest mean-to-deviation ratio
    over the depths.

    Args:
        differences: `(depths, answers)`.

    Returns:
        A p-value for each depth.
    """
    count = differences.shape[1]
    if 2**count <= MAX_SIGN_FLIPS:
        signs = 1.0 - 2.0 * (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).to(differences)
    else:
        drawn = torch.randint(0, 2, (MAX_SIGN_FLIPS, count), generator=torch.Generator().manual_seed(0))
        signs = torch.cat([torch.ones(1, count), 1.0 - 2.0 * drawn]).to(differences)
    means = signs @ differences.T / count
    squares = differences.square().mean(dim=1)  # whatever the signs
    spread = (squares - means.square()).clamp(min=1e-12)
    best = (means / spread.sqrt()).amax(dim=1)
    own = means[0] / spread[0].sqrt()  # the first draw flips no sign
    return [float((best >= score - 1e-9).double().mean()) for score in own]
