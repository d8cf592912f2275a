"""Batches of demonstrations that are read in one pass; equal images of a batch are encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from .demonstrations_aim import Demonstration

PASS_TOKENS = 8192  # of one pass, padding included: enough to keep an accelerator busy, and bounded memory
CPU_PASS_TOKENS = 1024  # on a CPU, which one demonstration keeps busy; attention is slower where rows are padded
PASS_PADDING = 512  # most padding among them
SAMPLES = 64  # values of an image that are compared first


def reading_batches(
    demos: Sequence[Demonstration],
    lengths: Sequence[int],
    batch_size: int | None = None,
    max_tokens: int = PASS_TOKENS,
) -> Iterator[tuple[list[int], bool]]:
    """Put demonstrations into batches: with or without images, of similar length, equal images together.

    Args:
        demos: what is to be read.
        lengths: about how many tokens each takes.
        batch_size: demonstrations in a batch; where `None`, as many as `max_tokens` and `PASS_PADDING` allow.
        max_tokens: most tokens of a batch, padding included. Demonstrations with the same image, which is encoded
            once, may take `PASS_TOKENS` in any case.

    Yields:
        The indices of a batch's demonstrations, and whether some of their images may be equal.

    Raises:
        ValueError: `batch_size` is no whole number from 1.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r:.40}: expected a whole number, 1 or more, or None.")
    thumbnails = [_thumbnails(demo) for demo in demos]
    shortest: dict[Any, int] = {}
    for thumbnail, length in zip(thumbnails, lengths, strict=True):
        shortest[thumbnail] = min(length, shortest.get(thumbnail, length))

    def order(i: int) -> tuple[Any, ...]:
        return bool(thumbnails[i]), shortest[thumbnails[i]], thumbnails[i], lengths[i]

    batch: list[int] = []
    longest = total = 0
    for index in sorted(range(len(demos)), key=order):
        area = (len(batch) + 1) * max(longest, lengths[index])
        same = bool(batch) and not set(thumbnails[index]).isdisjoint(thumbnails[batch[-1]])
        full = area > (PASS_TOKENS if same else max_tokens) or area - total - lengths[index] > PASS_PADDING
        if batch_size is not None:
            full = len(batch) >= batch_size
        if batch and (full or bool(thumbnails[index]) != bool(thumbnails[batch[0]])):
            yield batch, _has_repeats(thumbnails[i] for i in batch)
            batch, longest, total = [], 0, 0
        batch.append(index)
        longest, total = max(longest, lengths[index]), total + lengths[index]
    if batch:
        yield batch, _has_repeats(thumbnails[i] for i in batch)


def _thumbnails(demo: Demonstration) -> tuple[Any, ...]:
    """A few pixels of each image, the same for equal images."""
    return tuple((i.size, i.resize((8, 8), Image.Resampling.NEAREST).tobytes()) for i in demo.images)


def _has_repeats(thumbnails: Iterator[tuple[Any, ...]]) -> bool:
    images = [image for thumbnail in thumbnails for image in thumbnail]
    return len(set(images)) < len(images)


# --- equal images
#
# A vision tower is called with the images of a batch one after another: an image (or a tile of one) a row of (images,
# channels, height, width) or (images, patches, values), or the patches of all images as rows of (patches, values) with
# the grid of each image in grid_thw. Its output is in the same order. So it can be called with each image once, and
# its output repeated where an image repeats. Connector and decoder see the whole batch.


class SharedImages:
    """A call of a vision tower with each image once.

    Args:
        args, kwargs: arguments of the call.
        sizes: rows of the tower's input that each image takes; a tensor with one row an image is split by image.

    Attributes:
        order: for each image of the call, the index of the kept image that equals it.
        sizes: rows of the kept images.
        args, kwargs: the call with the kept images.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], sizes: Sequence[int]) -> None:
        self.given = args, dict(kwargs)
        every: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        parts = {
            name: value.split([1] * len(sizes) if len(value) == len(sizes) else list(sizes))
            for name, value in every.items()
            if isinstance(value, torch.Tensor) and value.ndim
        }
        images = list(zip(*parts.values(), strict=True))
        alike: dict[Any, list[int]] = {}
        kept: list[int] = []
        self.order: list[int] = []
        for index, image in enumerate(images):
            flat = image[0].reshape(-1)
            candidates = alike.setdefault(tuple(flat[:: max(len(flat) // SAMPLES, 1)].tolist()), [])
            same = next((k for k in candidates if _equal(images[kept[k]], image)), None)
            if same is None:
                same = len(kept)
                candidates.append(same)
                kept.append(index)
            self.order.append(same)
        if len(kept) == 1:
            # keep two: from one image alone, `repeated` cannot tell whether the output has a part per image
            kept += range(1, len(images))[:1]
        self.sizes = [sizes[index] for index in kept]
        fewer = {name: torch.cat([split[index] for index in kept]) for name, split in parts.items()}
        self.args = tuple(fewer.get(place, value) for place, value in enumerate(args))
        self.kwargs = {name: fewer.get(name, value) for name, value in kwargs.items()}

    def repeated(self, output: Any) -> Any:
        """The output for all images of the call, from the output for the kept images.

        Raises:
            ValueError: the output is not in parts by image.
        """
        if isinstance(output, torch.Tensor):
            a_row, rest = divmod(sum(self.sizes), max(len(output), 1))
            if rest or not a_row or any(size % a_row for size in self.sizes):
                raise ValueError(f"an output of shape {tuple(output.shape)} has no part for each image")
            parts = output.split([size // a_row for size in self.sizes])
            return torch.cat([parts[index] for index in self.order])
        if isinstance(output, Mapping):
            return type(output)(**{name: self.repeated(value) for name, value in output.items()})
        if isinstance(output, (list, tuple)):
            return type(output)(self.repeated(value) for value in output)
        return output


def _equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def shared_images(args: Sequence[Any], kwargs: Mapping[str, Any]) -> SharedImages | None:
    """The call of a vision tower with each image once; `None` where all differ, or the call is of another form."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
    if not tensors:
        return None
    pixels, grid = tensors[0], kwargs.get("grid_thw")
    if grid is not None and pixels.ndim == 2:
        sizes = grid.prod(dim=-1).tolist()
    elif pixels.ndim >= 3:
        sizes = [1] * len(pixels)
    else:
        return None
    if any(len(tensor) not in (len(sizes), sum(sizes)) for tensor in tensors):
        return None
    shared = SharedImages(args, kwargs, sizes)
    return shared if len(shared.sizes) < len(sizes) else None


def repeat_images(tower: nn.Module, shared: SharedImages, output: Any) -> Any:
    """The output of the tower for every image; the tower runs again where its output is not in parts by image."""
    try:
        return shared.repeated(output)
    except ValueError:
        args, kwargs = shared.given
        return tower.forward(*args, **kwargs)
