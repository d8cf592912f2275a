"""Answers of an AIM repository to the questions of LLaVA-Bench, in the published form, for a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.jsonl import append_lines, cut_torn_line, numbered_json
from ..images_aim import open_image
from ..progress import tracked


def write_answers(
    model: Any,
    questions: Sequence[Mapping[str, Any]],
    images: Path,
    output: Path,
    demos: Sequence[Mapping[str, Any]] = (),
    max_new_tokens: int = 512,
    model_id: str = "aim",
) -> int:
    """Answer the questions that a file has no answer to yet, and append to it.

    Args:
        model: an `AimForConditionalGeneration`; without demonstrations its backbone answers.
        questions: each with question_id, image and text.
        images: folder of their images.
        output: jsonl, a line `{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}` for each.
        demos: demonstrations, read once.
        max_new_tokens: most tokens of an answer.
        model_id: name of the model, in the file.

    Returns:
        How many were answered now.

    Raises:
        FileNotFoundError: an image is not there.
        ValueError: a line of the file is no answer.
    """
    missing = [row["image"] for row in questions if not (images / row["image"]).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} images are not in {images}, such as {missing[0]}.")
    answered = _answered(output)
    left = [row for row in questions if row["question_id"] not in answered]
    fused = model.read(list(demos)) if demos and left else None
    output.parent.mkdir(parents=True, exist_ok=True)
    for row in tracked(left, "answered", "questions"):
        prompt = model.processor.prompt(row["text"])
        inputs = model.processor(images=[open_image(images / row["image"])], text=prompt, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        ids = model.generate(**inputs, demos=fused, max_new_tokens=max_new_tokens, do_sample=False)
        text = model.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        entry = {
            "question_id": row["question_id"], "prompt": row["text"], "text": text,
            "answer_id": f"{model_id}-{row['question_id']}", "model_id": model_id,
            "metadata": {"demonstrations": len(demos)},
        }  # fmt: skip
        append_lines(output, [entry])
    return len(left)


def _answered(output: Path) -> set[Any]:
    """Questions that a file answers; a last line that a kill cut off is taken away."""
    if not output.exists():
        return set()
    cut_torn_line(output)
    rows = [row for _, row in numbered_json(output)]
    if not all(isinstance(row, dict) and "question_id" in row for row in rows):
        raise ValueError(f"{output} is no file of answers: a line lacks its question_id. Give another --output.")
    return {row["question_id"] for row in rows}
