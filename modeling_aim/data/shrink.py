"""How far a large image may be shrunk when it is opened: to twice the size to which the processor resizes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processing_aim import AimProcessor

GAP = 2.0  # as Pillow's `reducing_gap`: what is shrunk in two steps then looks as what is shrunk in one
LARGEST = 3072  # pixels of a side of the image that a processor is tried with
ALIKE = 0.25  # of the standard deviation of what the processor makes of noise, which no two images share by chance
TILING = (
    "do_pan_and_scan", "crop_to_patches", "max_image_tiles", "max_num_tiles", "max_tiles", "tile_size", "num_tiles",
    "split_image", "max_num_crops", "max_slice_nums", "slice_mode", "max_dynamic_patch", "image_split",
)  # fmt: skip


class ShrinkFor:
    """By which power of two the sides of an image may be divided before a processor gets it.

    What is left is at least `GAP` times what the processor resizes it to, and takes as many tokens. A processor that
    cuts images into tiles in ways that are not known here, that does not resize, or that makes something else of a
    shrunk image of noise, gets images as they are.

    Args:
        processor: an `AimProcessor`.
    """

    def __init__(self, processor: AimProcessor) -> None:
        self.processor, self.images = processor, processor.image_processor
        self._trusted: bool | None = None

    def __call__(self, size: tuple[int, int]) -> int:
        """The divisor for an image `(width, height)`: 1, 2, 4, ..."""
        if self._trusted is None:
            self._trusted = self._try()
        return self._divisor(size) if self._trusted else 1

    def _divisor(self, size: tuple[int, int]) -> int:
        made = self.made(*size)
        scale = 1 if made is None else GAP * max(made[0] / size[0], made[1] / size[1])
        divisor = 1
        while 2 * divisor * scale <= 1:
            divisor *= 2
        while divisor > 1 and not self._same_tokens(size, divisor):
            divisor //= 2
        return divisor

    def made(self, width: int, height: int) -> tuple[float, float] | None:
        """The size `(width, height)` that the processor resizes an image to, rather too large; `None`: not known."""
        images = self.images
        if not getattr(images, "do_resize", False) or any(getattr(images, name, None) for name in TILING):
            return None
        size = {name: value for name, value in _plain(getattr(images, "size", None)).items() if value}
        grids = getattr(images, "image_grid_pinpoints", None)
        if grids:
            return max(w for _, w in grids), max(h for h, _ in grids)
        if getattr(images, "merge_size", None) and getattr(images, "patch_size", None):
            most = getattr(images, "max_pixels", None) or size.get("longest_edge")
            edge = images.patch_size * images.merge_size
            scale = None if not most else math.sqrt(most / (width * height))
            return None if scale is None else (width * scale + edge, height * scale + edge)
        if set(size) == {"height", "width"}:
            return size["width"], size["height"]
        if "longest_edge" in size:
            scale = size["longest_edge"] / max(width, height)
            tile = _plain(getattr(images, "max_image_size", None)).get("longest_edge") or 1
            return math.ceil(width * scale / tile) * tile, math.ceil(height * scale / tile) * tile
        if "shortest_edge" in size:
            scale = size["shortest_edge"] / min(width, height)
            return width * scale, height * scale
        return None

    def _same_tokens(self, size: tuple[int, int], divisor: int) -> bool:
        counted = getattr(self.processor.processor, "_get_num_multimodal_tokens", None)
        if counted is None:
            return True
        sizes = [size[::-1], (-(-size[1] // divisor), -(-size[0] // divisor))]
        whole, shrunk = counted(image_sizes=sizes).num_image_tokens or (0, 0)
        return whole == shrunk

    def _try(self) -> bool:
        """Whether the processor makes the same of noise and of shrunk noise, upright and lying."""
        noise = np.random.default_rng(0).integers(0, 256, (LARGEST // 4 * 3, LARGEST, 3), dtype=np.uint8)
        side = next((side for side in range(256, LARGEST + 1, 256) if self._divisor((side, side // 4 * 3)) > 1), None)
        if side is None:
            return False
        for turned in (False, True):
            image = Image.fromarray(noise[: side // 4 * 3, :side])
            image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
            divisor = self._divisor(image.size)
            if divisor > 1 and not self._alike(image, image.reduce(divisor)):
                return False
        return True

    def _alike(self, whole: Image.Image, shrunk: Image.Image) -> bool:
        made = [self.images(images=[image], return_tensors="pt") for image in (whole, shrunk)]
        first, second = (dict(part) if isinstance(part, Mapping) else {"pixel_values": part} for part in made)
        for name, value in first.items():
            if not isinstance(value, torch.Tensor) or value.shape != second[name].shape:
                return False
            if value.is_floating_point():
                if (value - second[name]).abs().mean() > ALIKE * value.std():
                    return False
            elif name != "image_sizes" and not torch.equal(value, second[name]):
                return False
        return True


def _plain(size: object) -> dict[str, Any]:
    """A size of an image processor as a dict; empty where there is none."""
    return dict(size) if isinstance(size, Mapping) or hasattr(size, "__iter__") else {}
