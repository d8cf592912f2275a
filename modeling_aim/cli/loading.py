"""Options of every command that loads a model, and loading it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class LoadingSettings:
    """How a model is loaded.

    Args:
        revision: revision of the repository.
        dtype: precision of the backbone: bfloat16, float16 or float32; by default its own.
        load_in_4bit: load the backbone in 4-bit, for a laptop.
        device_map: where the backbone goes, such as "auto" or "cuda".
        image_settings: settings of the backbone's image processor by its own names, such as max_pixels=200704 or
            do_image_splitting=false: how many tokens an image is.
    """

    revision: str | None = None
    dtype: str | None = None
    load_in_4bit: bool = False
    device_map: str | None = None
    image_settings: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`.

        Raises:
            ValueError: there is no such precision.
        """
        from .. import laptop_quantization_config
        from ..runs import PRECISIONS

        if self.dtype not in (None, *PRECISIONS):
            raise ValueError(f"--dtype {self.dtype!r}: expected one of {', '.join(PRECISIONS)}.")
        options: dict[str, Any] = {"device_map": self.device_map}
        options |= {"revision": self.revision} if self.revision else {}
        options |= {"dtype": PRECISIONS[self.dtype]} if self.dtype else {}
        options |= {"quantization_config": laptop_quantization_config()} if self.load_in_4bit else {}
        return options

    def load(self, repo: str) -> AimForConditionalGeneration:
        """The model of an AIM repository.

        Raises:
            OSError: it cannot be loaded; the message names it.
        """
        from .. import AimForConditionalGeneration

        options = self.options()
        try:
            model = AimForConditionalGeneration.from_pretrained(repo, **options)
        except OSError as error:
            if repo in str(error):
                raise
            raise OSError(f"{repo} is no folder here and could not be had from the Hub: {error}") from error
        return self.with_images(model)

    def with_images(self, model: AimForConditionalGeneration) -> AimForConditionalGeneration:
        """The same model, whose processor has the image settings.

        Raises:
            ValueError: the processor or the backbone does not take them.
        """
        from ..image_settings import check_readable, set_image_settings

        if self.image_settings:
            set_image_settings(model.processor, self.image_settings)
            check_readable(model, self.image_settings)
        return model
