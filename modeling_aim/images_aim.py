"""The only place where images are opened: from files, URLs, bytes and arrays, within bounds.

A path, a URL or bytes may come from somebody else, who then chooses the input of an image decoder. So formats and
pixels are bounded, and a public service refuses paths and private addresses.
"""

from __future__ import annotations

import base64
import binascii
import io
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # no EPS: it is a program
IMAGE_SOURCES = ("any", "public", "given")
DOWNLOAD_SECONDS = 20.0
DOWNLOAD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ImageRules:
    """Which images may be opened; settings of a processor.

    Args:
        max_pixels: most pixels of an image, width times height; by default where Pillow warns. Pillow itself refuses
            twice `PIL.Image.MAX_IMAGE_PIXELS`, whatever is given here.
        sources: `"any"`: files and URLs too; `"public"`: URLs of public addresses, but no files of this machine and
            no private, loopback or link-local address, nor redirects to one; `"given"`: neither files nor URLs, only
            images, arrays, bytes and base64.

    Raises:
        ValueError: a setting is out of its range.
    """

    max_pixels: int = 89_478_485
    sources: str = "any"

    def __post_init__(self) -> None:
        if isinstance(self.max_pixels, bool) or not isinstance(self.max_pixels, int) or self.max_pixels < 1:
            raise ValueError(f"max_image_pixels={self.max_pixels!r}: expected a whole number, 1 or more.")
        if self.sources not in IMAGE_SOURCES:
            raise ValueError(f"image_sources={self.sources!r}: expected one of {', '.join(IMAGE_SOURCES)}.")

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `ValueError` for an image `(width, height)` of too many pixels."""
        if size[0] * size[1] > self.max_pixels:
            raise ValueError(
                f"it has {size[0]} x {size[1]} pixels, more than max_image_pixels={self.max_pixels} of the processor"
            )


def open_image(
    image: object, rules: ImageRules | None = None, shrink: Callable[[tuple[int, int]], int] | None = None
) -> Image.Image:
    """Load one image as RGB.

    Args:
        image: a PIL image (of floats: in 0..1), an array `(height, width[, 1, 3 or 4])`, uint8 or float in 0..1, bytes
            of an image file, a path, a URL, a `data:` URL or base64.
        rules: what may be opened.
        shrink: the power of two by which the sides of an image of a size `(width, height)` may be divided, 1 for none.
            A JPEG is decoded at that scale. The size that comes out is rounded up.

    Raises:
        ValueError: it cannot be read, is cut short, has too many pixels or numbers that are not finite, or comes from
            where nothing may be opened; the message says which image and why.
    """
    rules = rules or ImageRules()
    try:
        if isinstance(image, np.ndarray | torch.Tensor):
            return _of_array(image, rules)
        if not isinstance(image, Image.Image):
            with Image.open(_file(image, rules), formats=_formats()) as opened:
                return _loaded(opened, rules, shrink)
        return _loaded(image, rules, shrink)
    except Exception as error:
        raise ValueError(
            f"Cannot read the image {image!r:.120} ({type(error).__name__}: {error}). "
            "Give a PIL image, an image file, a URL or an array (height, width, 3)."
        ) from error


def is_readable(image: bytes | str | os.PathLike[str]) -> bool:
    """Whether a file, or its bytes, has the header of an image that may be opened; pixels are not decoded."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats()) as opened:
            ImageRules().check_size(opened.size)
        return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def is_address(text: object) -> bool:
    """Whether a text names an image by URL."""
    return isinstance(text, str) and text.lower().startswith(("http://", "https://"))


def file_named(images: Sequence[Any]) -> str:
    """Which file or URL the first of `images` names, for a message; empty for images in memory."""
    paths = [os.fspath(image) for image in images if isinstance(image, (str, os.PathLike))]
    return f" (image {paths[0]!r:.120})" if paths else ""


def opened_images(images: object, rules: ImageRules) -> Any:
    """Open the paths, URLs and bytes among the images of a query, however they are nested, and check the others.

    Images and arrays stay as they are, so that the backbone's processor gets the caller's own; it knows no images of
    floats (PIL's mode "F"), so these are converted.
    """
    if isinstance(images, (list, tuple)):
        return [opened_images(image, rules) for image in images]
    if isinstance(images, (str, bytes, os.PathLike)):
        return open_image(images, rules)
    if isinstance(images, Image.Image):
        if images.mode == "F":
            return open_image(images, rules)
        try:
            rules.check_size(images.size)
            images.load()
        except Exception as error:
            raise ValueError(f"Cannot read the image {images!r:.120} ({type(error).__name__}: {error}).") from error
    elif isinstance(images, np.ndarray | torch.Tensor):
        _check_array(images, rules)
    return images


def opened_media(options: Mapping[str, Any], rules: ImageRules) -> dict[str, Any]:
    """Arguments for the backbone's processor with their images opened, so that nothing else fetches them.

    Args:
        options: of a call of the processor, among them `processor_kwargs` of a chat.
        rules: what may be opened.

    Raises:
        ValueError: an image cannot be opened, or a video or audio file is named that may not be fetched.
    """
    opened = dict(options)
    for name in ("videos", "audio"):
        _check_unnamed(opened.get(name), name, rules)
    if opened.get("images") is not None:
        opened["images"] = opened_images(opened["images"], rules)
    if isinstance(opened.get("processor_kwargs"), Mapping):
        opened["processor_kwargs"] = opened_media(opened["processor_kwargs"], rules)
    return opened


def _check_unnamed(media: object, what: str, rules: ImageRules) -> None:
    """Raise `ValueError` for a path or URL among videos or audio, however nested, where none is fetched."""
    if rules.sources == "any":
        return
    if isinstance(media, (str, os.PathLike)):
        raise ValueError(
            f"image_sources={rules.sources!r}: no {what} is fetched, such as {media!r:.80}. Give it opened."
        )
    for part in media.values() if isinstance(media, Mapping) else media if isinstance(media, (list, tuple)) else ():
        _check_unnamed(part, what, rules)


def opened_chat(chat: Iterable[Mapping[str, Any]], rules: ImageRules) -> list[Any]:
    """A chat with its images opened, so that nothing else fetches them.

    Raises:
        ValueError: an image cannot be opened, or a video is named that may not be fetched.
    """
    return [_opened_turn(turn, rules) for turn in chat]


def _opened_turn(turn: Mapping[str, Any], rules: ImageRules) -> Any:
    content = turn.get("content")
    if not isinstance(content, (list, tuple)):
        return turn
    blocks = []
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind in ("video", "audio"):
            _check_unnamed([block.get(key) for key in (kind, "url", "path", "base64")], kind, rules)
        if kind in ("image", "image_url"):
            images = block_images(block)
            blocks += [{"type": "image", "image": opened_images(image, rules)} for image in images] or [block]
        else:
            blocks.append(block)
    return {**turn, "content": blocks}


def block_images(block: Mapping[str, Any]) -> list[Any]:
    """Images of a chat block, in any of the usual notations."""
    if block["type"] == "image":
        return [block[key] for key in ("image", "url", "path", "base64") if block.get(key) is not None]
    if block["type"] == "image_url":
        address = block["image_url"]
        return [address.get("url", "") if isinstance(address, Mapping) else address]
    return []


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _loaded(
    image: Image.Image, rules: ImageRules, shrink: Callable[[tuple[int, int]], int] | None = None
) -> Image.Image:
    rules.check_size(image.size)  # before its pixels are decoded
    size, scale = image.size, 1
    if shrink is not None:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        scale = shrink(size[::-1] if turned else size)
        if scale > 1 and isinstance(image, ImageFile.ImageFile):
            image.draft(None, (size[0] // scale, size[1] // scale))  # JPEG decodes at a half, a quarter or an eighth
            scale //= max(round(size[0] / image.width), 1)
    turned_image = ImageOps.exif_transpose(image)
    # Pillow would clip the numbers of a float image to 0..255
    whole = _of_array(turned_image, rules) if turned_image.mode == "F" else turned_image.convert("RGB")
    return whole.reduce(scale) if scale > 1 else whole


def _check_finite(pixels: np.ndarray | torch.Tensor) -> None:
    if isinstance(pixels, torch.Tensor):
        finite = not pixels.is_floating_point() or bool(torch.isfinite(pixels).all())
    else:
        finite = pixels.dtype.kind != "f" or bool(np.isfinite(pixels).all())
    if not finite:
        raise ValueError("Cannot read the image: it has pixels that are not finite (NaN or infinite).")


def _check_array(pixels: np.ndarray | torch.Tensor, rules: ImageRules) -> None:
    """Raise `ValueError` for an array (one image or several) of too many pixels, or with some that are not finite."""
    shape = tuple(pixels.shape)
    last = len(shape) > 2 and shape[-1] in (1, 3, 4)
    if len(shape) >= 2:
        try:
            rules.check_size(shape[-3:-1][::-1] if last else shape[-2:][::-1])
        except ValueError as error:
            raise ValueError(f"Cannot read the image: {error}.") from None
    _check_finite(pixels)


def _of_array(image: object, rules: ImageRules) -> Image.Image:
    pixels = np.asarray(image)
    shape = pixels.shape
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"an image array must be (height, width, 3), got shape {shape}")
    rules.check_size((pixels.shape[1], pixels.shape[0]))
    _check_finite(pixels)
    top = 1 if pixels.dtype.kind in "fb" else 255
    if pixels.size == 0 or pixels.min() < 0 or pixels.max() > top:
        value_range = "none" if pixels.size == 0 else f"{pixels.min()}..{pixels.max()}"
        raise ValueError(f"pixels of type {pixels.dtype} must lie in 0..{top}, found {value_range}")
    pixels = (pixels * (255 // top)).round().astype(np.uint8) if top == 1 else pixels.astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels).convert("RGB")


def _file(image: object, rules: ImageRules) -> Any:
    """A path, or the bytes of an image in memory."""
    if isinstance(image, (bytes, bytearray)):
        return io.BytesIO(image)
    path = os.fspath(image) if isinstance(image, os.PathLike) else image
    if not isinstance(path, str):
        raise TypeError(f"an image cannot be a {type(image).__name__}")
    if is_address(path):
        return io.BytesIO(fetched(path, rules))
    if rules.sources == "any" and os.path.isfile(path):
        return path
    if rules.sources == "any" and os.path.isdir(path):
        raise IsADirectoryError(f"{os.path.abspath(path)} is a folder")
    try:
        text = path.split(",", 1)[1] if path.startswith("data:") else path
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError, IndexError):
        if rules.sources != "any":
            raise ValueError(f"image_sources={rules.sources!r}: no file of this machine is opened") from None
        raise FileNotFoundError(
            f"there is no file {os.path.abspath(path)!s:.200}, and it is neither a URL nor base64"
        ) from None


# --- URLs


def fetched(url: str, rules: ImageRules) -> bytes:
    """The bytes at a URL, `DOWNLOAD_BYTES` at most, in `DOWNLOAD_SECONDS`.

    Raises:
        ValueError: nothing may be fetched from there, or it is too large or too slow.
        OSError: it cannot be fetched.
    """
    if rules.sources == "given":
        raise ValueError("image_sources='given': no URL is fetched")
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    request = Request(url, headers={"User-Agent": "modeling-aim"})
    chunks, size = [], 0
    try:
        with _opener(rules).open(request, timeout=DOWNLOAD_SECONDS) as answer:
            while chunk := answer.read1(2**16):
                chunks.append(chunk)
                size += len(chunk)
                if size > DOWNLOAD_BYTES:
                    raise ValueError(f"it is larger than {DOWNLOAD_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"it took longer than {DOWNLOAD_SECONDS:g} seconds")
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    return b"".join(chunks)


def _opener(rules: ImageRules) -> OpenerDirector:
    """An opener for HTTP(S) only, redirects included; with `sources="public"` it checks every connection."""
    opener = OpenerDirector()
    handlers: list[Any] = [HTTPRedirectHandler(), HTTPDefaultErrorHandler(), HTTPErrorProcessor()]
    if rules.sources == "any":
        handlers += [ProxyHandler(), HTTPHandler(), HTTPSHandler()]
    else:
        handlers += [_PublicHTTP(), _PublicHTTPS()]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _public_socket(host: str, port: int, timeout: float | None) -> socket.socket:
    """A connection to an address that was checked, so that a second DNS lookup cannot give another one."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for _, _, _, _, place in addresses:
        address: Any = ipaddress.ip_address(str(place[0]).partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not address.is_global or address.is_multicast:
            raise ValueError(f"{host} is {address}, which is not a public address (image_sources='public')")
    return socket.create_connection((str(addresses[0][4][0]), port), timeout)


class _PublicConnection(HTTPConnection):
    def connect(self) -> None:
        self.sock = _public_socket(self.host, self.port, self.timeout)


class _PublicTLSConnection(HTTPSConnection):
    def connect(self) -> None:
        plain = _public_socket(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _PublicHTTP(HTTPHandler):
    def http_open(self, req: Request) -> Any:
        return self.do_open(_PublicConnection, req)


class _PublicHTTPS(HTTPSHandler):
    def https_open(self, req: Request) -> Any:
        return self.do_open(_PublicTLSConnection, req)
