"""AIM projectors on the frozen backbone of aim-tiny: the shipped one, the paper's form, one without episodes.

    python examples/aim_tiny/projector.py aim            # also: aim_paper, aim_generic

The loop is the method: the frozen backbone reads every demonstration alone, the states of its text positions go
through the projector, stand in front of the query, and the loss of the frozen backbone's answer reaches the projector.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import torch
import world
from backbone import features_of, load
from corpus import IMAGE_IDS, Picture, random_picture
from quick import run
from support import (
    BUILD,
    ROOT,
    Checkpoint,
    cosine,
    optimizers_of,
    progress,
    ranks,
    return_memory,
    share_gradients,
    write,
)
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from words import BOS, EOS, IMAGE, PAD, ids, token_id

sys.path.insert(0, str(ROOT))
from modeling_aim.configuration_aim import AimConfig
from modeling_aim.projector_aim import AimProjector

FORMS = {
    "aim": {"read_layers": [3], "projector_form": "mlp", "projector_intermediate_size": 512},
    "aim_paper": {"read_layers": [-1], "projector_form": "linear_norm"},
    "aim_generic": {"read_layers": [3], "projector_form": "mlp", "projector_intermediate_size": 512},
}
STEPS = {"aim": 450, "aim_paper": 700, "aim_generic": 300}
RATE = {"aim": 6e-3, "aim_paper": 8e-3, "aim_generic": 6e-3}
MUON = {"aim", "aim_generic"}  # a single linear map learns three times sooner under AdamW
TOKENS, QUERIES = 6500, 4


@dataclass(frozen=True)
class Demo:
    """A demonstration: an image of a pool, and the words before and after it."""

    image: tuple[int, int]
    head: str
    text: str

    @property
    def ids(self) -> list[int]:
        return [token_id(BOS), *ids(self.head), *IMAGE_IDS, *ids(self.text)]

    @property
    def fused(self) -> int:
        """Fused tokens it becomes: one for every text token."""
        return len(self.ids) - len(IMAGE_IDS) - 1


@dataclass(frozen=True)
class Query:
    image: tuple[int, int]
    head: str
    text: str
    answer: str

    @property
    def prompt(self) -> list[int]:
        return [*ids(self.head), *IMAGE_IDS, *ids(self.text)]

    @property
    def target(self) -> list[int]:
        return [*ids(self.answer), token_id(EOS)]


# --- reading ---------------------------------------------------------------------------------------------------------


def insert(
    vectors: torch.Tensor, tokens: torch.Tensor, model, images: list[tuple[int, int]], features
) -> torch.Tensor:
    """Put the projected features of images in the places of `<image>`, as LLaVA does."""
    shown = model.model.multi_modal_projector(features[tuple(torch.tensor(images).T)].float())
    return vectors.masked_scatter((tokens == token_id(IMAGE)).unsqueeze(-1), shown.to(vectors.dtype))


def pad(rows: list[list[int]]) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [token_id(PAD)] * (length - len(row)) for row in rows])


@torch.no_grad()
def read(
    model: LlavaForConditionalGeneration, demos: list[Demo], features: torch.Tensor, layers: list[int]
) -> torch.Tensor:
    """States of the text positions of all demonstrations, one after the other, `(fused tokens, layers x width)`."""
    tokens = pad([demo.ids for demo in demos])
    vectors = insert(model.get_input_embeddings()(tokens), tokens, model, [demo.image for demo in demos], features)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    last = None if -1 in layers else max(layers)
    states = run(model.model.language_model, vectors, positions, layers=last, kept=tuple(layers))
    text = (tokens != token_id(IMAGE)) & (tokens != token_id(PAD)) & (tokens != token_id(BOS))
    return torch.cat([s[text] for s in states], -1).float()


def new_projector(model: LlavaForConditionalGeneration, form: dict) -> AimProjector:
    norm = model.get_input_embeddings().weight.norm(dim=-1).mean().item()
    torch.manual_seed(0)
    return AimProjector(AimConfig(backbone_config=model.config, projector_norm=norm, **form))


# --- answering -------------------------------------------------------------------------------------------------------


def answer(
    model: LlavaForConditionalGeneration, fused: list[torch.Tensor], queries: list[list[Query]], features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of the answers; the queries of a row share its fused tokens and do not see one another."""
    rows, positions, segments, images, goals = [], [], [], [], []
    for vectors, asked in zip(fused, queries, strict=True):
        row, place, segment, goal = (
            [token_id(BOS)] + [0] * len(vectors),
            list(range(len(vectors) + 1)),
            [0] * (len(vectors) + 1),
            [],
        )
        goal += [False] * len(row)
        for number, query in enumerate(asked, 1):
            tokens = query.prompt + query.target
            row += tokens
            place += range(len(vectors) + 1, len(vectors) + 1 + len(tokens))
            segment += [number] * len(tokens)
            goal += [False] * len(query.prompt) + [True] * len(query.target)
            images.append(query.image)
        rows.append(row), positions.append(place), segments.append(segment), goals.append(list(map(int, goal)))
    tokens, place, goal = pad(rows), pad(positions), pad(goals).bool()
    segment = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in segments], batch_first=True, padding_value=-1)
    seen = (segment.unsqueeze(1) == 0) | (segment.unsqueeze(1) == segment.unsqueeze(2))
    seen &= torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e4).unsqueeze(1)
    vectors = insert(model.get_input_embeddings()(tokens), tokens, model, images, features)
    holes = torch.zeros(tokens.shape, dtype=torch.bool)
    for r, part in enumerate(fused):
        holes[r, 1 : 1 + len(part)] = True
    vectors = vectors.masked_scatter(holes.unsqueeze(-1), torch.cat(fused).to(vectors.dtype))
    hidden = run(model.model.language_model, vectors, place, mask)
    r, c = goal.nonzero(as_tuple=True)
    return model.lm_head(hidden[r, c - 1]).float(), tokens[r, c]


# --- what is trained on ----------------------------------------------------------------------------------------------


def naming_row(rng: random.Random, demos: int) -> tuple[list[Demo], list[Query]]:
    """A naming episode with several queries; wordings as a user may mix them."""
    p = world.plan(rng, min(demos, rng.choice([2, 2, 3, 4, 5, 5, 6, 7, 8, 8])), 0, "train", demos=demos)
    told, put = world.draw_wordings(rng, demos, QUERIES)
    read, asked = [], []
    for (way, index), w in zip(p.demos, told, strict=True):
        read.append(Demo((p.concept_ids[way], index), "", w.demonstration(p.bindings[way])))
    for number, w in enumerate(put):
        way = p.query[0] if number == 0 else rng.randrange(len(p.concept_ids))
        picture = random_picture(rng, p.concept_ids[way])
        asked.append(Query((picture.concept, picture.index), w.head, w.question, w.answer.format(p.bindings[way])))
    return read, asked


def document_row(rng: random.Random, demos: int) -> tuple[list[Demo], list[Query]]:
    """An interleaved document of captioned images: what follows the last image is its caption, then words that look
    back on an earlier image. No names, no episodes."""
    detail = rng.randrange(6)
    pictures: list[Picture] = [random_picture(rng) for _ in range(demos)]
    read = []
    for picture in pictures:
        read.append(Demo((picture.concept, picture.index), "", world.caption(picture.scene, rng, detail) + " ."))
    asked = []
    for _ in range(QUERIES):
        new, back = random_picture(rng), rng.choice(pictures[-3:] if demos > 3 else pictures)
        place = ["", "before", "then"][min(2, len(pictures) - 1 - pictures.index(back))]
        text = world.caption(new.scene, rng, detail) + " . " + f"{place} {world.caption(back.scene, rng, 0)} .".strip()
        asked.append(Query((new.concept, new.index), "", "", text))
    return read, asked


def rows_of(step: int, kind: str, steps: int) -> list[tuple[list[Demo], list[Query]]]:
    """Rows of one step: all with the same number of demonstrations, which grows to 32."""
    rng = random.Random(f"{kind} {step} {ranks()[0]}")
    most = min(32, 8 + 48 * step // steps)
    demos = rng.randint(2, most)
    make = document_row if kind == "aim_generic" else naming_row
    first = make(rng, demos)
    length = 1 + sum(d.fused for d in first[0]) + sum(len(q.prompt + q.target) for q in first[1])
    return [first] + [make(rng, demos) for _ in range(max(4, TOKENS // length) - 1)]


# --- training --------------------------------------------------------------------------------------------------------


def train(kind: str, form: dict | None = None, steps: int | None = None, tag: str = "") -> AimProjector:
    model = load("llava").requires_grad_(False).eval()
    form, steps = form or FORMS[kind], steps or STEPS[kind]
    features = features_of(model, "train")
    projector = new_projector(model, form)
    if kind in MUON:
        optimizers = optimizers_of(projector, RATE[kind])
    else:
        optimizers = [(torch.optim.AdamW(projector.parameters(), betas=(0.9, 0.98), weight_decay=0.01), RATE[kind])]
    checkpoint = Checkpoint(kind + tag, projector, [optimizer for optimizer, _ in optimizers])
    history: list[float] = []
    for step in progress(range(checkpoint.start, steps), kind + tag, initial=checkpoint.start, total=steps):
        for optimizer, peak in optimizers:
            cosine(optimizer, peak, step, steps)
        rows = rows_of(step, kind, steps)
        with torch.autocast("cpu", torch.bfloat16):
            states = read(model, [demo for demos, _ in rows for demo in demos], features, form["read_layers"])
        fused = projector(states).split([sum(d.fused for d in demos) for demos, _ in rows])
        with torch.autocast("cpu", torch.bfloat16):
            logits, gold = answer(model, list(fused), [queries for _, queries in rows], features)
        loss = F.cross_entropy(logits, gold)
        projector.zero_grad()
        loss.backward()
        share_gradients(list(projector.parameters()))
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        if step % 10 == 0:
            return_memory()
        history.append((logits.argmax(-1) == gold).float().mean().item())
        if ranks()[0] == 0 and (step % 25 == 0 or step == steps - 1):
            print(f"{kind + tag} {step} loss {loss.item():.3f} right {sum(history) / len(history):.4f}", flush=True)
            history.clear()
        checkpoint.save(step + 1)
    checkpoint.save(steps, every=0)
    if ranks()[0] == 0:
        write(BUILD / f"{kind + tag}.pt", lambda p: torch.save(projector.state_dict(), p))
    return projector


if __name__ == "__main__":
    train(sys.argv[1])
