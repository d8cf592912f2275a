"""Counters of a server, in the format of Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .demonstrations import Prompt

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """What `/metrics` shows: requests by status, their time, tokens, demonstrations that were read, and memory."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        given: Any = {"registry": self.registry}
        self.requests = Counter("aim_requests", "Requests by HTTP status.", ["status"], **given)
        self.seconds = Histogram("aim_request_seconds", "Time from request to answer.", buckets=SECONDS, **given)
        self.at_work = Gauge("aim_requests_at_work", "Requests at work or waiting.", **given)
        self.hung_up = Counter("aim_clients_hung_up", "Clients that did not wait for their answer.", **given)
        self.prompt_tokens = Counter("aim_prompt_tokens", "Tokens of prompts, fused ones included.", **given)
        self.fused_tokens = Counter("aim_fused_tokens", "Fused tokens of prompts.", **given)
        self.saved_tokens = Counter("aim_saved_tokens", "Image tokens that demonstrations would have taken.", **given)
        self.new_tokens = Counter("aim_new_tokens", "Tokens of answers.", **given)
        self.demonstrations = Counter("aim_demonstrations", "Demonstrations of prompts.", **given)
        self.read = Counter("aim_demonstrations_read", "Demonstrations that had to be read.", **given)

    def note(self, prompt: Prompt) -> None:
        """Count a prompt."""
        self.prompt_tokens.inc(prompt.tokens)
        self.fused_tokens.inc(prompt.fused)
        self.saved_tokens.inc(prompt.saved or 0)
        self.demonstrations.inc(prompt.demonstrations)
        self.read.inc(prompt.read)

    def answered(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        self.new_tokens.inc(tokens)

    def page(self) -> bytes:
        """All of them as text."""
        return generate_latest(self.registry)
