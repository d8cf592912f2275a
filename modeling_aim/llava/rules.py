"""The instructions of a judge, by category: this project's own, or a user's `rule.json` unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data.jsonl import read_json

IN_THE_WILD = "llava_bench_"  # before the category of a question of LLaVA-Bench (in the wild)
SYSTEM = "You check the quality of answers. You are helpful and precise."


@dataclass(frozen=True)
class Rule:
    """The instructions of a judge for the questions of one category.

    Args:
        role: what the two answers are called.
        prompt: the task of the judge.
    """

    role: str
    prompt: str


_FORM = (
    "Rate how helpful, relevant, accurate and detailed each answer is, and give each a total of 1 to 10; more is "
    "better. "
    "The first line of your reply has two numbers alone, those of Assistant 1 and of Assistant 2, with one space in "
    "between. From the second line on explain them. Do not favour either answer for its place, and not the longer "
    "one for "
    "its length."
)
_WILD = "Two assistants answered a question about an image. You do not see the image; the context describes it. "
_COCO = (
    "Two assistants answered a question about an image. You do not see the image; the context has sentences about "
    "it, and "
    "its objects with the left, top, right and bottom edge of each as shares of the image. "
)
_ASKED = {
    "conv": "The question is about what can be seen. ",
    "detail": "The question asks for a detailed description. ",
    "complex": "The question needs thought beyond what can be seen. ",
}
OWN_RULES = {
    prefix + name: Rule("Assistant", seen + asked + _FORM)
    for prefix, seen in (("", _COCO), (IN_THE_WILD, _WILD))
    for name, asked in _ASKED.items()
}


def read_rules(path: Path) -> dict[str, Rule]:
    """The rules of a file in the published form, `{category: {"role", "prompt"}}`, as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form.
    """
    read = read_json(path)
    entries = read.items() if isinstance(read, dict) else ()
    rules = {
        category: Rule(entry["role"], entry["prompt"])
        for category, entry in entries
        if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("role", "prompt"))
    }
    if not rules:
        raise ValueError(f"{path} has no rules: expected {{category: {{'role': ..., 'prompt': ...}}}}.")
    return rules
