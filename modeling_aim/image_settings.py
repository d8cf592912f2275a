"""Settings of a backbone's image processor, `--image NAME=VALUE`: how many tokens an image is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from .demonstrations_aim import Demonstration
from .processing_aim import AimProcessor

if TYPE_CHECKING:
    from .registered import AimForConditionalGeneration

# Arguments of a call, not settings of a processor.
OF_A_CALL = {
    "data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "default_to_square",
    "image_processor_type", "processor_class", "image_seq_length", "kwargs", "self",
}  # fmt: skip
TRIED = (500, 400)  # width and height of the image that settings are tried on


def image_setting_names(processor: AimProcessor) -> list[str]:
    """The settings that the image processor of a backbone takes."""
    images = processor.image_processor
    kinds = (images.valid_kwargs,) if hasattr(images, "valid_kwargs") else ()
    named = {name for kind in kinds for part in kind.__mro__ for name in getattr(part, "__annotations__", {})}
    named |= set(images.to_dict()) | (set() if kinds else set(inspect.signature(type(images).__init__).parameters))
    return sorted(name for name in named - OF_A_CALL if not name.startswith("_"))


def set_image_settings(processor: AimProcessor, settings: Mapping[str, Any]) -> None:
    """Change settings of the image processor; they are saved with the processor.

    Args:
        processor: is changed.
        settings: by the names that the image processor has for them, such as `max_pixels`.

    Raises:
        ValueError: the image processor has no such setting, or does not take the value.
    """
    if not settings:
        return
    images, known = processor.image_processor, image_setting_names(processor)
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"--image {name}={value}: {type(images).__name__} takes {', '.join(known)}.")
        _check_kind(name, value, getattr(images, name, None))
    setting_list = ", ".join(f"{name}={value}" for name, value in settings.items())
    stored = {name: value for name, value in images.to_dict().items() if name not in OF_A_CALL}
    try:
        processor.processor.image_processor = type(images)(**{**stored, **settings})
        image_tokens(processor)
    except Exception as error:
        processor.processor.image_processor = images
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ValueError(
            f"--image {setting_list}: {type(images).__name__} does not take this ({reason}). Its own: "
            + ", ".join(f"{name}={getattr(images, name, None)}" for name in settings)
            + "."
        ) from error


def check_readable(model: AimForConditionalGeneration, settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a backbone cannot read an image of these settings, which its processor takes."""
    if not settings:
        return
    try:
        model.read_states([Demonstration((Image.new("RGB", TRIED, "gray"),), "a name")])
    except Exception as error:
        setting_list = ", ".join(f"{name}={value}" for name, value in settings.items())
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ValueError(f"--image {setting_list}: the backbone cannot read such images ({reason}).") from error


def image_tokens(processor: AimProcessor, image: Image.Image | None = None) -> int:
    """Tokens that an image adds to a prompt.

    Args:
        processor: of the backbone.
        image: by default one of 500 x 400 pixels.
    """
    image = Image.new("RGB", TRIED, "gray") if image is None else image
    words = processor(text=[processor.front(0) + "a"], return_tensors="pt")
    with_image = processor(images=[[image]], text=[processor.front(1) + "a"], return_tensors="pt")
    return with_image["input_ids"].shape[1] - words["input_ids"].shape[1]


def tokens_line(processor: AimProcessor) -> str:
    """How many tokens an image is, in a line for the start of a run."""
    width, height = TRIED
    try:
        tokens = str(image_tokens(processor))
    except Exception:  # a processor of a kind that nobody has tried: no reason to stop a run
        tokens = "an unknown number of"
    return f"An image of {width} x {height} pixels is {tokens} tokens (--image NAME=VALUE changes this)."


def _check_kind(name: str, value: Any, now: object) -> None:
    """Raise `ValueError` for a value whose type is not that of the current one."""
    if name.startswith("do_") or isinstance(now, bool):
        expected, fits = "true or false", isinstance(value, bool)
    elif isinstance(now, (int, float)) or name in ("min_pixels", "max_pixels"):
        expected, fits = "a positive number", type(value) in (int, float) and value > 0
    else:
        return
    if not fits:
        raise ValueError(f"--image {name}={value}: expected {expected}.")
