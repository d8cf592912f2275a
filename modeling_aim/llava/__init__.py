"""LLaVA's system: a backbone in two stages (`aim backbone`), its instruction data (`aim data instruct`), its judge."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_backbone
    from .settings import BackboneSettings

__all__ = ["BackboneSettings", "build_backbone"]


def __getattr__(name: str) -> Any:
    """Import torch with the first public name that is used: to ask an endpoint needs no torch."""
    if name == "BackboneSettings":
        from .settings import BackboneSettings

        return BackboneSettings
    if name == "build_backbone":
        from .build import build_backbone

        return build_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
