"""LLaVA's system: a backbone in two stages (`aim backbone`), its instruction data (`aim data instruct`), its judge."""

from .build import build_backbone
from .settings import BackboneSettings

__all__ = ["BackboneSettings", "build_backbone"]
