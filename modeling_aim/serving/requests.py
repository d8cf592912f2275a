"""What a chat completion request may hold, and the one sentence that refuses anything else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

IMAGES_AT_ONCE = 16  # that are open at the same time: of a turn, and in the whole prompt
STOPS, STOP_CHARACTERS = 4, 64
ROLES = ("system", "user", "assistant")
# fields of the OpenAI schema that change nothing here
HARMLESS = {
    "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
}  # fmt: skip
TAKEN = {
    "model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop",
    "demos", "shots", "select", "generation_config",
}  # fmt: skip
GENERATION_CONFIG = ("max_new_tokens", "do_sample", "temperature", "top_p")
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {}, "auto", "none", {"type": "text"}, ["text"])


class Refused(ValueError):
    """A request that is refused, with one sentence and an HTTP status from 400 to 499."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """What a server takes from its clients.

    Args:
        queue: most requests that are at work or wait; more are answered with 429.
        max_body_mb: largest body of a request, in MB.
        max_images: most images of a request, demonstrations included.
        max_image_pixels: most pixels of an image, width times height.
        image_sources: where images come from: given (in the request alone), public (URLs of public addresses too) or
            any (files of this machine and private addresses too).
        max_new_tokens: most new tokens of an answer.
    """

    queue: int = 16
    max_body_mb: int = 32
    max_images: int = 64
    max_image_pixels: int = 2**24
    image_sources: str = "given"
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion request that was checked.

    Args:
        messages: turns with text and `image_url` parts, as the client sent them.
        demos: name of a bank.
        shots: demonstrations to select from it.
        select: the selection strategy.
        stream: whether the answer is streamed.
        seed: of sampling.
        generation: fields of the request that say how is generated.
    """

    messages: list[dict[str, Any]]
    demos: str | None = None
    shots: int | None = None
    select: Any = None
    stream: bool = False
    seed: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)


def checked_request(body: Mapping[str, Any], limits: ServingLimits, banks: Sequence[str] = ()) -> ChatRequest:
    """Check a request before anything of it is opened.

    Args:
        body: the JSON object of the client.
        limits: what is taken.
        banks: names of the banks of the server.

    Raises:
        Refused: something is missing, malformed, over a limit, or of no use here; the message names it.
    """
    for name, value in body.items():
        if name not in TAKEN | HARMLESS and not (name == "n" and value == 1) and value not in NEUTRAL:
            raise Refused(f"{name}={value!r:.60} is not supported by this server.")
    stops = body.get("stop")
    stops = [stops] if isinstance(stops, str) else stops
    if stops is not None and not (
        isinstance(stops, list)
        and len(stops) <= STOPS
        and all(isinstance(stop, str) and 0 < len(stop) <= STOP_CHARACTERS for stop in stops)
    ):
        raise Refused(f"stop={stops!r:.60}: expected at most {STOPS} texts of at most {STOP_CHARACTERS} characters.")
    requested = {
        **_generation_config(body.get("generation_config")),
        **{k: v for k, v in body.items() if v is not None},
    }
    most = next((name for name in ("max_completion_tokens", "max_tokens", "max_new_tokens") if name in requested), "")
    generation = {
        "max_new_tokens": _number(requested, most, 1, limits.max_new_tokens, whole=True),
        "temperature": _number(requested, "temperature", 0, 2),
        "top_p": _number(requested, "top_p", 1e-6, 1),
        "do_sample": requested.get("do_sample"),
        "stop_strings": stops or None,
    }
    demos, stream = body.get("demos"), body.get("stream")
    if demos is not None and demos not in banks:
        known = f"it has {', '.join(banks)}" if banks else "it was started without any"
        raise Refused(f"demos={demos!r:.60} names no bank of this server; {known}.")
    if demos is None and (body.get("shots") is not None or body.get("select") is not None):
        raise Refused("shots and select choose from a bank: give its name as demos.")
    if not isinstance(stream, bool | None):
        raise Refused(f"stream={stream!r:.60}: expected true or false.")
    return ChatRequest(
        messages=_checked_messages(body.get("messages"), limits),
        demos=demos,
        shots=_number(body, "shots", 1, 2**31, whole=True),
        select=_checked_select(body.get("select")),
        stream=bool(stream),
        seed=_number(body, "seed", -(2**63), 2**63 - 1, whole=True),
        generation=generation,
    )


def _generation_config(text: Any) -> dict[str, Any]:
    """What `transformers chat` sends beside the fields of OpenAI: the few settings that this server takes from it."""
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("do_sample"), bool | None):
        raise Refused(f"generation_config={text!r:.60}: expected a JSON object as text.")
    return {name: config[name] for name in GENERATION_CONFIG if config.get(name) is not None}


def _number(body: Mapping[str, Any], name: str, least: float, most: float, whole: bool = False) -> Any:
    """A number of the request between two bounds; `None` where it has none."""
    value: Any = body.get(name)
    if value is None:
        return None
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise Refused(f"{name}={value!r:.60}: expected {kind} from {least} to {most}.")
    return value


def _checked_select(select: object) -> Any:
    """A selection strategy that JSON can say: a name, numbers, or an object of plain values."""
    plain = (str, int, float, bool, type(None))
    values = select.values() if isinstance(select, dict) else select if isinstance(select, list) else [select]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    if not all(isinstance(item, plain) and not (isinstance(item, float) and math.isnan(item)) for item in flat):
        raise Refused(f"select={select!r:.60}: expected a name, a list of numbers, or an object with by.")
    return select


def _checked_messages(messages: object, limits: ServingLimits) -> list[dict[str, Any]]:
    """The turns of a chat, with plain texts and image URLs in their parts."""
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message.")
    checked = [_checked_message(message, number) for number, message in enumerate(messages)]
    counts = [sum(part["type"] == "image_url" for part in message["content"]) for message in checked]
    if sum(counts) > limits.max_images:
        raise Refused(f"The request has {sum(counts)} images; this server takes {limits.max_images} at most.")
    if max(counts) > IMAGES_AT_ONCE:
        raise Refused(f"A message has {max(counts)} images; this server takes {IMAGES_AT_ONCE} at most.")
    if checked[-1]["role"] != "user":
        raise Refused(f"The last message is of the role {checked[-1]['role']}; expected user.")
    return checked


def _checked_message(message: object, number: int) -> dict[str, Any]:
    """One turn; its content is a list of parts."""
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(f"{where} must be an object with role and content.")
    role = {"developer": "system"}.get(message["role"], message["role"])
    if role not in ROLES:
        raise Refused(f"{where} has the role {role!r:.60}; expected one of {', '.join(ROLES)}.")
    if message.get("tool_calls"):
        raise Refused(f"{where} has tool calls, which this server does not support.")
    content = message.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list) or not content:
        raise Refused(f"{where} has no content; expected a text or a list of parts.")
    return {
        "role": role,
        "content": [_checked_part(part, f"{where}.content[{at}]") for at, part in enumerate(content)],
    }


def _checked_part(part: Any, where: str) -> dict[str, Any]:
    """A part of a message: a text, or an image by its URL."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        try:
            part["text"].encode()
        except UnicodeEncodeError:
            raise Refused(f"{where}.text holds a lone surrogate, which no tokenizer takes.") from None
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        given = part.get("image_url")
        url = given.get("url") if isinstance(given, dict) else given
        if not isinstance(url, str) or not url.partition(",")[2 if url.startswith("data:") else 0].strip():
            raise Refused(
                f"{where} has no image: expected image_url with the url of one, such as data:image/png;base64,..."
            )
        return {"type": "image_url", "image_url": {"url": url}}
    if kind in ("text", None):
        raise Refused(f"{where} must be an object with type, and text or image_url.")
    raise Refused(f"{where} is of the type {kind!r:.60}; this server takes text and image_url.")
