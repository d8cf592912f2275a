"""A Gradio Space: label some images, ask about a new one, and see four answers side by side.

    make space                                  # in a clone: its own environment, on hub_configs/aim-tiny
    python examples/space/app.py --port 7860    # the same in an environment with modeling-aim[space]

Visitors share the models and nothing else: demonstrations, backbone and depth belong to a session.
"""

from __future__ import annotations

import argparse
import functools
import html
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from answers import AIM_TINY, Backbone, aim_tiny_folder, answers, description, loaded, read, set_offline_defaults
from demonstrations import Labelled, added, checked_label, opened, opened_bank, saved_bank
from page import BANK_NOTE, CSS, DEPTH_NOTE, INTRODUCTION, NOTES, cards
from PIL import Image

set_offline_defaults()

import gradio as gr  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from uploads import UploadedFiles, UploadedImage  # noqa: E402

from modeling_aim.cli.tune import draw  # noqa: E402

logger = logging.getLogger("space")
HERE = Path(__file__).resolve().parent
EXAMPLES = {
    "two-names": "Two names, 4 images",
    "five-names": "Five names, 10 images",
    "sixteen-images": "Two names, 16 images",
}
QUESTION = "What is this?"
WITHOUT, WITH = "without projector", "with its projector"
HUB_ID = "HuggingFaceTB/SmolVLM-256M-Instruct"
NO_PICTURE = Image.new("RGB", (64, 64), (200, 200, 210))
THEME = gr.themes.Soft(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_border_width="1px",
    block_shadow="none",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_info_text_color="*body_text_color_subdued",
    block_info_text_color_dark="*body_text_color_subdued",
    button_secondary_border_color="*neutral_300",
    button_border_width="1px",
    input_border_width="1px",
    input_border_color="*neutral_300",
)


@dataclass(frozen=True)
class Session:
    """What belongs to one visitor.

    Args:
        backbone: what answers.
        demos: the demonstrations.
        selected: number of the one that is being changed.
        expected: the label of an example's query, to mark the answers.
        suggested: the depth that was found best.
    """

    backbone: Backbone = field(default_factory=Backbone)
    demos: tuple[Labelled, ...] = ()
    selected: int | None = None
    expected: str | None = None
    suggested: int | None = None


# --- what the page shows


def pictures(session: Session) -> list[tuple[Image.Image, str]]:
    """The demonstrations as the gallery shows them."""
    return [(demo.thumbnail or NO_PICTURE, demo.label) for demo in session.demos]


def counted(session: Session) -> str:
    """How many demonstrations there are, in a line."""
    count, names = len(session.demos), len({demo.label for demo in session.demos})
    if not count:
        return "No demonstrations yet. Add images below, or click an example above."
    return f"{count} demonstration{'s' * (count != 1)} of {names} label{'s' * (names != 1)}. Click one to change it."


# --- what the buttons do


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show what a visitor did wrong in one sentence, and log what we did wrong."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except gr.Error:
            raise
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        except Exception as error:
            logger.exception("A handler failed")
            message = f"That failed here ({type(error).__name__}); nothing was changed."
            raise gr.Error(message, duration=None, print_exception=False) from error

    return run


def _shown(session: Session) -> tuple[Any, ...]:
    """The session, its gallery, the line under it, and the row that changes one demonstration."""
    changing = session.selected is not None
    label = session.demos[session.selected].label if session.selected is not None else ""
    return (
        session,
        gr.Gallery(pictures(session), selected_index=session.selected),
        counted(session),
        gr.Row(visible=changing),
        gr.Textbox(label, label=f"Label of number {(session.selected or 0) + 1}"),
    )


@handler
def add(session: Session, paths: list[str] | None, label: str) -> tuple[Any, ...]:
    demos = added(session.demos, paths or [], label)
    return *_shown(replace(session, demos=demos, selected=None, expected=None)), ""


@handler
def select(session: Session, event: gr.SelectData) -> tuple[Any, ...]:
    return _shown(replace(session, selected=event.index))


@handler
def rename(session: Session, label: str) -> tuple[Any, ...]:
    demos, number = list(session.demos), session.selected or 0
    if demos[number].image is None:
        raise ValueError("This demonstration comes from a bank, where it was read with its label: remove it instead.")
    demos[number] = replace(demos[number], label=checked_label(label), fused=None)
    return _shown(replace(session, demos=tuple(demos), selected=None))


@handler
def remove(session: Session) -> tuple[Any, ...]:
    demos = [demo for number, demo in enumerate(session.demos) if number != session.selected]
    return _shown(replace(session, demos=tuple(demos), selected=None))


@handler
def clear(session: Session) -> tuple[Any, ...]:
    return _shown(replace(session, demos=(), selected=None))


@handler
def choose_query(session: Session, path: str | None) -> Session:
    if path is not None:
        opened(path)
    return replace(session, expected=None)


@handler
def ask(session: Session, path: str | None, question: str) -> tuple[Session, str]:
    if path is None:
        raise ValueError("There is no image to ask about: upload one on the right, or click an example.")
    result = answers(loaded(session.backbone), session.demos, opened(path), " ".join(question.split()) or QUESTION)
    return replace(session, demos=result.demos), cards(result, session.expected)


@handler
def use_example(folder: str, session: Session) -> tuple[Any, ...]:
    demos: tuple[Labelled, ...] = ()
    for path in sorted((HERE / "images" / folder).glob("demo-*.png")):
        demos = added(demos, [str(path)], path.stem.split("-")[-1])
    query = next((HERE / "images" / folder).glob("query-*.png"))
    session = replace(session, demos=demos, selected=None, expected=query.stem.split("-")[-1])
    return *_shown(session), str(query), QUESTION


@handler
def choose_backbone(session: Session, name: str, projector: str) -> tuple[Session, str, Any]:
    chosen = Backbone(" ".join(name.split()) or AIM_TINY, projector == WITH)
    status = description(chosen)
    return replace(session, backbone=chosen), status, gr.Button(visible=False)


@handler
def describe(session: Session) -> str:
    return description(session.backbone)


@handler
def save_bank(session: Session) -> tuple[Session, Any]:
    if not session.demos:
        raise ValueError("There is nothing to save: add demonstrations first.")
    model = loaded(session.backbone)
    session = replace(session, demos=read(model, session.demos)[0])
    path = Path(get_upload_folder()) / uuid.uuid4().hex / "aim-bank.zip"
    saved_bank(model, session.demos, path)
    label = f"Download aim-bank.zip ({path.stat().st_size / 1024:,.0f} KB)"
    return session, gr.DownloadButton(label, value=path, visible=True)


@handler
def load_bank(session: Session, path: str | None) -> tuple[Any, ...]:
    if path is None:
        return _shown(session)
    demos = opened_bank(path, loaded(session.backbone))
    return _shown(replace(session, demos=demos, selected=None, expected=None))


@handler
def find_depth(session: Session) -> tuple[Session, Any, str, Any]:
    if session.backbone.projector:
        raise ValueError("A projector is bound to its depth: choose “without projector” to compare depths.")
    if any(demo.image is None for demo in session.demos):
        raise ValueError("A bank was read at one depth: add images to compare depths.")
    if max(Counter(demo.label for demo in session.demos).values(), default=0) < 2:
        raise ValueError("At least two images of a label are needed, since each is left out in turn.")
    choice = loaded(session.backbone).choose_depth([demo.raw for demo in session.demos])
    path = Path(get_upload_folder()) / uuid.uuid4().hex / "depth.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(choice, path)
    status = " ".join([choice.verdict, *choice.notes])
    use = gr.Button(f"Answer at depth {choice.depth}", visible=choice.beats_words)
    return replace(session, suggested=choice.depth), gr.Image(path, visible=True), status, use


@handler
def use_depth(session: Session) -> tuple[Session, str]:
    backbone = replace(session.backbone, depth=session.suggested)
    return replace(session, backbone=backbone), description(backbone)


# --- the page


def page() -> gr.Blocks:
    """The page and what its parts do; everything that runs a model takes its turn."""
    start = Session(Backbone(AIM_TINY if aim_tiny_folder() else HUB_ID))
    with gr.Blocks(title="AIM", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        session = gr.State(start, time_to_live=3600)
        gr.HTML(INTRODUCTION, padding=False)
        with gr.Row(elem_classes="examples"):
            starts = {folder: gr.Button(title, size="sm", min_width=120) for folder, title in EXAMPLES.items()}
        with gr.Row():
            with gr.Column(min_width=300):
                gr.HTML("<h2>1. Demonstrations</h2>", padding=False)
                gallery = gr.Gallery(
                    show_label=False, columns=6, height="auto", object_fit="contain", allow_preview=False,
                    interactive=False, buttons=[], elem_id="demonstrations",
                )  # fmt: skip
                with gr.Row(elem_classes="line"):
                    count = gr.Markdown(counted(start), elem_classes="quiet")
                    clearing = gr.Button("Clear demonstrations", size="sm", min_width=150, scale=0)
                with gr.Row(visible=False, elem_classes="changing") as changing:
                    new_label = gr.Textbox(label="Label of number 1", scale=3, min_width=120, elem_id="new-label")
                    change = gr.Button("Change", size="sm", min_width=80)
                    drop = gr.Button("Remove", size="sm", min_width=80)
                with gr.Row():
                    label = gr.Textbox(
                        label="Label of new images", elem_id="label", min_width=200, max_length=200,
                        info="Empty: the file's name (dax-1.png: dax)",
                    )  # fmt: skip
                    files = UploadedFiles(
                        file_count="multiple", file_types=["image"], show_label=False, height=120, min_width=200,
                        elem_id="images",
                    )  # fmt: skip
            with gr.Column(min_width=300):
                gr.HTML("<h2>2. A new image</h2>", padding=False)
                query = UploadedImage(type="filepath", image_mode=None, sources=["upload", "clipboard"], height=220,
                                show_label=False, buttons=[], elem_id="query")  # fmt: skip
                question = gr.Textbox(QUESTION, label="Question", elem_id="question", max_length=500)
                asking = gr.Button("Ask", variant="primary", elem_id="ask")
        gr.HTML("<h2>3. Four answers</h2>", padding=False)
        result = gr.HTML(cards(None), elem_id="answers", padding=False)
        with gr.Tabs():
            with gr.Tab("Backbone"):
                status = gr.Markdown(elem_id="backbone-line")
                with gr.Row():
                    name = gr.Textbox(
                        start.backbone.name, label="Backbone or AIM repository", elem_id="backbone", scale=2,
                        info=f"{AIM_TINY}, or a Hub id such as {HUB_ID}",
                    )  # fmt: skip
                    projector = gr.Radio([WITHOUT, WITH], value=WITHOUT, label="Projector", scale=1,
                                         info="needs an AIM repository that was trained")  # fmt: skip
                loading = gr.Button("Load", size="sm")
            with gr.Tab("Bank"):
                gr.Markdown(BANK_NOTE)
                with gr.Row():
                    with gr.Column(min_width=240):
                        saving = gr.Button("Save the demonstrations as a bank", size="sm")
                        saved = gr.DownloadButton("Download", visible=False, size="sm", elem_id="bank-download")
                    bank = UploadedFiles(
                        file_types=[".zip"], label="Load a bank (aim-bank.zip)", height=140, elem_id="bank"
                    )
            with gr.Tab("Depth"):
                gr.Markdown(DEPTH_NOTE)
                finding = gr.Button("Compare depths on these demonstrations", size="sm")
                verdict = gr.Markdown(elem_id="verdict")
                picture = gr.Image(visible=False, show_label=False, buttons=["download"], elem_id="depth-picture")
                using = gr.Button("Answer at this depth", visible=False, size="sm")
        for note, body in NOTES.items():
            with gr.Accordion(note, open=False):
                gr.Markdown(body)

        outputs = [session, gallery, count, changing, new_label]
        turn: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        free: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        answer: dict[str, Any] = {"fn": ask, "inputs": [session, query, question], "outputs": [session, result]}
        for folder, button in starts.items():
            example = button.click(
                functools.partial(use_example, folder), session, [*outputs, query, question], **free
            )
            example.success(**answer, **turn)
        files.upload(add, [session, files, label], [*outputs, label], **free).then(lambda: None, None, files, **free)
        gallery.select(select, session, outputs, **free)
        gr.on([change.click, new_label.submit], rename, [session, new_label], outputs, **free)
        drop.click(remove, session, outputs, **free)
        clearing.click(clear, session, outputs, **free)
        query.input(choose_query, [session, query], session, **free).failure(lambda: None, None, query, **free)
        gr.on([asking.click, question.submit], **answer, **turn)
        chosen = {"fn": choose_backbone, "inputs": [session, name, projector], "outputs": [session, status, using]}
        gr.on([loading.click, name.submit], **chosen, **turn)
        blocks.load(describe, session, status, **turn)
        saving.click(save_bank, session, [session, saved], **turn)
        bank.upload(load_bank, [session, bank], outputs, **turn).then(lambda: None, None, bank, **free)
        finding.click(find_depth, session, [session, picture, verdict, using], **turn)
        using.click(use_depth, session, [session, status], **turn)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=None, help="7860, or the next free one")
    args = parser.parse_args()
    page().queue(max_size=32).launch(
        server_port=args.port, theme=THEME, css=CSS, footer_links=[], max_file_size="64mb", share=False,
        ssr_mode=False, run_history=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
