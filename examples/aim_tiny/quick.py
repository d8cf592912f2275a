"""A quick forward pass through the layers of a SmolLM3 for training on a CPU: the same numbers, a third of the time.

    python examples/aim_tiny/quick.py        # compares it with transformers' own, in numbers and milliseconds

It takes positions with gaps, stops at any layer, and spares what training does not need.
"""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

LONG = 700  # tokens from which attention in blocks is quicker


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: `(batch, heads, length, size)`."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention; keys and values may have more tokens, which come before."""
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    if length >= LONG and not before:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.full((length, before + length), float("-inf"), dtype=q.dtype).triu(before + 1)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + mask
    return torch.matmul(scores.softmax(-1), v)


def run(
    model, vectors: torch.Tensor, positions: torch.Tensor, layers: int | None = None,
    kept: tuple[int, ...] = (), past: list | None = None, cache: list | None = None,
    places: torch.Tensor | None = None, entering: dict[int, torch.Tensor] | None = None,
):  # fmt: skip
    """Hidden states of a SmolLM3.

    Args:
        model: a `SmolLM3Model`.
        vectors: input embeddings `(batch, length, width)`.
        positions: `(batch, length)`; gaps are allowed.
        layers: stop after so many decoder layers (no final norm then).
        kept: return a list with the outputs of these layers instead (0: the embeddings; -1: after the final norm).
        past: keys and values of each layer that come before `(batch, heads, length, size)`.
        cache: a list that gets the keys and values of each layer.
        places: where fused tokens stand, `(batch, length)`.
        entering: what replaces their states, by the layer at whose input it enters (0: the embeddings),
            `(fused tokens, width)`.
    """
    batch, length, width = vectors.shape
    heads = model.config.num_attention_heads
    cos, sin = (t.unsqueeze(1).to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else vectors.dtype)
                for t in model.rotary_emb(vectors.float(), positions))  # fmt: skip
    stop = len(model.layers) if layers is None else layers
    x, entering = vectors, entering or {}
    outputs = {0: x}
    for number, layer in enumerate(model.layers[:stop], 1):
        if number - 1 in entering:
            x = x.masked_scatter(places.unsqueeze(-1), entering[number - 1].to(x.dtype))
        h = F.rms_norm(x, (width,), layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        att = layer.self_attn
        q, k, v = (p(h).view(batch, length, heads, -1).transpose(1, 2) for p in (att.q_proj, att.k_proj, att.v_proj))
        if att.use_rope:
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        if cache is not None:
            cache.append((k, v))
        if past is not None:
            k, v = torch.cat((past[number - 1][0], k), 2), torch.cat((past[number - 1][1], v), 2)
        mixed = attend(q, k, v)
        x = x + att.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        h = F.rms_norm(
            x, (width,), layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon
        )
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        outputs[number] = x
    if layers is None:
        x = F.rms_norm(x, (width,), model.norm.weight, model.norm.variance_epsilon)
        outputs[-1] = x
    return [outputs[k] for k in kept] if kept else x


def main() -> None:
    from words import new_model

    model = new_model().model.language_model
    x, positions = torch.randn(20, 300, 128) * 0.4, torch.arange(300).expand(20, -1)
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            for name, call in (
                (
                    "transformers",
                    lambda: model(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state,
                ),
                ("quick", lambda: run(model, x, positions)),
            ):
                for _ in range(2):
                    start = time.time()
                    out = call()
                    out.float().square().mean().backward()
                print(f"bf16={low} {name}: {1000 * (time.time() - start):.0f} ms, mean {out.float().abs().mean():.6f}")


if __name__ == "__main__":
    main()
