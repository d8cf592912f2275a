"""Conversations about images in the words of a language model's chat template, and which of their characters it is to
write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

SLOT = (
    "aimslot{:04d}q"  # stands for a text while a template is rendered: templates trim, split and quote what they get
)
SLOTS = re.compile(r"aimslot(\d{4})q")
# In front of a template whose contents are strings: an image becomes its token, parts stand on lines of their own.
FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set parts = namespace(text='') -%}"
    "{%- if message['content'] is string or message['content'] is none -%}"
    "{%- set parts.text = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] or [] -%}"
    "{%- set parts.text = parts.text + ('' if loop.first else '\\n') + "
    "('IMAGE' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=parts.text)] -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# The conversation form of LLaVA's first models (`v1`, from Vicuna).
V1 = (
    "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + ' ' -}}{%- set messages = messages[1:] -%}"
    '{%- else -%}{{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives '
    "helpful, detailed, and polite answers to the user's questions. \" -}}{%- endif -%}"
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' + message['content'] + ' ' -}}{%- else -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
Turn = tuple[str, str]  # what the user says, with image tokens in it, and the answer


def chosen_template(tokenizer: Any, given: str | None, name: str) -> str:
    """The chat template that is asked for, or the language model's own.

    Args:
        tokenizer: of the language model.
        given: `v1`, a Jinja file, or `None` for the tokenizer's.
        name: of the language model, for the message.

    Raises:
        ValueError: there is none.
        FileNotFoundError: there is no such file.
    """
    if given == "v1":
        return V1
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"The chat template {given} does not exist. Give a Jinja file, or v1.")
        return Path(given).read_text(encoding="utf-8")
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        own = own.get("default")
    if not own:
        raise ValueError(
            f"The language model {name} has no chat template, so nothing says how its conversations are written. Give "
            "chat_template='v1' (--chat-template v1) for LLaVA's form, or a Jinja file."
        )
    return own


def accept_images(tokenizer: Any, template: str, image_token: str) -> str:
    """A chat template that takes images in the content of a message, made of one that may not.

    A template that writes the image token itself stays as it is; another one gets code before it that makes a
    string of each content, with the image token for an image.

    Raises:
        ValueError: the template cannot be rendered with a question, an image and an answer.
    """
    if _takes_images(tokenizer, template, image_token) is None:
        return template
    flat = FLATTEN.replace("IMAGE", image_token.replace("\\", "\\\\").replace("'", "\\'")) + template
    problem = _takes_images(tokenizer, flat, image_token)
    if problem is not None:
        raise ValueError(
            f"The chat template cannot write a question about an image and its answer ({problem}). Give another one "
            "with chat_template (--chat-template FILE.jinja), or v1."
        )
    return flat


def _takes_images(tokenizer: Any, template: str, image_token: str) -> str | None:
    """What is wrong with a template for images; `None` for nothing."""
    turns = [("user", [{"type": "image"}, _text(SLOT.format(0))]), ("assistant", [_text(SLOT.format(1))])]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        written = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wanted = {image_token: "the image token", SLOT.format(0): "the question", SLOT.format(1): "the answer"}
    wrong = [f"{what} stands {written.count(text)} times in it" for text, what in wanted.items()
             if written.count(text) != 1]  # fmt: skip
    return "; ".join(wrong) or None


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@dataclass(frozen=True)
class Written:
    """A conversation in words.

    Args:
        text: all of it, each image as often its token as it has features.
        spans: characters that the language model is to write: each answer and the token that ends it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatWriter:
    """Writes conversations by a chat template, and knows which characters are the assistant's.

    An answer is scored from the end of the generation prompt on (with the space, or the empty thought, that the
    template writes before it) to the token that ends it. Where a template writes no such token, the tokenizer's EOS
    follows the last answer.

    Args:
        tokenizer: whose chat template takes images.
        image_token: stands for an image.
        image_tokens: features of an image.
    """

    def __init__(self, tokenizer: Any, image_token: str, image_tokens: int) -> None:
        self.tokenizer, self.image_token, self.image_tokens = tokenizer, image_token, image_tokens
        probe = self._rendered(("T",), ("T",))
        prompt = self._rendered(("T",), ())
        before = probe[: probe.index(SLOT.format(1))]
        self.lead = before[len(prompt) :] if before.startswith(prompt) else ""
        after = probe[probe.index(SLOT.format(1)) + len(SLOT.format(1)) :].lstrip()
        ends = [token for token in {*tokenizer.get_added_vocab(), tokenizer.eos_token} if token]
        self.end = max((token for token in ends if after.startswith(token)), key=len, default="")
        if not self.end and not tokenizer.eos_token:
            raise ValueError(
                "Neither the chat template nor the tokenizer has a token that ends an answer, so the backbone would "
                "never stop. Set the tokenizer's eos_token."
            )

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.tokenizer.convert_tokens_to_ids(self.end or self.tokenizer.eos_token)

    def conversation(self, turns: Sequence[Turn]) -> Written:
        """A conversation by the template.

        Args:
            turns: what the user says, `<image>` as the image token where an image stands, and the answer.

        Raises:
            ValueError: the template leaves a part of it out.
        """
        words: list[str] = []
        layouts = []
        for question, answer in turns:
            pieces = [piece.strip("\n") for piece in re.split(f"({re.escape(self.image_token)})", question)]
            pieces = [piece for piece in pieces if piece.strip()]
            layouts.append("".join("I" if piece == self.image_token else "T" for piece in pieces))
            words += [piece for piece in pieces if piece != self.image_token] + [answer]
        rendered = self._rendered(tuple(layouts), tuple("T" for _ in turns))
        return self._filled(rendered, words, {n - 1 for n in self._after(layouts)})

    @staticmethod
    def _after(layouts: Sequence[str]) -> list[int]:
        """Numbers of the slots after each answer."""
        places, count = [], 0
        for layout in layouts:
            count += layout.count("T") + 1
            places.append(count)
        return places

    def caption(self, images: int, words: str) -> Written:
        """An image and its caption, which ends in a line break: LLaVA's stage 1, without a question."""
        front = self.image_token * (self.image_tokens * images)
        return Written(f"{front}{words}\n", ((len(front), len(front) + len(words) + 1),))

    def plain(self, turns: Sequence[Turn]) -> Written:
        """A conversation without the chat template: its texts one after another, a space between, EOS at the end.

        Args:
            turns: as for `conversation`; their texts hold every word that tells speakers apart.

        Raises:
            ValueError: the tokenizer has no EOS, so that no answer would end.
        """
        if not self.tokenizer.eos_token:
            raise ValueError("The tokenizer has no eos_token, which ends a conversation in the plain format.")
        text, spans = "", []
        for asked, answer in turns:
            text += asked.replace(self.image_token, self.image_token * self.image_tokens) + " " * bool(asked)
            spans.append((len(text), len(text) + len(answer)))
            text += f"{answer} "
        end = text[:-1] + self.tokenizer.eos_token
        return Written(end, (*spans[:-1], (spans[-1][0], len(end))))

    @lru_cache(maxsize=256)  # noqa: B019  one writer lives as long as its run
    def _rendered(self, layouts: tuple[str, ...], answers: tuple[str, ...]) -> str:
        """A conversation with slots for its texts; without the last answer it ends in the generation prompt."""
        count, messages = 0, []
        for number, layout in enumerate(layouts):
            content: list[dict[str, str]] = []
            for kind in layout:
                content.append({"type": "image"} if kind == "I" else _text(SLOT.format(count)))
                count += kind == "T"
            messages.append({"role": "user", "content": content})
            if number < len(answers):
                messages.append({"role": "assistant", "content": [_text(SLOT.format(count))]})
                count += 1
        prompt = len(answers) < len(layouts)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        if len(SLOTS.findall(text)) != count:
            raise ValueError(
                f"The chat template writes {len(SLOTS.findall(text))} of the {count} texts of a conversation."
            )
        return text

    def _filled(self, rendered: str, words: Sequence[str], answers: set[int]) -> Written:
        """The texts in their slots, and the spans of the answers."""
        pieces, text = SLOTS.split(rendered), ""
        spans: list[tuple[int, int]] = []
        last = max(answers)
        for place in range(0, len(pieces), 2):
            between = pieces[place]
            if place and (number := int(pieces[place - 1])) in answers:
                stripped = between.lstrip()
                if self.end and stripped.startswith(self.end):
                    length = len(between) - len(stripped) + len(self.end)
                    spans[-1] = (spans[-1][0], spans[-1][1] + length)
                elif number == last:
                    between = self.tokenizer.eos_token
                    spans[-1] = (spans[-1][0], spans[-1][1] + len(between))
            text += between.replace(self.image_token, self.image_token * self.image_tokens)
            if place + 1 < len(pieces):
                number = int(pieces[place + 1])
                start = len(text) - (len(self.lead) if number in answers and text.endswith(self.lead) else 0)
                text += words[number]
                if number in answers:
                    spans.append((start, len(text)))
        return Written(text, tuple(spans))

    def encoded(self, written: Written, max_length: int) -> tuple[list[int], list[int]]:
        """Token ids, and labels that are -100 but where the language model is to write; cut at `max_length`."""
        bos = self.tokenizer.bos_token
        tokens = self.tokenizer(
            written.text,
            add_special_tokens=not (bos and written.text.startswith(bos)),
            return_offsets_mapping=True,
            verbose=False,
        )
        labels = [
            token if end > begin and any(end > a and begin < b for a, b in written.spans) else -100
            for token, (begin, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ]
        return tokens["input_ids"][:max_length], labels[:max_length]
