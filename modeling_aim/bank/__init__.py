"""Demonstration banks: built from a stream, kept on disk or the Hub, chosen from for each query."""

from .bank import DemonstrationBank

__all__ = ["DemonstrationBank"]
