"""What the Space's page says and how its answers look."""

from __future__ import annotations

import html

from answers import NAMES, Answer, Answers

INTRODUCTION = """
<header class=intro><h1>Show a vision-language model what you mean</h1>
<p>Label some images, then ask about a new one. The frozen backbone reads each demonstration once, alone; AIM keeps the
hidden states of its words and drops the image tokens. No training is needed.</p>
<p class=start>Start with an example:</p></header>
"""
BANK_NOTE = (
    "A bank holds what was read, so that nothing is read again: fused tokens, labels and small pictures of the "
    "demonstrations. Only the backbone, projector and depth that read it can use it."
)
DEPTH_NOTE = (
    "States enter the decoder at a depth. This leaves each demonstration out in turn, asks for its label from the "
    "others, and compares all depths."
)
NOTES = {
    "What the four answers are": (
        "**Zero-shot**: the question alone. **Words only**: the labels of the demonstrations without their images. "
        "**Full**: every image and label in the prompt. **AIM**: each demonstration as a few fused tokens. The time "
        "is that of the answer; what AIM has read is kept.\n\n`aim-tiny` has two million parameters and was trained "
        "on drawn shapes with made-up names only: use the examples, or another backbone for photographs. The shapes "
        "and names of the examples were held out from its training."
    ),
    "What happens to my images": (
        "They stay in the memory of this Space for your session, at most an hour after you leave, and nobody else "
        "sees them. No URL is opened: images are uploaded."
    ),
}
CSS = """
.gradio-container {max-width: 1080px !important; margin: 0 auto !important}
.intro h1 {font-size: 1.7rem; font-weight: 700; margin: .4rem 0 .3rem}
.intro p {max-width: 46rem; margin: 0; line-height: 1.5; color: var(--body-text-color-subdued)}
.intro .start {margin-top: .8rem; font-weight: 600; color: var(--body-text-color)}
.gradio-container .prose h2 {font-size: 1.1rem; font-weight: 700; margin: .5rem 0 0}
.line {align-items: center}
.changing {align-items: end}
.gradio-container .html-container {padding: 0 !important}
.quiet {color: var(--body-text-color-subdued); font-size: .9rem}
.cards {display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem}
@media (max-width: 860px) {.cards {grid-template-columns: 1fr 1fr}}
.card {border: 1px solid var(--border-color-primary); border-radius: 12px; padding: .8rem .9rem; min-width: 0;
  background: var(--background-fill-primary); display: flex; flex-direction: column}
.card.aim {border: 2px solid var(--color-accent); background: var(--color-accent-soft)}
.card h3 {margin: 0; font-size: 1rem; font-weight: 700}
.card p {margin: 0; overflow-wrap: anywhere}
.card .note {font-size: .82rem; color: var(--body-text-color-subdued)}
.card .answer {font-size: 1.15rem; font-weight: 600; margin: .7rem 0 .2rem; flex-grow: 1;
  max-height: 8.5rem; overflow-y: auto}
.card .problem {margin: .7rem 0 .2rem; flex-grow: 1; color: var(--body-text-color-subdued)}
.card .right {color: #15803d; font-weight: 600; font-size: .9rem}
.card .wrong {color: #b91c1c; font-weight: 600; font-size: .9rem}
.dark .card .right {color: #4ade80} .dark .card .wrong {color: #f87171}
.card .bar {height: 6px; border-radius: 3px; background: var(--border-color-primary); margin: .6rem 0 .3rem}
.card .bar i {display: block; height: 100%; border-radius: 3px; background: var(--color-accent)}
.card .cost {font-size: .85rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums}
.read {margin: .6rem 0 0; font-size: .9rem; color: var(--body-text-color-subdued)}
#demonstrations {min-height: 7rem}
#demonstrations .grid-wrap {height: auto; min-height: 0; max-height: 19rem; padding: .6rem}
#demonstrations .grid-container {grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); gap: .5rem}
#demonstrations .gallery-item, #demonstrations .thumbnail-lg {height: auto; aspect-ratio: auto}
#demonstrations .thumbnail-lg {display: flex; flex-direction: column; padding: 3px}
#demonstrations .thumbnail-lg img {aspect-ratio: 1; width: 100%; height: auto; border-radius: 4px}
#demonstrations .caption-label {position: static; max-width: 100%; margin: 2px 0 0; padding: 0; border: 0;
  background: none; box-shadow: none; font-size: .8rem; text-align: center; color: var(--body-text-color) !important;
  opacity: 1}
#query .image-frame img, #query img {width: 100%; height: 100%; object-fit: contain}
footer {display: none !important}
"""


def cards(result: Answers | None, expected: str | None = None) -> str:
    """The four answers side by side."""
    most = 1 if result is None else max([answer.tokens for answer in result.by_method.values()] + [1])
    drawn = []
    for method, (title, note) in NAMES.items():
        answer = None if result is None else result.by_method[method]
        drawn.append(
            f'<section class="card {method}" data-method="{method}" aria-label="{title}"><h3>{title}</h3>'
            f"<p class=note>{note}</p>{_answer(answer, most, expected)}</section>"
        )
    footer = "<p class=read>Ask, and four answers appear here.</p>" if result is None else _reading(result)
    return f'<div class=cards role="status" aria-live="polite">{"".join(drawn)}</div>{footer}'


def _answer(answer: Answer | None, most: int, expected: str | None) -> str:
    if answer is None:
        return "<p class=answer>&nbsp;</p>"
    if answer.problem:
        tokens = f"<p class=cost>{answer.tokens:,} tokens</p>" if answer.tokens else ""
        return f"<p class=problem>{html.escape(answer.problem)}</p>{tokens}"
    mark = ""
    if expected is not None:
        right = expected.lower() in answer.text.lower().replace(".", " ").split()
        mark = f"<span class={'right' if right else 'wrong'}>{'✓ right' if right else '✗ wrong'}</span>"
    return (
        f"<p class=answer>{html.escape(answer.text) or '(nothing)'}</p>{mark}"
        f"<div class=bar aria-hidden=true><i style='width:{max(100 * answer.tokens / most, 2):.0f}%'></i></div>"
        f"<p class=cost><b>{answer.tokens:,}</b> tokens <b>{answer.milliseconds:,.0f}</b> ms</p>"
    )


def _reading(result: Answers) -> str:
    kept = len(result.demos) - result.read
    parts = [f"AIM read {_count(result.read)} in {result.milliseconds:,.0f} ms"] if result.read else []
    parts += [f"{_count(kept)} had been read before"] if kept else []
    return f"<p class=read>{'; '.join(parts)}.</p>" if parts else ""


def _count(demonstrations: int) -> str:
    return f"{demonstrations} demonstration{'s' * (demonstrations != 1)}"
