"""Gradio's image and file components for uploads only. (Gradio writes a `.pyi` file beside this one.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like


class _UploadsOnly:
    """Takes what the visitor's browser uploads, and downloads nothing for a client that gives a URL."""

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if is_http_url_like(str(url_or_file_path)):
            raise gr.Error("This Space downloads nothing: upload the file.", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)  # type: ignore[misc]


class UploadedImage(_UploadsOnly, gr.Image):
    """An image that is handed on as a path: Gradio would open it without bounds."""

    def get_block_name(self) -> str:
        return "image"

    def preprocess(self, payload: Any) -> str | None:
        if payload is not None and payload.path is None:
            raise gr.Error("Upload the image as a file.", print_exception=False)
        return None if payload is None else str(payload.path)


class UploadedFiles(_UploadsOnly, gr.File):
    """One or several files."""

    def get_block_name(self) -> str:
        return "file"
