"""A chat model that is asked in words: a transformers model on this machine, or an OpenAI-compatible endpoint.

    model = LocalModel("HuggingFaceTB/SmolLM2-1.7B-Instruct")
    model = EndpointModel("gpt-4.1", "https://api.openai.com", key_from="OPENAI_API_KEY")
    answer = model.answer(Request(({"role": "user", "content": "Hello"},), model.name))

The key comes from an environment variable, is sent as the client's token, and is taken out of every message.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

DEFAULT_KEY = "AIM_ENDPOINT_KEY"  # the environment variable that has the key, unless another one is named
NO_KEY = "none"  # sent where there is no key: with no token at all the client would send that of the Hub
CHARACTERS_A_TOKEN = 4  # of English, to estimate
SHOWN = 300  # characters of what a server says, in messages
Message = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """What a text model is asked.

    Args:
        messages: turns with a role (system, user, assistant) and content; the last one is the user's.
        model: name of the model.
        temperature: 0 takes the most likely token each time.
        max_tokens: most tokens of the answer.
    """

    messages: tuple[Message, ...]
    model: str
    temperature: float = 0.0
    max_tokens: int = 1024

    @cached_property
    def digest(self) -> str:
        """Identity of a request: equal requests are asked once."""
        parts = [[dict(message) for message in self.messages], self.model, self.temperature, self.max_tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def estimated_tokens(self) -> int:
        """About how many tokens the prompt has: a quarter of its characters, and four a turn."""
        return sum(len(message["content"]) // CHARACTERS_A_TOKEN + 4 for message in self.messages)


@dataclass(frozen=True)
class Answer:
    """What a text model answered.

    Args:
        text: the answer as it came.
        finish: why it ended: "stop", or "length" where it was cut off.
        prompt_tokens: of the request, as the model counts them; an estimate where an endpoint does not say.
        answer_tokens: of the answer.
        model: name that the endpoint gives, which may have a date.
    """

    text: str
    finish: str
    prompt_tokens: int
    answer_tokens: int
    model: str

    @property
    def is_cut(self) -> bool:
        return self.finish == "length"


class Failed(Exception):
    """A request without an answer.

    Args:
        message: what happened, without the key.
        again: it may succeed if it is asked again.
        stop: no request can succeed: the run ends.
        after: seconds to wait first, where the server says so.
    """

    def __init__(self, message: str, *, again: bool = False, stop: bool = False, after: float | None = None) -> None:
        super().__init__(message)
        self.again, self.stop, self.after = again, stop, after


class TextModel(Protocol):
    """A chat model: its name, how many requests it takes at once, and an answer to one."""

    name: str
    most_at_once: int | None  # requests; `None` for any number

    def answer(self, request: Request) -> Answer:
        """The answer to a request.

        Raises:
            Failed: there is none.
        """


# --- an endpoint


class EndpointModel:
    """A chat model behind an OpenAI-compatible endpoint.

    Args:
        name: of the model, as the endpoint knows it.
        url: of the endpoint, with or without `/v1`.
        key_from: environment variable with the key; `AIM_ENDPOINT_KEY` when `None`, which may be unset where an
            endpoint needs no key.
        timeout: seconds until a request is given up.

    Raises:
        ValueError: the address is no http(s) address or has a key in it, or the variable that was named is unset.
    """

    most_at_once: int | None = None

    def __init__(self, name: str, url: str, key_from: str | None = None, timeout: float = 120.0) -> None:
        from huggingface_hub import InferenceClient

        self.name, self.url = name, checked_url(url)
        self._key = key_in(key_from)
        self.key_from = key_from or DEFAULT_KEY
        self.client = InferenceClient(base_url=self.url, token=self._key or NO_KEY, timeout=timeout)

    def answer(self, request: Request) -> Answer:
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError, OfflineModeIsEnabled

        try:
            output = self.client.chat_completion(
                [dict(message) for message in request.messages],
                model=request.model,
                temperature=request.temperature,
                max_tokens=request.max_tokens,
            )
        except OfflineModeIsEnabled:
            raise Failed(
                f"HF_HUB_OFFLINE is set, and huggingface_hub then refuses every address, {self.url} too. Unset it.",
                stop=True,
            ) from None
        except InferenceTimeoutError:
            raise Failed(f"{self.url} gave no answer within {self.client.timeout:g} seconds.", again=True) from None
        except HfHubHTTPError as error:
            raise self._refused(error) from None
        except HTTPError as error:
            raise Failed(f"{self.url} cannot be reached, or broke off: {self._shown(error)}", again=True) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise Failed(f"{self.url} sent what is no chat completion: {self._shown(error)}", again=True) from None
        return self._answer(request, output)

    def _answer(self, request: Request, output: Any) -> Answer:
        """The text of a completion and its tokens."""
        choice = output.choices[0] if isinstance(output.choices, list) and output.choices else None
        text = getattr(getattr(choice, "message", None), "content", None)
        if not isinstance(text, str) or not text.strip():
            kind = "an empty answer" if choice is not None else f"no answer: {self._shown(server_says(dict(output)))}"
            raise Failed(f"{self.url} sent {kind}", again=True)
        prompt, answer = (_count(output.usage, name) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(
            text=text,
            finish=str(getattr(choice, "finish_reason", None) or "stop"),
            prompt_tokens=request.estimated_tokens if prompt is None else prompt,
            answer_tokens=len(text) // CHARACTERS_A_TOKEN + 1 if answer is None else answer,
            model=str(output.model or request.model),
        )

    def _refused(self, error: Any) -> Failed:
        """What a status says: the key or the model is wrong, the server is busy, or the request is not for it."""
        status, response = error.response.status_code, error.response
        server_text = self._shown(server_says(response.text if response.is_closed else str(error)))
        if status in (401, 403):
            how = f"the key in {self.key_from} was refused" if self._key else f"a key is missing: set {self.key_from}"
            return Failed(
                f"{self.url} answers {status}: {how}. --key-from names another variable. It says: {server_text}",
                stop=True,
            )
        if status in (404, 405):
            return Failed(
                f"{self.url} answers {status}: it has no model {self.name!r}, or is no OpenAI-compatible endpoint. "
                f"Check --model and --endpoint. It says: {server_text}",
                stop=True,
            )
        if status == 402:
            return Failed(f"{self.url} answers 402, payment required. It says: {server_text}", stop=True)
        again = status in (408, 409, 425, 429) or status >= 500
        after = seconds_to_wait(response.headers.get("retry-after")) if again else None
        return Failed(f"{self.url} answers {status}: {server_text}", again=again, after=after)

    def _shown(self, value: object) -> str:
        """What came from outside, short and without the key."""
        text = " ".join(str(value).split())
        text = text.replace(self._key, "***") if self._key else text
        return text[:SHOWN] or "nothing"


def server_says(body: object) -> object:
    """The message in an error as OpenAI's protocol has it, or all of it."""
    try:
        read: Any = json.loads(body) if isinstance(body, str) else body
        return read["error"]["message"] if isinstance(read["error"], dict) else read["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body


def checked_url(url: str) -> str:
    """The address of an endpoint.

    Raises:
        ValueError: it is not http or https, or has a user or a query in it.
    """
    try:
        parts = urlsplit(url)
        hidden = bool(parts.username or parts.password or parts.query)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        hidden, valid = False, False
    if hidden:
        raise ValueError(
            f"--endpoint: the address of {parts.hostname} has a user, a password or a query in it. Put the key into "
            f"the environment ({DEFAULT_KEY}, or the variable that --key-from names)."
        )
    if not valid:
        raise ValueError(f"--endpoint {url!r}: expected an address such as https://api.example.com/v1.")
    return url.rstrip("/")


def key_in(variable: str | None) -> str | None:
    """The key in an environment variable; `None` where none was named and the default is unset.

    Raises:
        ValueError: the variable that was named is unset, is no name of a variable, or holds no key.
    """
    if variable is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ValueError(  # it may be the key itself: it is not repeated
            "--key-from takes the name of an environment variable in capitals, such as OPENAI_API_KEY, not the key."
        )
    name = variable or DEFAULT_KEY
    key = os.environ.get(name, "").strip()
    if variable is not None and not key:
        raise ValueError(f"The environment variable {variable} that --key-from names is not set. Put the key there.")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"The environment variable {name} holds no key: a key has no spaces and is plain ASCII.")
    return key or None


def seconds_to_wait(header: str | None) -> float | None:
    """What `Retry-After` asks for: seconds, or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _count(usage: object, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and value >= 0 else None


# --- a model on this machine


class LocalModel:
    """A chat model of transformers, loaded here; it takes one request at a time.

    Args:
        name: folder or Hub id.
        dtype: precision: bfloat16, float16 or float32; that of its weights when `None`.
        device_map: where it goes, such as "auto" or "cuda".

    Raises:
        ValueError: it has no chat template, or there is no such precision.
        OSError: there is no such model.
    """

    most_at_once: int | None = 1

    def __init__(self, name: str, dtype: str | None = None, device_map: str | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..runs import PRECISIONS

        if dtype not in (None, *PRECISIONS):
            raise ValueError(f"--dtype {dtype!r}: expected one of {', '.join(PRECISIONS)}.")
        self.name = name
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{name} has no chat template: it is a base model. Give one that was tuned for chats (often named "
                "Instruct or Chat)."
            )
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", device_map=device_map).eval()

    def answer(self, request: Request) -> Answer:
        import torch

        ids = self._ids(request)
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and ids.shape[1] + request.max_tokens > room:
            raise Failed(
                f"The prompt has {ids.shape[1]} tokens and the answer up to {request.max_tokens}, but {self.name} "
                f"holds {room}. Ask for shorter answers (--answer-tokens), or take another model."
            )
        torch.manual_seed(int(request.digest[:8], 16))
        sampling = {"do_sample": True, "temperature": request.temperature} if request.temperature > 0 else {}
        pad = self.tokenizer.pad_token_id
        with torch.inference_mode():
            output = self.model.generate(
                ids.to(self.model.device),
                attention_mask=torch.ones_like(ids).to(self.model.device),
                max_new_tokens=request.max_tokens,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                **{"do_sample": False, **sampling},
            )[0, ids.shape[1] :]
        text = self.tokenizer.decode(output, skip_special_tokens=True)
        if not text.strip():
            raise Failed(f"{self.name} answered nothing.")
        ends = self.model.generation_config.eos_token_id
        ended = len(output) < request.max_tokens or int(output[-1]) in (ends if isinstance(ends, list) else [ends])
        return Answer(text, "stop" if ended else "length", ids.shape[1], len(output), self.name)

    def _ids(self, request: Request) -> Any:
        """The tokens of the chat; where the template knows no system turn, its words go before the user's first."""
        from jinja2 import TemplateError

        messages = [dict(message) for message in request.messages]
        try:
            return self._templated(messages)
        except TemplateError:
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self._templated([first, *messages[2:]])

    def _templated(self, messages: list[dict[str, str]]) -> Any:
        given = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return given["input_ids"]
