"""The backbone's own processor, extended by demonstrations and few-shot chats."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from .configuration_aim import usable
from .demonstrations_aim import Demos, Selection, parse_demos
from .encoding_aim import SENTINEL, TOKENIZING, EncodingMixin, split_few_shot_chat, with_selection
from .families_aim import family_of_processor
from .files_aim import check_place, copy_shipped_files, staged_folder
from .images_aim import ImageRules, opened_chat, opened_images, opened_media

PROCESSOR_FILE = "processor_config.json"
SETTINGS = (
    "label_template", "question_template", "image_prompt", "few_shot_chats", "max_image_pixels", "image_sources",
)  # fmt: skip
IMAGE_SETTINGS = (
    "size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_pad", "do_image_splitting", "max_image_size", "image_grid_pinpoints", "min_pixels", "max_pixels",
    "crop_to_patches", "min_patches", "max_patches", "patch_size", "merge_size", "resample", "default_to_square",
    "pad_size", "temporal_patch_size", "image_size",
)  # fmt: skip


class AimProcessor(EncodingMixin, ProcessorMixin):
    """Wraps the processor of a backbone: same calls, same outputs, plus `demos=` and few-shot chats.

    Args:
        processor: the processor of the backbone.
        label_template: template of a demonstration that is a bare label. The words before the label matter:
            their hidden states carry what the backbone sees in the image, and lead it to the label that follows.
        question_template: template of a question and its answer; `{question}` stands before `{answer}`.
        image_prompt: the placeholder of one image in a prompt of this backbone. `None`: found in its chat template, or
            its image token.
        few_shot_chats: whether earlier (user with image, assistant) turns of a chat become demonstrations.
        max_image_pixels, image_sources: which images may be opened; see `ImageRules`. A public service sets
            `image_sources="given"`, or `"public"` to take URLs.

    Raises:
        ValueError: a setting is wrong; the message has what was given and what is expected.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        label_template: str = "This is {label}.",
        question_template: str = "{question} {answer}",
        image_prompt: str | None = None,
        few_shot_chats: bool = True,
        max_image_pixels: int = ImageRules.max_pixels,
        image_sources: str = ImageRules.sources,
    ) -> None:
        for name, template, needed in (
            ("label_template", label_template, ("{label}",)),
            ("question_template", question_template, ("{question}", "{answer}")),
        ):
            if not isinstance(template, str) or any(template.count(field) != 1 for field in needed):
                raise ValueError(f"{name}={template!r} must contain {' and '.join(needed)}, once.")
        if question_template.index("{question}") > question_template.index("{answer}"):
            raise ValueError(f"question_template={question_template!r} must have {{question}} before {{answer}}.")
        if not isinstance(image_prompt, str | None) or not isinstance(few_shot_chats, bool):
            raise ValueError(
                f"image_prompt={image_prompt!r}, few_shot_chats={few_shot_chats!r}: expected text or None, and true "
                "or false."
            )
        ImageRules(max_image_pixels, image_sources)
        self.processor: Any = processor
        self.max_image_pixels, self.image_sources = max_image_pixels, image_sources
        self.label_template = label_template
        self.question_template = question_template
        self.image_prompt = image_prompt
        self.few_shot_chats = few_shot_chats
        self._begin: tuple[Any, str] | None = None
        self._image_text: tuple[Any, str] | None = None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"  # generation continues on the right of every row of a batch

    # --- delegated to the backbone's processor

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("processor")
        if inner is None:
            raise AttributeError(name)
        return getattr(inner, name)

    @property
    def image_rules(self) -> ImageRules:
        """Which images may be opened, of queries and of demonstrations."""
        return ImageRules(self.max_image_pixels, self.image_sources)

    @property
    def reading_settings(self) -> dict[str, str]:
        """The settings that decide how a demonstration is read; fused tokens are bound to them.

        They cover templates, the image placeholder, how a prompt begins and `IMAGE_SETTINGS`, but not the tokenizer:
        after a change of it in place call `model.read_cache.clear()`, and read again what was read.
        """
        images = {name: _plain(getattr(self.image_processor, name, None)) for name in IMAGE_SETTINGS}
        return {
            "label template": self.label_template,
            "question template": self.question_template,
            "image prompt": self.image_text,
            "image settings": hashlib.sha256(json.dumps(images, sort_keys=True).encode()).hexdigest()[:12],
            **({"begins with": begin} if (begin := self.front(0)) else {}),
        }

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer."""
        return self.processor.tokenizer

    @property
    def image_processor(self) -> Any:
        """The backbone's image processor."""
        return self.processor.image_processor

    @property
    def chat_template(self) -> Any:
        """The backbone's chat template."""
        return getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self.processor.chat_template = template

    @property
    def model_input_names(self) -> list[str]:
        """The inputs that the backbone's processor makes, and demonstrations."""
        return [*self.processor.model_input_names, "demos", "chat_demos"]

    def post_process_image_text_to_text(self, *args: Any, **kwargs: Any) -> Any:
        """Decode answers as the backbone's processor does."""
        return self.processor.post_process_image_text_to_text(*args, **kwargs)

    # --- queries

    def __call__(
        self,
        images: object = None,
        text: str | list[str] | None = None,
        demos: Demos = None,
        shots: int | None = None,
        select: Selection = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a query, or a batch of queries, as the backbone's processor does.

        Args:
            images: as for the backbone's processor.
            text: the prompt or prompts, with the backbone's placeholder for each image.
            demos: demonstrations for the queries, passed on to `generate`; see `AimForConditionalGeneration`.
            shots, select: what `generate` is to select from a bank for each query, as its arguments of these names.
            **kwargs: as for the backbone's processor.

        Returns:
            The backbone's inputs, and `demos` where given, parsed: `None` for an empty list.

        Raises:
            ValueError: the number of image placeholders in the prompt is not the number of images, a demonstration is
                malformed, or `shots` or `select` come with demonstrations that are no bank.
        """
        self._check_placeholders(images, text)
        demos = with_selection(demos, shots, select)
        with TOKENIZING:
            inputs = self._encode(images, text, **kwargs)
        if demos is not None:
            inputs["demos"] = parse_demos(demos, self.image_rules)
        return inputs

    def _encode(self, images: object, text: str | list[str] | None, **kwargs: Any) -> BatchFeature:
        """The backbone's inputs; images stand between the words for a processor that takes them there."""
        images, texts = opened_images(images, self.image_rules), [text] if isinstance(text, str) else text
        kwargs = opened_media(kwargs, self.image_rules)
        family = family_of_processor(self.processor)
        if family.words_alone is not None and images is None and texts is not None:
            bos = self.tokenizer.bos_token or ""
            texts = [family.words_alone.format(bos=bos, words=words) for words in texts]
            kwargs["return_token_type_ids"] = "token_type_ids" in self.processor.model_input_names
            return BatchFeature(dict(self.tokenizer(texts, **kwargs)))
        if family.flat_images and images is not None:
            images = _flat(images)
        if family.blank_image and images is None and texts is not None:
            inputs = self.processor(text=text, **kwargs)
            blanks = self.image_processor([Image.new("RGB", (32, 32))] * len(texts), return_tensors="pt")
            inputs["pixel_values"] = torch.zeros_like(blanks["pixel_values"])
            return inputs
        if not family.images_between_words or not texts or not all(isinstance(t, str) for t in texts):
            return self.processor(images=images, text=text, **kwargs)
        remaining = iter(_flat(images))
        prompts = []
        for prompt in texts:
            words, *rest = prompt.split(self._image_token)
            parts = [words] + [part for more in rest for part in (next(remaining), more)]
            prompts.append([part for part in parts if part != ""])
        return self.processor(text=prompts, **kwargs)

    def _check_placeholders(self, images: object, text: str | list[str] | None) -> None:
        token = self._image_token
        texts = [text] if isinstance(text, str) else text
        if not token or not texts or not all(isinstance(t, str) for t in texts):
            return
        counts = [(sum(t.count(token) for t in texts), len(_flat(images)))]
        if isinstance(images, (list, tuple)) and len(images) == len(texts) and isinstance(images[0], (list, tuple)):
            counts = [(t.count(token), len(_flat(row))) for t, row in zip(texts, images, strict=True)]
        for placeholders, image_count in counts:
            if placeholders != image_count and (placeholders or self._needs_placeholders(token)):
                raise ValueError(
                    f"The prompt has {placeholders} image placeholders ({token!r}) for {image_count} images. Write "
                    f"one placeholder for each image, for example {self.image_text + 'What is this?'!r}, or use "
                    "processor.prompt(question)."
                )

    def _needs_placeholders(self, token: str) -> bool:
        """Whether prompts of this backbone need image placeholders: else its processor puts images in front."""
        return self.chat_template is not None and token in self.image_text

    @property
    def image_text(self) -> str:
        """The placeholder of one image in a prompt of this backbone, separators included (`"<image>\\n"`)."""
        if self.image_prompt is not None:
            return self.image_prompt
        if self._image_text is None or self._image_text[0] != self.chat_template:
            self._image_text = (self.chat_template, self._find_image_text())
        return self._image_text[1]

    @property
    def _image_token(self) -> str | None:
        """The token that the processor replaces by an image in a prompt; `None` where it replaces none."""
        token = family_of_processor(self.processor).image_token
        if token is None:
            token = getattr(self.processor, "image_token", None)
        return token if isinstance(token, str) else None

    def _find_image_text(self) -> str:
        token = self._image_token
        if self.chat_template is not None:
            words: dict[str, Any] = {"type": "text", "text": SENTINEL}
            with_image, without = (
                self.processor.apply_chat_template([{"role": "user", "content": content}])
                for content in ([{"type": "image"}, words], [words])
            )
            pairs = enumerate(zip(with_image, without, strict=False))
            start = next((i for i, (a, b) in pairs if a != b), len(with_image))
            between = with_image[start : with_image.index(SENTINEL)]
            if between.strip():
                return between
        return "<image>" if token is None else token

    def prompt(self, question: str, images: int = 1) -> str:
        """The prompt of a query: the backbone's chat template where it has one, else images and question.

        Args:
            question: what is asked.
            images: how many images the query has.
        """
        if self.chat_template is None:
            return self.image_text * images + question
        content: list[dict[str, Any]] = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        return self.rendered([{"role": "user", "content": content}])

    def rendered(self, chat: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a chat up to where the answer begins, without the BOS that the tokenizer adds itself."""
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        bos = self.tokenizer.bos_token  # some templates write it, and the tokenizer may add it again
        with TOKENIZING:
            twice = (
                bos and prompt.startswith(bos) and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
            )
        return prompt.removeprefix(bos) if twice else prompt

    def front(self, images: int) -> str:
        """The beginning of a prompt that no chat template renders: BOS, and placeholders of `images` images.

        BOS is left to the tokenizer, except where only the chat template writes it (SmolVLM, PaddleOCR-VL). There it
        is written here, so that a demonstration is read after BOS, as in a prompt.
        """
        if self._begin is None or self._begin[0] != self.chat_template:
            bos, begin = self.tokenizer.bos_token, ""
            if bos and self.chat_template is not None and self.prompt("a", images=0).startswith(bos):
                begin = bos
            self._begin = (self.chat_template, begin)
        return self._begin[1] + self.image_text * images

    # --- chats

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *args: Any,
        demos: Demos = None,
        shots: int | None = None,
        select: Selection = None,
        **kwargs: Any,
    ) -> Any:
        """Render (and tokenize) a chat; earlier turns with images become demonstrations.

        With `tokenize=True, return_dict=True`, and unless `few_shot_chats=False` is given or set, a chat whose last
        user turn has an image of its own, and whose earlier turns are all pairs (user with image, assistant), is
        split: the pairs are returned as `chat_demos`, and only the system turn and the last turn are rendered.
        Any other chat stays as it is (`chat_demos` is empty): a last turn without an image is about an earlier image,
        and a demonstration would lose what an earlier turn has besides words and images (a video, tool calls).

        Args:
            conversation: a chat, or a list of chats.
            *args: as for the backbone's processor.
            demos: demonstrations that do not come from the chat; they come before those of the chat.
            shots, select: what to select from a bank; see `__call__`.
            **kwargs: as for the backbone's processor.

        Returns:
            What the backbone's processor returns; with `tokenize=True, return_dict=True` also `demos` where given, and
            `chat_demos` (of each chat, in a list of chats) unless few-shot chats are off.

        Raises:
            ValueError: `demos` without `tokenize=True, return_dict=True`, a malformed demonstration, an image that
                cannot be read, or `shots` or `select` with demonstrations that are no bank.
        """
        few_shot = kwargs.pop("few_shot_chats", self.few_shot_chats)
        demos = with_selection(demos, shots, select)
        kwargs = opened_media(kwargs, self.image_rules)
        if not (kwargs.get("tokenize") and kwargs.get("return_dict")):
            if demos is not None:
                raise ValueError("apply_chat_template takes demos only with tokenize=True and return_dict=True.")
            if kwargs.get("tokenize"):  # then the backbone's processor would open images
                batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "content")
                chats = [getattr(chat, "messages", chat) for chat in conversation] if batched else [conversation]
                chats = [opened_chat(chat, self.image_rules) for chat in chats]
                conversation = chats if batched else chats[0]
            with TOKENIZING:
                return self.processor.apply_chat_template(conversation, *args, **kwargs)
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "content")
        chats = [getattr(chat, "messages", chat) for chat in conversation] if batched else [conversation]
        chat_demos = []
        if few_shot:
            split = [split_few_shot_chat(chat, self.image_rules) for chat in chats]
            chat_demos, chats = [s[0] for s in split], [s[1] for s in split]
        chats = [opened_chat(chat, self.image_rules) for chat in chats]
        with TOKENIZING:
            inputs = self.processor.apply_chat_template(chats if batched else chats[0], *args, **kwargs)
        if demos is not None:
            inputs["demos"] = parse_demos(demos, self.image_rules)
        if few_shot:  # also when empty: a pipeline batches only chats with the same keys
            inputs["chat_demos"] = chat_demos if batched else chat_demos[0]
        return inputs

    # --- files

    def to_dict(self) -> dict[str, Any]:
        """The settings of the backbone's processor, and those of this class."""
        return {
            **self.processor.to_dict(),
            "processor_class": type(self).__name__,
            "auto_map": {"AutoProcessor": "processing_aim.AimProcessor"},
            "backbone_processor_class": type(self.processor).__name__,
            "aim": {name: getattr(self, name) for name in SETTINGS},
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> list[str]:
        """Write the backbone processor's files, with a `processor_config.json` that names this class."""
        with staged_folder(save_directory) as folder:
            self.processor.save_pretrained(folder)
            self.to_json_file(folder / PROCESSOR_FILE)
            copy_shipped_files(folder)
        return [os.path.join(save_directory, PROCESSOR_FILE)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> AimProcessor:
        """Load from an AIM repository, or wrap the processor of a backbone's repository.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            **kwargs: settings of this class, and whatever the backbone's processor takes (`revision`, `token`, ...).
        """
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        name = str(pretrained_model_name_or_path)
        check_place(name)
        try:
            with usable(f"The {PROCESSOR_FILE} of {name}"):
                stored = dict(ProcessorMixin.get_processor_dict(name, **kwargs)[0])
        except OSError:
            stored = {}
        saved = stored.get("aim", {})
        if not isinstance(saved, dict) or not set(saved) <= set(SETTINGS):
            raise ValueError(f"The {PROCESSOR_FILE} of {name} has aim={saved!r:.80}; expected some of {SETTINGS}.")
        inner_class = stored.get("backbone_processor_class")
        if inner_class is not None:
            wrapped = getattr(transformers, str(inner_class), None)
            if not (isinstance(wrapped, type) and issubclass(wrapped, ProcessorMixin)):
                raise ValueError(
                    f"{PROCESSOR_FILE} of {name} wraps {inner_class!r}, which is not a processor of transformers "
                    f"{transformers.__version__}. Upgrade transformers, or check where the repository comes from."
                )
            with usable(f"The processor of {name}"):
                inner = wrapped.from_pretrained(name, **kwargs)
        elif "aim" in stored:
            kwargs.update(revision=stored.get("backbone_revision"), trust_remote_code=False)
            place = stored.get("backbone_name_or_path")
            if not isinstance(place, str):
                raise ValueError(f"The {PROCESSOR_FILE} of {name} has backbone_name_or_path={place!r:.80}, no text.")
            check_place(place)
            with usable(f"The processor of {place}"):
                inner = AutoProcessor.from_pretrained(place, **kwargs)
        else:
            with usable(f"The processor of {name}"):
                inner = AutoProcessor.from_pretrained(name, **kwargs)
        return cls(inner, **{**saved, **settings})


def _flat(images: Any) -> list[Any]:
    """Images of a batch, one after another, however they are nested."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in _flat(nested)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _plain(value: object) -> Any:
    """A setting of an image processor in a form that saving and loading does not change."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, (int, float)) else None if value is None else str(value)
