"""A backbone from a vision tower and a language model, in LLaVA's two stages: `aim backbone`."""

from __future__ import annotations

from pathlib import Path

from .settings import BackboneSettings


def build_backbone(settings: BackboneSettings) -> Path:
    """Make a `LlavaForConditionalGeneration` with its processor; resumes an interrupted run with the same settings.

    Args:
        settings: all of the run.

    Returns:
        `settings.output`, with model, processor, and a model card with recipe, data and curves.

    Raises:
        ValueError: parts, data or settings that cannot work, or an output folder that holds another run.
    """
    raise NotImplementedError
