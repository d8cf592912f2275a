"""LLaVA's two stages: a backbone from a vision tower and a language model (`aim backbone`)."""

from .build import build_backbone
from .settings import BackboneSettings

__all__ = ["BackboneSettings", "build_backbone"]
