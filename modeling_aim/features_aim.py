"""What a bank's selection needs of the model: features to compare.

Banks are not shipped. The features of demonstrations and queries come from the backbone itself, through the model's
hooks, and remote code has its own ContextVars: they are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .backbone_aim import image_positions
from .demonstrations_aim import Demonstration
from .injection_aim import injected
from .reading_aim import image_features, read_hidden_states

FEATURE_KINDS = ("image", "text", "fused")


class FeaturesMixin:
    """What `AimForConditionalGeneration` does for banks; `self` is the model."""

    @torch.no_grad()
    def read_fully(self: Any, demos: Sequence[Any], features: bool = True) -> dict[str, Any]:
        """Read demonstrations, with everything that a bank keeps of them.

        Args:
            demos: demonstrations, see `Demonstration.of`.
            features: compute features too.

        Returns:
            `fused` and `states`: a tensor for each demonstration; `features`: a tensor `(demonstrations, width)` for
            each kind.
        """
        demos = [Demonstration.of(demo, self.image_rules) for demo in demos]
        read = sorted(self._read_batches(demos, with_image_features=features), key=lambda row: row[0])
        states = [row[1] for row in read]
        fused = [self.project(part) for part in states]
        by_kind: dict[str, torch.Tensor] = {}
        if features:
            images = [row[2].cpu() for row in read]
            width = max((image.shape[-1] for image in images), default=0)
            by_kind["image"] = torch.stack(
                [nn.functional.pad(image, (0, width - image.shape[-1])) for image in images]
            )
            by_kind["text"] = self.text_features(
                [Demonstration((), demo.question or demo.text, None, self.processor.is_label(demo)) for demo in demos]
            )
            by_kind["fused"] = torch.stack([part.float().mean(dim=0) for part in fused])
        return {"fused": fused, "states": states, "features": by_kind}

    def text_features(self: Any, texts: Sequence[Demonstration]) -> torch.Tensor:
        """Hidden states of words alone, averaged: `(texts, read layers x hidden size)`."""
        unique = {text.key: text for text in texts}  # the same words have the same features, to the last bit
        read = self.read_states(list(unique.values()))
        means = {key: states.float().mean(dim=0) for key, states in zip(unique, read, strict=True)}
        return torch.stack([means[text.key] for text in texts])

    def query_inputs(self: Any, query: object) -> dict[str, Any]:
        """The backbone's inputs of one query that is an image, a text, or a dict or pair of both."""
        if isinstance(query, str):
            fields: dict[str, Any] = {"question": query}
        elif isinstance(query, (list, tuple)) and len(query) == 2:
            fields = dict(zip(("image", "question"), query, strict=True))
        else:
            fields = dict(query) if isinstance(query, Mapping) else {"image": query}
        words = fields.get("question") or fields.get("text") or ""
        images = {k: v for k, v in fields.items() if k in ("image", "images") and v is not None}
        pictures = list(Demonstration.of({**images, "text": "query"}, self.image_rules).images)
        prompt = self.processor.prompt(words, images=len(pictures))
        inputs = self.processor(images=[pictures] if pictures else None, text=[prompt], return_tensors="pt")
        return dict(inputs.to(self.device, self.dtype))

    @torch.no_grad()
    def query_features(
        self: Any, inputs: Mapping[str, Any], kinds: Sequence[str], rows: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Features of each query of a batch.

        Args:
            inputs: the backbone's inputs of the queries.
            kinds: which features: `"image"`, `"text"`, `"fused"`.
            rows: the queries of the batch that are compared; all where `None`.

        Returns:
            For each kind `(rows, width)`.

        Raises:
            ValueError: an unknown kind, or a query without an image, or without words, where these are compared.
        """
        tensors = {
            k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and k not in ("labels", "position_ids")
        }
        tensors = {k: v.to(self.device, self.dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        ids = tensors["input_ids"]
        words = tensors.get("attention_mask", torch.ones_like(ids)).bool() & ~image_positions(
            self.backbone.config, ids
        )
        rows = list(range(len(ids)) if rows is None else rows)
        by_kind = {}
        for kind in kinds:
            empty: list[int] = []
            if kind == "image":
                with injected(None):
                    features = image_features(self.backbone, tensors)[rows]
                empty = [row for row, feature in zip(rows, features, strict=True) if not bool(feature.any())]
            elif kind == "text":
                texts = [self.processor.query_text(ids[row][words[row]].tolist()) for row in rows]
                empty = [row for row, text in zip(rows, texts, strict=True) if not text]
                features = ids if empty else self.text_features([Demonstration((), text) for text in texts])
            elif kind == "fused":
                with injected(None):
                    hidden = read_hidden_states(self.backbone, tensors, self.config.read_layers)
                fused = [self.project(hidden[row][words[row]]) for row in rows]
                features = torch.stack([part.float().mean(dim=0) for part in fused])
            else:
                raise ValueError(f"kinds has {kind!r:.40}; expected some of {', '.join(FEATURE_KINDS)}.")
            if empty:
                what, them = ("image", "images") if kind == "image" else ("words", "words")
                raise ValueError(
                    f"Query {empty[0]} of {len(ids)} has no {what}, but {them} are compared. Give each query its "
                    f'{them}, or use another selection strategy ("random" compares nothing).'
                )
            by_kind[kind] = features
        return by_kind
