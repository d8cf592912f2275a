"""AIM for Hugging Face: few-shot demonstrations for any vision-language model, at a few tokens each."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bank import DemonstrationBank
    from .registered import (
        AimConfig,
        AimForConditionalGeneration,
        AimProcessor,
        AimProjector,
        Demonstration,
        FusedDemonstrations,
        laptop_quantization_config,
    )

__version__ = "0.1.0"

__all__ = [
    "AimConfig",
    "AimForConditionalGeneration",
    "AimProcessor",
    "AimProjector",
    "Demonstration",
    "DemonstrationBank",
    "FusedDemonstrations",
    "laptop_quantization_config",
]


def __getattr__(name: str) -> Any:
    """Import transformers and torch with the first public name that is used: `aim --help` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import registered

    if name == "DemonstrationBank":
        from .bank import DemonstrationBank

        return DemonstrationBank
    return getattr(registered, name)
