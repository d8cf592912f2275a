"""LLaVA's conversations about images, as a source of episodes."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.json_array import json_entries
from ..data.layouts import llava_file
from ..data.pairs import Pair, Unread, located
from ..data.rows import existing
from .episodes import Source


class Turn(Unread):
    """A question of a conversation and its answer, read from the file when they are asked for.

    Args:
        source: has the file.
        record: number of the conversation.
        number: of the pair in it.
        words: how many characters it has.
    """

    def __init__(self, source: LlavaConversations, record: int, number: int, words: int) -> None:
        self.source, self.record, self.number, self.size = source, record, number, (words, 1)

    def read(self) -> dict[str, Any]:
        return self.source.pairs_of(self.record)[self.number]


class LlavaConversations(Source):
    """Conversations about images in LLaVA's JSON (arXiv 2304.08485): each question and its answer is a pair.

    A human turn that is nothing but the image makes a caption of the answer, as in stage 1. Turns of a conversation
    are spread over the whole pass: side by side they would be demonstrations for one another, and a target could be
    answered from what was just said of the same image, without looking at it. All turns of a conversation are held
    out, or none.

    The file is gone through once, to note where each conversation lies (some 20 bytes a pair are held); a pair is read
    when its image is opened.

    Args:
        path: the JSON file, a list of `{"id", "image", "conversations": [{"from", "value"}]}`.
        images: folder of the images; that of the file when `None`.
        captions: take answers as captions, without their questions: LLaVA's stage 1, where questions are
            "Describe the image concisely" in other words.
        text_only: keep conversations without an image, of which LLaVA-1.5's mixture has some.

    Raises:
        ValueError: the file is no such list.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self, path: str, *, images: str | None = None, captions: bool = False, text_only: bool = False
    ) -> None:
        self.path, self.captions, self.text_only = llava_file(existing(path)), captions, text_only
        self.name = f"llava {self.path.name}"
        self.folder = self.path.parent if images is None else existing(images)
        self._left_out: Counter[str] = Counter()
        offsets, digests = array("q"), array("Q")  # of a conversation: its first byte and the one after its last
        images_of = array("H")  # of a conversation: its images
        records, numbers, words = array("i"), array("H"), array("i")  # of a pair
        for record, begin, end in json_entries(self.path):
            pairs = list(self._pairs(record, self._left_out))
            if not pairs:
                continue
            first = [str(record.get("image", "")), pairs[0].get("question", ""), pairs[0][_said(pairs[0])]]
            digest = hashlib.sha256("\0".join(first).encode("utf-8", "replace")).digest()
            records.extend([len(digests)] * len(pairs))
            numbers.extend(range(len(pairs)))
            words.extend(len(pair.get("question", "")) + len(pair[_said(pair)]) for pair in pairs)
            offsets.extend((begin, end))
            digests.append(int.from_bytes(digest[:8], "big"))
            image = record.get("image")
            images_of.append(len(image) if isinstance(image, list) else bool(image))
        self._offsets, self._digests = np.array(offsets).reshape(-1, 2), np.array(digests)
        self._records, self._numbers, self._words = np.array(records), np.array(numbers), np.array(words)
        self._images = np.array(images_of)

    def pairs_of(self, record: int) -> list[dict[str, Any]]:
        """The pairs of a conversation, by its number."""
        return list(self._pairs(self._record(record), Counter()))

    @property
    def conversations(self) -> int:
        """How many conversations the file has that can be used."""
        return len(self._digests)

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Characters and images of each conversation."""
        return np.bincount(self._records, self._words, len(self._digests)), self._images

    def conversation(self, number: int) -> tuple[Any, list[tuple[str, str]]]:
        """A conversation as the file has it.

        Returns:
            Where its image is (a list of several, `None` without), and its turns: what the human says, with `<image>`
            in its place, and the answer.
        """
        record = self._record(number)
        return located(self.folder, record.get("image")), list(self._turns(record["conversations"], Counter()))

    @property
    def left_out(self) -> Counter[str]:
        """Counts of what cannot be used in the file, by reason."""
        return Counter(+self._left_out)

    def _record(self, number: int) -> Any:
        begin, end = self._offsets[number].tolist()
        with self.path.open("rb") as file:
            file.seek(begin)
            return json.loads(file.read(end - begin))

    def _pairs(self, record: Any, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        image, turns = (record.get(key) for key in ("image", "conversations")) if isinstance(record, dict) else (0, 0)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            left_out["record without a conversation"] += 1
        elif not image and not self.text_only:
            left_out["record without an image"] += 1
        else:
            place = {"image": located(self.folder, image)} if image else {}
            for human, answer in self._turns(turns, left_out):
                question = human.replace("<image>", "").strip()
                has_question = bool(question) and not self.captions
                yield {**place, **({"question": question, "answer": answer} if has_question else {"text": answer})}

    def _turns(self, turns: Sequence[Mapping[str, Any]], left_out: Counter[str]) -> Iterator[tuple[str, str]]:
        """Each turn of the human that is answered, and the answer."""
        asked: str | None = None
        for turn in turns:
            value = turn["value"].strip() if isinstance(turn.get("value"), str) else ""
            if turn.get("from") == "gpt" and asked is not None:
                yield asked, value
                asked = None
            else:
                left_out["turn without its question or answer"] += asked is not None
                asked = value if turn.get("from") == "human" else None
        left_out["turn without its question or answer"] += asked is not None

    def documents(self, seed: int) -> Iterator[Sequence[Pair]]:
        self.skipped.update(+self._left_out)
        kept = np.arange(len(self._records))
        if self.part is not None:
            share, held_out = self.part
            chosen = (self._digests < share * 2**64) == held_out
            kept = kept[chosen[self._records]]
        order = np.random.default_rng(seed).permutation(kept)
        for start in range(0, len(order), 4096):
            some = order[start : start + 4096]
            columns = (column[some].tolist() for column in (self._records, self._numbers, self._words))
            yield from ([Turn(self, *pair)] for pair in zip(*columns, strict=True))

    def gives(self, document: Any) -> bool:
        return True  # `documents` gives those of its part


def _said(pair: Mapping[str, Any]) -> str:
    return "text" if "text" in pair else "answer"
