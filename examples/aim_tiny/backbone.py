"""The language model of aim-tiny, from random weights, and a control: the backbone tuned on many images.

    python examples/aim_tiny/backbone.py llm          # text only: copying first, then naming episodes
    python examples/aim_tiny/backbone.py interleaved  # control: the backbone tuned on episodes of many images
    python -m torch.distributed.run --nproc-per-node 2 examples/aim_tiny/backbone.py llm        # on two cores

LLaVA's two stages, between these two, are in llava.py. Each stage resumes where it stopped and writes its weights to
build/aim-tiny/.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import torch
import world
from corpus import Batch, asking, collate, copying, describing, naming, restating
from quick import run
from support import BUILD, Checkpoint, cosine, optimizers_of, progress, ranks, return_memory, share_gradients, write
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from vision import images, pixels
from words import IMAGE, new_model, token_id

LLM_STEPS, INTERLEAVED_STEPS = 920, 400
TOKENS = 6400  # tokens a batch
STARTS = torch.tensor([token_id(start) for start in world.STARTS])  # what a name begins with


# --- what is computed ------------------------------------------------------------------------------------------------


def embed(model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor | None) -> torch.Tensor:
    """Input embeddings of a batch, with the projected features of its images in the places of `<image>`."""
    vectors = model.get_input_embeddings()(batch.ids)
    if batch.images:
        shown = features[tuple(torch.tensor(batch.images).T)]  # (images, 64, width)
        projected = model.model.multi_modal_projector(shown.float())
        places = (batch.ids == token_id(IMAGE)).unsqueeze(-1)
        vectors = vectors.masked_scatter(places, projected.to(vectors.dtype))
    return vectors


def answers(
    model: LlavaForConditionalGeneration, batch: Batch, features: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Logits where a target comes next, and the targets."""
    hidden = run(model.model.language_model, embed(model, batch, features), batch.positions)
    rows, columns = batch.target.nonzero(as_tuple=True)
    return model.lm_head(hidden[rows, columns - 1]).float(), batch.ids[rows, columns]


@torch.no_grad()
def features_of(model: LlavaForConditionalGeneration, split: str) -> torch.Tensor:
    """What the vision tower says of every pool image, `(concepts, images, 64, width)` in bfloat16; kept on disk."""
    path = BUILD / f"features-{split}.pt"
    if not path.exists():
        pool = images(split)
        rows = []
        for concept in progress(pool, f"features {split}"):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = [model.model.vision_tower(b, output_hidden_states=True).hidden_states[-1][:, 1:].bfloat16()
                          for b in pixels(concept).split(110)]  # fmt: skip
            rows.append(torch.cat(hidden))
        write(path, lambda p: torch.save(torch.stack(rows), p))
    return torch.load(path, weights_only=True, mmap=True)


# --- what is read ----------------------------------------------------------------------------------------------------


def repeat(make: Callable, rng: random.Random, size: int | None = None) -> Batch:
    first = make(rng)
    size = size or max(2, TOKENS // len(first.ids))
    return collate(sorted([first] + [make(rng) for _ in range(size - 1)], key=lambda s: len(s.ids)))


def naming_batch(rng: random.Random, most: int) -> Batch:
    """Episodes of one number of demonstrations, up to `most`; one in eight with descriptions as long as an image."""
    demos = rng.randint(2, most)
    length = rng.choice([45, 60, 75]) if rng.random() < 0.12 else 0
    gaps = not length and rng.random() < 0.5
    return repeat(lambda r: naming(r, min(demos, r.randint(2, 8)), demos, "none", length, gaps), rng)


def text_batch(rng: random.Random, step: int) -> Batch:
    """Copying first (it does not come by itself); then scenes said again and names of terse scenes, without which
    names are never bound to concepts; then captions, wordings and lengths of every kind."""
    done, kind = step / LLM_STEPS, rng.random()
    if done < 0.12 or kind < 0.05:
        length = 32 + 48 * min(step, 400) // 400
        return repeat(lambda r: copying(r, length), rng, TOKENS // length)
    if rng.random() < (0.5 if done < 0.3 else 0.12):
        telling, count = rng.choice(["easy", "full"]), rng.randint(1, 8)
        return repeat(lambda r: restating(r, count, telling), rng)
    if kind < 0.14:
        return repeat(lambda r: (describing if kind < 0.09 else asking)(r, False), rng, 100)
    later = max(0.0, done - 0.15)
    demos, ways = rng.randint(3, min(32, 6 + int(30 * later))), min(8, 2 + int(10 * later))
    draw = rng.random()
    telling = "terse" if draw < max(0.1, 1 - 2.5 * later) else "easy" if draw < max(0.3, 1.3 - 1.6 * later) else "full"
    if telling == "full" and done > 0.6:
        return naming_batch(rng, 32)
    gaps = done > 0.4 and rng.random() < 0.4
    return repeat(lambda r: naming(r, min(demos, r.randint(2, ways)), demos, "none", gaps=gaps, telling=telling), rng)


def interleaved_batch(rng: random.Random, step: int) -> Batch:
    """Every demonstration and the query are images: what the shipped backbone never sees."""
    demos = rng.randint(2, 8 if step < 60 or rng.random() < 0.5 else 32)
    return repeat(lambda r: naming(r, min(demos, r.randint(2, 8)), demos, "all"), rng)


# --- how it is trained -----------------------------------------------------------------------------------------------


def fit(
    stage: str, model: LlavaForConditionalGeneration, trained: list[torch.nn.Module], make: Callable, steps: int,
    rate: float, features: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Train some modules on the batches that `make(rng, step)` gives; loss on targets only."""
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizers = optimizers_of(model, rate)
    checkpoint = Checkpoint(stage, model, [o for o, _ in optimizers])
    seen: dict[str, list[float]] = {}
    for step in progress(range(checkpoint.start, steps), stage, initial=checkpoint.start, total=steps):
        for optimizer, peak in optimizers:
            cosine(optimizer, peak, step, steps)
        batch = make(random.Random(f"{stage} {step} {ranks()[0]}"), step)
        with torch.autocast("cpu", torch.bfloat16):
            logits, gold = answers(model, batch, features)
        loss = F.cross_entropy(logits, gold)
        model.zero_grad()
        loss.backward()
        share_gradients(weights)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        kind = f"{'image' if batch.images else 'text'}{'' if batch.ids.shape[1] < 200 else ' long'}"
        right, first = logits.argmax(-1) == gold, torch.isin(gold, STARTS)
        seen.setdefault(kind, []).append(right.float().mean().item())
        if first.any():
            seen.setdefault(f"{kind} names", []).append(right[first].float().mean().item())
        if step % 10 == 0:
            return_memory()
        if ranks()[0] == 0 and (step % 25 == 0 or step == steps - 1):
            print(
                f"{stage} {step} loss {loss.item():.3f} right",
                {k: round(sum(v) / len(v), 3) for k, v in sorted(seen.items())},
                flush=True,
            )
            seen.clear()
        checkpoint.save(step + 1)
    checkpoint.save(steps, every=0)


def keep(name: str, model: LlavaForConditionalGeneration) -> None:
    if ranks()[0] == 0:
        write(BUILD / f"{name}.pt", lambda p: torch.save(model.state_dict(), p))


def train_llm() -> None:
    model = new_model()
    fit("llm", model, [model.model.language_model, model.lm_head], text_batch, LLM_STEPS, 6e-3)
    keep("llm", model)


def train_interleaved() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(BUILD / "llava")
    fit("interleaved", model, [model.model.multi_modal_projector, model.model.language_model, model.lm_head],
        interleaved_batch, INTERLEAVED_STEPS, 2e-3, features_of(model, "train"))  # fmt: skip
    keep("interleaved", model)


if __name__ == "__main__":
    {"llm": train_llm, "interleaved": train_interleaved}[sys.argv[1]]()
