"""Accuracy of aim-tiny and its controls on naming episodes: held-out concepts under held-out names.

    python examples/aim_tiny/evaluate.py --episodes 100                 # a table
    python examples/aim_tiny/evaluate.py --episodes 400 --json          # {"2-way 8": {"aim": ..., "full": ...}, ...}
    python examples/aim_tiny/evaluate.py --cells "operator 8,attribute 16" --repo build/trained    # tasks of tasks.py
    python examples/aim_tiny/evaluate.py --methods full,aim,text-kv,snapkv:ratio=.9    # published: baselines.py

An answer is right when greedy decoding gives exactly the gold name. That is so when every token of it is the most
likely one after the gold tokens before it, so one forward pass tells, without generating. The episodes of a seed are
the same for all methods and wordings. Where a prompt has more tokens than the backbone has positions, a method has no
accuracy (`null`; "too long" in the table).

`aim` is the projector of `--repo`, wherever its states enter; `aim_untrained` has none: the states of `--depth` are
put back at that depth. All AIM methods read the part of a demonstration that `read_span` of `--repo` names.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import tasks as rules
import torch
import world
from baselines import Piece, answered, is_baseline
from corpus import IMAGE_IDS
from loading import load_backbone, load_interleaved, load_plugin
from quick import run
from support import CONTROLS, OUT, progress, write
from transformers import LlavaForConditionalGeneration
from vision import pixels
from words import BOS, IMAGE, PAD, ids, token_id
from world import WORDINGS

CELLS = {"2-way 2": (2, 1), "2-way 8": (2, 4), "2-way 16": (2, 8), "2-way 32": (2, 16), "5-way 5": (5, 1),
         "5-way 10": (5, 2), "5-way 15": (5, 3), "5-way 30": (5, 6), "8-way 16": (8, 2), "16-way 16": (16, 1),
         "16-way 32": (16, 2), "16-way 64": (16, 4), "16-way 128": (16, 8)}  # fmt: skip
METHODS = ("zero_shot", "text_only", "full", "full_interleaved", "oracle_captions", "aim", "aim_paper", "aim_generic",
           "aim_shuffled_images", "aim_random_projector", "aim_untrained",
           "aim_untrained_shuffled_images")  # fmt: skip
SHUFFLED = "_shuffled_images"
TRAINED = {  # controls that are no part of the shipped checkpoint
    "aim_paper": "python examples/aim_tiny/build.py --only aim_paper",
    "aim_generic": "python examples/aim_tiny/build.py --only aim_generic",
    "full_interleaved": "python examples/aim_tiny/build.py --only interleaved",
}
TOKENS = 12_000  # tokens a forward pass


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """A demonstration: an image of a pool, and the words before and after it.

    `kept`: tokens at its end that become fused tokens; all its words when `None`. `asked`: tokens before its answer.
    """

    image: tuple[int, int]
    head: str
    text: str
    kept: int | None = None
    asked: int = 0

    @property
    def ids(self) -> list[int]:
        return [token_id(BOS), *ids(self.head), *IMAGE_IDS, *ids(self.text)]

    @property
    def words(self) -> list[int]:
        """The words under its fused tokens, as AIM reads it: with nothing before the image."""
        text = ids(self.text)
        return text if self.kept is None else text[len(text) - self.kept :]


@dataclass(frozen=True)
class Query:
    image: tuple[int, int]
    head: str
    text: str
    answer: str

    @property
    def prompt(self) -> list[int]:
        return [*ids(self.head), *IMAGE_IDS, *ids(self.text)]


@dataclass(frozen=True)
class Task:
    """One episode in one wording: what is shown, what is asked."""

    demos: list[Demo]
    captions: list[str]
    query: Query
    name: str


def task(seed: str, ways: int, shots: int, split: str, wording: str, span: str = "text") -> Task:
    p, w = world.plan_of(seed, ways, shots, split), WORDINGS[wording]
    demos = []
    for way, index in p.demos:
        answer = w.answer.format(p.bindings[way])
        text, asked = world.join(w.question, answer), len(ids(w.question))
        demos.append(Demo((p.concept_ids[way], index), w.head, text, kept(answer, span), asked))
    captions = [world.caption(world.pool_scene(split, *demo.image)) + " ." for demo in demos]
    way, index = p.query
    query = Query((p.concept_ids[way], index), w.head, w.question, w.answer.split("{}")[0] + p.bindings[way])
    return Task(demos, captions, query, p.bindings[way])


def task_of(episode: rules.Episode, span: str = "text") -> Task:
    """An episode of tasks.py, with its first query; right is the whole answer."""
    demos = [
        Demo((s.concept, s.index), "", world.join(s.question, s.answer), kept(s.answer, span), len(ids(s.question)))
        for s in episode.demos
    ]
    captions = [world.caption(s.scene) + " ." for s in episode.demos]
    q = episode.queries[0]
    return Task(demos, captions, Query((q.concept, q.index), "", q.question, q.answer), q.answer)


def asked_of(seed: str, split: str) -> Task:
    """A question about an attribute of one image, without demonstrations: for `zero_shot`."""
    rng = random.Random(f"questions {seed}")
    image = rng.randrange(len(world.concepts(split))), rng.randrange(world.IMAGES_PER_CONCEPT[split])
    attribute = rng.choice(sorted(world.QUESTIONS))
    answer = getattr(world.pool_scene(split, *image), attribute)
    question = f"question {rng.choice(world.QUESTIONS[attribute])} answer"
    return Task([], [], Query(image, "", question, answer), answer)


def kept(answer: str, span: str) -> int | None:
    """What `Demo.kept` is where AIM reads this span of a demonstration."""
    return len(ids(answer)) if span == "answer" else None


def tasks_of(cell: str, split: str, wording: str, seed: int, episodes: int, span: str = "text") -> list[Task]:
    """The episodes of a cell: one of `CELLS`, `questions`, or a task of tasks.py and a number of demonstrations."""
    name, _, shots = cell.partition(" ")
    if name == "questions":
        return [asked_of(f"{seed}.{e}", split) for e in range(episodes)]
    if name in (*rules.TASKS, *rules.LOOKING):
        return [task_of(rules.episode(name, f"{seed}.{e}", split, int(shots)), span) for e in range(episodes)]
    return [task(f"{seed}.{e}", *CELLS[cell], split, wording, span) for e in range(episodes)]


def cells_of(split: str) -> list[str]:
    """The cells for which a split has concepts enough."""
    return [cell for cell, (ways, _) in CELLS.items() if ways <= len(world.concepts(split))]


def as_read(t: Task) -> Task:
    """The demonstrations as the package has them read: nothing stands before their images."""
    return replace(t, demos=[replace(demo, head="") for demo in t.demos])


def shuffled(t: Task) -> Task:
    """The same demonstrations with their images shuffled."""
    images = [demo.image for demo in t.demos]
    random.Random(f"{images}").shuffle(images)
    return replace(t, demos=[replace(demo, image=image) for demo, image in zip(t.demos, images, strict=True)])


def insert(
    vectors: torch.Tensor, tokens: torch.Tensor, model, images: list[tuple[int, int]], features
) -> torch.Tensor:
    """Put the projected features of images in the places of `<image>`, as LLaVA does."""
    shown = model.model.multi_modal_projector(features[tuple(torch.tensor(images).T)].float())
    return vectors.masked_scatter((tokens == token_id(IMAGE)).unsqueeze(-1), shown.to(vectors.dtype))


def pad(rows: list[list[int]]) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [token_id(PAD)] * (length - len(row)) for row in rows])


def prompt(method: str, t: Task) -> tuple[list[int], list[tuple[int, int]], int]:
    """Token ids before the answer, the images they hold, and how many of the ids, from the second on, are fused."""
    tokens, images, fused = [token_id(BOS)], [], 0
    if method.startswith("aim"):
        tokens += [word for demo in t.demos for word in demo.words]
        fused = len(tokens) - 1
    elif method != "zero_shot":
        for demo, caption in zip(t.demos, t.captions, strict=True):
            if method.startswith("full"):
                tokens += demo.ids[1:]
                images.append(demo.image)
            else:
                middle = ids(caption) if method == "oracle_captions" else []
                tokens += ids(demo.head) + middle + ids(demo.text)
    return tokens + t.query.prompt, [*images, t.query.image], fused


# --- models ----------------------------------------------------------------------------------------------------------


class Bench:
    """The frozen backbone, the projectors, and the output of the vision tower for every pool image."""

    def __init__(
        self, split: str, load_in_4bit: bool = False, methods: tuple[str, ...] = METHODS, repo: Path = OUT,
        depth: int | None = None, backbone: Path = OUT / "backbone",
    ) -> None:  # fmt: skip
        self.split = split
        self.span = json.loads((repo / "config.json").read_text())["read_span"]
        self.backbone = load_backbone(load_in_4bit, backbone)
        self.features = features(self.backbone, split)
        self.plugins = {m: load_plugin(m, self.backbone, repo, depth) for m in methods if m.startswith("aim")}
        self.interleaved = load_interleaved(load_in_4bit) if "full_interleaved" in methods else None
        self.kept: tuple = (None, None)
        self.prefixes: list = []
        self.rows: dict = defaultdict(list)  # of KV behind each prompt of a published method

    def written(self, method: str, t: Task) -> list[int] | None:
        """What a published method writes; `None` where a prompt has more tokens than the backbone has positions."""
        pieces = [Piece(demo.ids[1:], demo.image, len(ids(demo.text)) - demo.asked) for demo in t.demos]
        count, query = len(ids(t.query.answer)), Piece(t.query.prompt, t.query.image)

        def embed(tokens: torch.Tensor, images: list) -> torch.Tensor:
            return insert(self.backbone.get_input_embeddings()(tokens), tokens, self.backbone, images, self.features)

        words, rows, _ = answered(method, self.backbone, [*pieces, query], embed, count)
        self.rows[method].append(rows)
        return words

    @torch.no_grad()
    def right(self, method: str, tasks: list[Task]) -> list[bool]:
        """Whether each task is answered right; tasks of one cell and wording, so of about one length."""
        model = self.interleaved if method == "full_interleaved" else self.backbone
        shown = [as_read(t) for t in tasks] if method.startswith("aim") else tasks
        shown = [shuffled(t) for t in shown] if method.endswith(SHUFFLED) else shown
        prompts = [prompt(method, t) for t in shown]
        golds = [ids(t.query.answer) for t in shown]
        tokens = pad([p + gold for (p, _, _), gold in zip(prompts, golds, strict=True)])
        vectors = insert(
            model.get_input_embeddings()(tokens), tokens, model, [i for p in prompts for i in p[1]], self.features
        )
        entering, holes = {}, torch.zeros(tokens.shape, dtype=torch.bool)
        if method.startswith("aim"):
            entering = self.plugins[method].entering(self.states(method, shown))
            for row, (_, _, count) in enumerate(prompts):
                holes[row, 1 : 1 + count] = True
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        hidden = run(model.model.language_model, vectors, positions, places=holes, entering=entering)
        verdicts = []
        for row, ((p, _, _), gold) in enumerate(zip(prompts, golds, strict=True)):
            predicted_ids = model.lm_head(hidden[row, len(p) - 1 : len(p) + len(gold) - 1]).argmax(-1).tolist()
            verdicts.append(predicted_ids == gold)
        return verdicts

    def states(self, method: str, tasks: list[Task]) -> torch.Tensor:
        """What the projector of a method reads of all demonstrations; read once for the methods that read the same."""
        read = {layer for plugin in self.plugins.values() for layer in plugin.read_layers}
        layers = sorted(read - {-1}) + [-1] * (-1 in read)
        demos = [demo for t in tasks for demo in t.demos]
        if self.kept[0] != demos:
            self.kept = demos, torch.stack(self.read(demos, layers), 1)
        return torch.cat([self.kept[1][:, layers.index(k)] for k in self.plugins[method].read_layers], -1)

    def read(self, demos: list[Demo], layers: list[int]) -> list[torch.Tensor]:
        """The states that `projector.read` gives, sooner: an image is read once for all that show it."""
        model, past = self.backbone, self.prefix(layers)
        texts = [ids(demo.text) for demo in demos]
        tokens = pad(texts)
        where = tuple(torch.tensor([demo.image for demo in demos]).T)
        positions = (past[0][0].shape[-2] + torch.arange(tokens.shape[1])).expand(tokens.shape)
        last = None if -1 in layers else max(layers)
        seen = [(k[where], v[where]) for k, v in past]
        vectors = model.get_input_embeddings()(tokens)
        states = run(model.model.language_model, vectors, positions, layers=last, kept=tuple(layers), past=seen)
        spans = [slice(len(text) - len(demo.words), len(text)) for text, demo in zip(texts, demos, strict=True)]
        return [torch.cat([row[span] for row, span in zip(rows, spans, strict=True)]) for rows in states]

    def prefix(self, layers: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of `<s>` and image, for every pool image, layer by layer."""
        if not self.prefixes:
            model, (concepts, count) = self.backbone, self.features.shape[:2]
            tokens = torch.tensor([[token_id(BOS), *IMAGE_IDS]] * count)
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
            last, caches = None if -1 in layers else max(layers), []
            for concept in range(concepts):
                vectors = insert(
                    model.get_input_embeddings()(tokens), tokens, model, [(concept, i) for i in range(count)],
                    self.features,
                )  # fmt: skip
                caches.append([])
                run(model.model.language_model, vectors, positions, layers=last, kept=tuple(layers), cache=caches[-1])
            self.prefixes = [tuple(torch.stack(kind) for kind in zip(*layer, strict=True))
                             for layer in zip(*caches, strict=True)]  # fmt: skip
        return self.prefixes


@torch.no_grad()
def features(model: LlavaForConditionalGeneration, split: str) -> torch.Tensor:
    """Patch features of the split's pool, `(concepts, images, 64, width)`, computed once a run."""
    rows = []
    for concept in progress(range(len(world.concepts(split))), f"look at {split} images", leave=False):
        import numpy as np

        drawn = np.stack(
            [np.asarray(world.pool_image(split, concept, i)) for i in range(world.IMAGES_PER_CONCEPT[split])]
        )
        rows.append(model.model.vision_tower(pixels(drawn), output_hidden_states=True).hidden_states[-1][:, 1:])
    return torch.stack(rows)


# --- the loop --------------------------------------------------------------------------------------------------------


def too_long(bench: Bench, method: str, t: Task) -> bool:
    """Whether a prompt with its answer has more tokens than the backbone has positions."""
    longest = bench.backbone.config.text_config.max_position_embeddings
    return len(prompt(method, t)[0]) + len(ids(t.query.answer)) > longest


def verdicts(bench: Bench, methods: list[str], tasks: list[Task]) -> dict[str, list[bool]]:
    """Right or wrong by method, in batches of about as many tokens; what reads the same goes together.

    Methods whose prompts are too long are left out.
    """
    written = {m: [bench.written(m, t) for t in tasks] for m in methods if is_baseline(m)}
    own = [m for m in methods if m not in written]
    methods = [m for m in own if not any(too_long(bench, m, t) for t in tasks)]
    groups = [[m] for m in methods if not m.startswith("aim")]
    groups.append([m for m in methods if m.startswith("aim") and not m.endswith(SHUFFLED)])
    groups.append([m for m in methods if m.endswith(SHUFFLED)])
    right_by_method: dict[str, list[bool]] = {m: [] for m in methods}
    for group in filter(None, groups):
        size = max(
            1, TOKENS // (len(prompt(group[0], tasks[0])[0]) + (12 * len(tasks[0].demos) if "aim" in group[0] else 0))
        )
        for start in range(0, len(tasks), size):
            for method in group:
                right_by_method[method] += bench.right(method, tasks[start : start + size])
    for method, answers in written.items():
        if None not in answers:
            right_by_method[method] = [words == ids(t.query.answer) for words, t in zip(answers, tasks, strict=True)]
    return right_by_method


def evaluate(
    bench: Bench, methods: list[str], cells: list[str], wordings: list[str], episodes: int, seeds: int
) -> dict:
    """`{cell: {method: accuracy, "tokens": {method: mean prompt tokens}, "by_wording": {...}, "by_seed": {...}}}`.

    `right` has a digit for each episode, 1 where it is answered right, in one order for all methods. An accuracy is
    `None` where prompts are too long.
    """
    report: dict = {}
    work = [(cell, wording, seed) for cell in cells for wording in wordings for seed in range(seeds)]
    scores: dict = {}
    lengths: dict = defaultdict(lambda: defaultdict(list))
    digits: dict = defaultdict(str)
    for cell, wording, seed in progress(work, "evaluate"):
        tasks = tasks_of(cell, bench.split, wording, seed, episodes, bench.span)
        right_by_method = verdicts(bench, methods, tasks)
        for method in methods:
            scores[cell, method, wording, seed] = (
                sum(right_by_method[method]) / len(tasks) if method in right_by_method else None
            )
            digits[cell, method] += "".join(str(int(right)) for right in right_by_method.get(method, ()))
            own = bench.rows.pop(method) if is_baseline(method) else [len(prompt(method, t)[0]) for t in tasks[:20]]
            lengths[cell][method] += own
    for cell in cells:
        by = {m: {(w, s): scores[cell, m, w, s] for w in wordings for s in range(seeds)} for m in methods}
        entry = report[cell] = {m: mean(by[m].values()) for m in methods}
        entry["tokens"] = {m: mean(lengths[cell][m]) for m in methods}
        entry["by_wording"] = {m: {w: mean(by[m][w, s] for s in range(seeds)) for w in wordings} for m in methods}
        entry["right"] = {m: digits[cell, m] for m in methods}
        entry["by_seed"] = {m: [mean(by[m][w, s] for w in wordings) for s in range(seeds)] for m in methods}
    return report


def mean(values) -> float | None:
    values = list(values)
    return None if None in values else round(sum(values) / len(values), 4)


def shown(accuracy: float | None) -> str:
    return "too long" if accuracy is None else f"{accuracy:.3f}"


def table(report: dict, methods: list[str]) -> str:
    """Accuracies and, last, mean prompt tokens of the full prompt and of AIM's; markdown, as in the README."""
    counted = [m for m in methods if m in ("full", "aim") or (m == "aim_untrained" and "aim" not in methods)]
    heads = ["demonstrations", *(f"`{m}`" for m in methods), *(f"tokens: {m}" for m in counted)]
    lines = [heads, ["---"] * len(heads)]
    for cell, entry in report.items():
        lines.append([cell, *(shown(entry[m]) for m in methods), *(f"{entry['tokens'][m]:.0f}" for m in counted)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def available(methods: list[str]) -> list[str]:
    """The methods whose weights are here; the others are named, with the command that trains them."""
    missing = [m for m in methods if m in TRAINED and not (CONTROLS / f"{m}.safetensors").exists()]
    for method in missing:
        print(
            f"{method}: no {CONTROLS.name}/{method}.safetensors; left out. Train it: {TRAINED[method]}",
            file=sys.stderr,
        )
    return [m for m in methods if m not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=400, help="episodes a cell, wording and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument(
        "--wordings", default="this", help=f"comma-separated, of {', '.join(WORDINGS)}; or 'all': {world.EVALUATED}"
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument(
        "--cells",
        help=f"of {', '.join(CELLS)} (all by default), questions; or a task of tasks.py and a number",
    )
    parser.add_argument("--repo", type=Path, default=OUT, help="repository whose projector is `aim`")
    parser.add_argument("--backbone", type=Path, default=OUT / "backbone", help="in place of the shipped one")
    parser.add_argument("--depth", type=int, help="of aim_untrained; by default two fifths of the layers")
    parser.add_argument("--load-in-4bit", action="store_true", help="bitsandbytes NF4 for the language model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", help="write the JSON here too")
    args = parser.parse_args()
    methods = available(args.methods.split(","))
    cells = args.cells.split(",") if args.cells else cells_of(args.split)
    wordings = list(world.EVALUATED) if args.wordings == "all" else args.wordings.split(",")
    report = evaluate(
        Bench(args.split, args.load_in_4bit, tuple(methods), args.repo, args.depth, args.backbone),
        methods,
        cells,
        wordings,
        args.episodes,
        args.seeds,
    )
    print(json.dumps(report, indent=1) if args.json else table(report, methods))
    if args.out:
        write(Path(args.out), lambda p: p.write_text(json.dumps(report, indent=1)))


if __name__ == "__main__":
    main()
