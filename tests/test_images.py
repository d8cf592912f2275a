"""Images are opened in one place: bounds on formats, pixels and numbers, and from where they may come."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from backbones import DEMOS, Plugin, build, picture
from PIL import Image
from test_bad_input import fails

from modeling_aim import AimForConditionalGeneration, AimProcessor, Demonstration, DemonstrationBank, images_aim
from modeling_aim.data.images import is_image
from modeling_aim.images_aim import ImageRules, open_image

AIM_GENERATE = Path(__file__).resolve().parents[1] / "hub_configs" / "aim-generate"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def claimed(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, without having them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def eps(tmp_path: Path) -> Path:
    """An EPS with the name of a PNG; Pillow would run Ghostscript for its pixels."""
    picture(0).save(tmp_path / "page.eps", "EPS")
    return (tmp_path / "page.eps").rename(tmp_path / "page.png")


class Served:
    """A server on this machine, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.asked.append(self.path)
                if self.path.startswith("/to/"):
                    self.send_response(302)
                    self.send_header("Location", self.path.removeprefix("/to/"))
                    self.end_headers()
                    return
                found = self.path == "/image.png"
                self.send_response(200 if found or self.path == "/endless" else 404)
                self.end_headers()
                if found:
                    self.wfile.write(png(picture(0)))
                while self.path == "/endless":
                    try:
                        self.wfile.write(b"\0" * 2**16)
                    except OSError:
                        return

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    yield found
    found.server.shutdown()
    found.server.server_close()


def ways(aim: Plugin, processor: AimProcessor, image: Any) -> dict[str, Callable[[], Any]]:
    """Every way in which an image reaches a model: demonstrations and queries, in calls and chats."""
    model = AimForConditionalGeneration(aim.model.config, aim.backbone, processor)
    prompt = processor.prompt("What is this?")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    if isinstance(image, str):
        chat[0]["content"][0] = {"type": "image", "url": image}
    answered = {"role": "assistant", "content": [{"type": "text", "text": "A dax."}]}
    last = {"role": "user", "content": [{"type": "image", "image": picture(9)}, {"type": "text", "text": "What?"}]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = aim.query()
    return {
        "read": lambda: model.read([(image, "dax")]),
        "prefill": lambda: model.prefill([(image, "dax")]),
        "generate": lambda: model.generate(**inputs, demos=[(image, "dax")], max_new_tokens=1),
        "rows": lambda: model.generate(**inputs, demos=[[(image, "dax")]], max_new_tokens=1),
        "forward": lambda: model(**inputs, demos=[(image, "dax")]),
        "query": lambda: processor(images=[image], text=prompt, return_tensors="pt"),
        "query's demos": lambda: processor(
            images=[picture(9)], text=prompt, demos=[(image, "dax")], return_tensors="pt"
        ),
        "chat": lambda: processor.apply_chat_template(chat, **options),
        "few-shot chat": lambda: processor.apply_chat_template([*chat, answered, last], **options),
    }


def rare_ways(
    aim: Plugin, processor: AimProcessor, image: Any, folder: Path
) -> dict[str, tuple[Callable[[], Any], str]]:
    """Ways that only some take, and the exact error of each that refuses an image."""
    model = AimForConditionalGeneration.from_backbone(aim.backbone, processor)  # untrained: its depth can be chosen
    named = [(image, f"a {word}") for word in ("dax", "wug", "blicket")]
    data = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": image}], "label": ["dax"]})
    data = data.cast_column("image", datasets.Image())
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    whole = {"tokenize": True, "return_dict": True, "processor_kwargs": {"images": [image]}}
    stock = {"custom_generate": str(AIM_GENERATE), "trust_remote_code": True, "processor": processor}
    build = DemonstrationBank.build
    return {
        "choose_depth": (lambda: model.choose_depth(named), ""),
        "bank": (lambda: build(model, named, folder / "bank"), "All 3 rows are bad; row 0: "),
        "bank of columns": (
            lambda: build(model, [{"i": image, "l": "dax"}], folder / "columns", columns={"image": "i", "label": "l"}),
            "All 1 rows are bad; row 0: ",
        ),
        "bank of a dataset": (lambda: build(model, data, folder / "data"), "All 1 rows are bad; row 0: "),
        "bank of a stream": (
            lambda: build(model, data.to_iterable_dataset(), folder / "stream"), "All 1 rows are bad; row 0: ",
        ),
        "selection": (lambda: model.query_inputs({"image": image, "question": "What?"}), ""),
        "a chat's arguments": (lambda: processor.apply_chat_template(asked, **whole), ""),
        "custom generate": (lambda: aim.backbone.generate(**aim.query(), demos=named, max_new_tokens=1, **stock), ""),
    }  # fmt: skip


@pytest.fixture(scope="module")
def smolvlm() -> Plugin:
    backbone = build("smolvlm")
    return Plugin("smolvlm", AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor))


def with_rules(aim: Plugin, **settings: Any) -> AimProcessor:
    return AimProcessor(aim.processor.processor, **settings)


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_images_of_too_many_pixels_are_refused_however_they_come(family: str, request: Any, tmp_path: Path) -> None:
    aim: Plugin = request.getfixturevalue(family)
    large = picture(0, (50, 41))
    large.save(tmp_path / "large.png")
    processor = with_rules(aim, max_image_pixels=2000)
    for image in (large, str(tmp_path / "large.png")):
        for name, way in ways(aim, processor, image).items():
            fails(way, "50 x 41", "max_image_pixels=2000"), name
    fails(lambda: open_image(np.zeros((50, 41, 3), dtype=np.uint8), processor.image_rules), "41 x 50", "2000")
    for name, way in ways(aim, with_rules(aim, max_image_pixels=2050), str(tmp_path / "large.png")).items():
        assert way() is not None, name


def test_a_png_of_169_megapixels_is_not_decoded() -> None:
    for image in (claimed(13000, 13000), claimed(60000, 60000)):
        fails(lambda image=image: open_image(image), "Cannot read the image", "pixels")
        assert not is_image(image)


def test_no_format_that_is_a_program_is_opened(llava: Plugin, eps: Path) -> None:
    for image in (eps, str(eps), eps.read_bytes()):
        fails(lambda image=image: open_image(image), "cannot identify image file")
        assert not is_image(image)
    for name, way in ways(llava, llava.processor, str(eps)).items():
        fails(way, "cannot identify image file"), name


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_formats_of_photographs_are_opened(kind: str) -> None:
    file = io.BytesIO()
    if kind not in Image.SAVE and (Image.init() or kind not in Image.SAVE):
        pytest.skip(f"this Pillow writes no {kind}")
    picture(0).save(file, kind)
    assert open_image(file.getvalue()).size == picture(0).size


def test_an_image_cut_short_behind_its_header_is_named(llava: Plugin, tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG"):
        path = tmp_path / f"half.{kind.lower()}"
        picture(0, (200, 200)).save(path, kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        lazy = Image.open(path)
        for image in (str(path), path.read_bytes(), lazy):
            for name, way in ways(llava, llava.processor, image).items():
                fails(way, "Cannot read the image"), name


def test_an_image_of_floats_is_the_array_of_its_numbers(llava: Plugin, tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "floats.tiff")
    wanted = open_image(pixels)
    for given in (image, tmp_path / "floats.tiff", str(tmp_path / "floats.tiff")):
        assert open_image(given).tobytes() == wanted.tobytes()
        seen = [llava.processor(images=one, text="<image>a", return_tensors="pt") for one in (given, wanted)]
        assert torch.equal(seen[0]["pixel_values"], seen[1]["pixel_values"])
    with pytest.raises(ValueError, match=r"pixels of type float32 must lie in 0\.\.1, found 0\.0\.\.2"):
        open_image(Image.fromarray(2 * pixels))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_no_image(llava: Plugin, bad: float) -> None:
    pixels = np.full((32, 32, 3), 0.5, dtype=np.float32)
    pixels[3, 4, 1] = bad
    for image in (pixels, torch.from_numpy(pixels), pixels.astype(np.float64)):
        for name, way in ways(llava, llava.processor, image).items():
            fails(way, "finite"), name


def test_files_urls_and_data_are_opened_as_a_local_tool_does(llava: Plugin, served: Served, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "image.png")
    text = base64.b64encode(png(picture(0))).decode()
    for image in (
        str(tmp_path / "image.png"), tmp_path / "image.png", f"{served.url}/image.png",
        f"data:image/png;base64,{text}",
        text, png(picture(0)), f"{served.url}/to/{served.url}/image.png",
    ):  # fmt: skip
        assert open_image(image).tobytes() == picture(0).tobytes(), image
    for name, way in ways(llava, llava.processor, f"{served.url}/image.png").items():
        assert way() is not None, name
    fails(lambda: open_image(f"{served.url}/nowhere.png"), "404")


def test_a_server_that_never_ends_holds_nobody_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(images_aim, "DOWNLOAD_BYTES", 2**20)
        fails(lambda: open_image(f"{served.url}/endless"), "larger than 1048576 bytes")
    with monkeypatch.context() as patch:
        patch.setattr(images_aim, "DOWNLOAD_SECONDS", 0.3)
        fails(lambda: open_image(f"{served.url}/endless"), "longer than 0.3 seconds|larger")


def test_who_serves_others_opens_neither_files_nor_private_addresses(
    llava: Plugin, served: Served, tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "secret.png")
    private = [
        f"{served.url}/image.png", served.url.replace("127.0.0.1", "localhost") + "/image.png",
        "http://[::1]/x.png", "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/x.png",
        "http://[::ffff:127.0.0.1]/x.png", "http://0.0.0.0/x.png", "http://2130706433/x.png",
        str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png",
    ]  # fmt: skip
    for sources in ("public", "given"):
        processor = with_rules(llava, image_sources=sources)
        for image in private:
            for name, way in ways(llava, processor, image).items():
                message = fails(way, "image_sources|unknown url type")
                assert "secret" not in message or "no file" in message or "neither a URL" in message, name
        with pytest.raises(ValueError, match="no file of this machine"):
            open_image(tmp_path / "secret.png", processor.image_rules)
        text = base64.b64encode(png(picture(0))).decode()
        for image in (picture(0), png(picture(0)), f"data:image/png;base64,{text}"):
            assert open_image(image, processor.image_rules).tobytes() == picture(0).tobytes()
    assert not served.asked, "an address was asked before it was refused"


def test_a_redirect_to_a_private_address_is_refused(
    llava: Plugin, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first address counts as public here; what it sends on to is looked at again."""
    look = images_aim._public_socket
    first = f"http://127.0.0.1:{served.server.server_port}"

    def one_is_public(host: str, port: int, timeout: Any) -> Any:
        if (host, port) == ("127.0.0.1", served.server.server_port):
            return images_aim.socket.create_connection((host, port), timeout)
        return look(host, port, timeout)

    monkeypatch.setattr(images_aim, "_public_socket", one_is_public)
    rules = ImageRules(sources="public")
    assert open_image(f"{first}/image.png", rules).size == picture(0).size
    other = f"http://localhost:{served.server.server_port}/image.png"
    fails(lambda: open_image(f"{first}/to/{other}", rules), "localhost is", "not a public address")
    fails(lambda: open_image(f"{first}/to/file:///etc/hostname", rules), "Cannot read the image")
    assert served.asked.count("/image.png") == 1


def test_the_settings_are_saved_and_checked(llava: Plugin, tmp_path: Path) -> None:
    processor = with_rules(llava, max_image_pixels=123, image_sources="public")
    processor.save_pretrained(tmp_path)
    assert AimProcessor.from_pretrained(tmp_path).image_rules == ImageRules(123, "public")
    assert AimProcessor.from_pretrained(tmp_path, image_sources="given").image_sources == "given"
    for settings, words in (
        ({"max_image_pixels": 0}, "max_image_pixels=0"),
        ({"max_image_pixels": "many"}, "max_image_pixels='many'"),
        ({"image_sources": "none"}, "given"),
        ({"label_template": 3}, "label_template=3"),
        ({"question_template": None}, "question_template=None"),
        ({"image_prompt": 5}, "image_prompt=5"),
        ({"few_shot_chats": "no"}, "few_shot_chats='no'"),
    ):
        fails(lambda settings=settings: with_rules(llava, **settings), words)


def test_words_with_a_lone_surrogate_are_named(llava: Plugin) -> None:
    for demo in (([], "a \ud800 dax"), ([], "what \udfff?", "a dax"), {"label": "\udc80"}):
        fails(lambda demo=demo: Demonstration.of(demo), "lone surrogate")
        fails(lambda demo=demo: llava.model.read([*DEMOS, demo]), "lone surrogate")


# --- who serves others: whatever reaches a model


def test_nothing_is_opened_on_the_ways_that_only_some_take(
    smolvlm: Plugin, eps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank that is built, a depth that is chosen, a stock class, the arguments of a chat."""
    decoded: list[Any] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: decoded.append("Ghostscript"))
    picture(0).save(tmp_path / "secret.png")
    for number, (image, settings, said) in enumerate((
        (tmp_path / "secret.png", {"image_sources": "given"}, "no file of this machine is opened"),
        (tmp_path / "secret.png", {"max_image_pixels": 100}, "more than max_image_pixels=100"),
        (eps, {}, "cannot identify image file"),
    )):  # fmt: skip
        processor = with_rules(smolvlm, **settings)
        for name, (way, begin) in rare_ways(smolvlm, processor, str(image), tmp_path / str(number)).items():
            message = fails(way, f"{begin}.*Cannot read the image", said)
            assert message, name
    assert not decoded, "Ghostscript was run"


def test_a_dataset_is_opened_wherever_its_images_lie(smolvlm: Plugin, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "0.png", "in/0.png")
    inside = f"zip://in/0.png::{tmp_path / 'images.zip'}"
    given = [
        {"bytes": png(picture(1)), "path": None}, {"bytes": None, "path": str(tmp_path / "0.png")},
        {"bytes": None, "path": inside}, {"bytes": png(picture(2))[:90], "path": None},
        {"bytes": None, "path": "zip://no.png::nowhere.zip"},
    ]  # fmt: skip
    data = datasets.Dataset.from_dict({"image": given, "label": list("abcde")}).cast_column("image", datasets.Image())
    model = AimForConditionalGeneration.from_backbone(smolvlm.backbone, smolvlm.processor)
    bank = DemonstrationBank.build(model, data, tmp_path / "bank", thumbnails=0)
    assert bank.labels() == ["a", "b", "c"] and [row.number for row in bank.bad_rows] == [3, 4]
    wanted = [Demonstration.of({"image": image, "label": label}).key for image, label in zip(
        (picture(1), picture(0), picture(0)), "abc", strict=True
    )]  # fmt: skip
    assert bank.keys() == wanted


@pytest.mark.parametrize("sources", ["public", "given"])
def test_who_serves_others_fetches_no_video_and_no_sound(smolvlm: Plugin, tmp_path: Path, sources: str) -> None:
    processor, prompt = with_rules(smolvlm, image_sources=sources), smolvlm.processor.prompt("What?")
    options = {"tokenize": True, "return_dict": True}
    asked = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    place = "/etc/hostname"
    for name in ("http://localhost/x.mp4", place, tmp_path / "x.wav", [[place]], {"url": place}):
        for kind in ("video", "audio"):
            for key in (kind, "url", "path"):
                chat = [{"role": "user", "content": [{"type": kind, key: name}, {"type": "text", "text": "What?"}]}]
                fails(lambda chat=chat: processor.apply_chat_template(chat, **options), f"no {kind} is fetched")
        for key in ("videos", "audio"):
            call: dict[str, Any] = {key: name}
            fails(lambda call=call: processor(images=[picture(0)], text=prompt, **call), f"no {key} is fetched")
            fails(lambda call=call: processor.apply_chat_template(asked, **options, **call), f"no {key} is fetched")
    assert processor(images=[picture(0)], text=prompt, videos=None)["input_ids"]


@pytest.mark.parametrize("shape", [(50, 41), (50, 41, 3), (3, 50, 41), (1, 3, 50, 41), (1, 50, 41, 4)], ids=str)
def test_arrays_of_too_many_pixels_are_refused_as_queries(llava: Plugin, shape: tuple[int, ...]) -> None:
    processor, prompt = with_rules(llava, max_image_pixels=2000), llava.processor.prompt("What?")
    for array in (np.zeros(shape, dtype=np.uint8), torch.zeros(shape)):
        fails(lambda array=array: processor(images=[array], text=prompt), "41 x 50 pixels", "max_image_pixels=2000")


def test_an_address_that_is_none_is_named(smolvlm: Plugin) -> None:
    for block in ({"type": "image_url", "image_url": {}}, {"type": "image_url", "image_url": "no address"}):
        chat = [{"role": "user", "content": [block, {"type": "text", "text": "What?"}]}]
        fails(
            lambda chat=chat: smolvlm.processor.apply_chat_template(chat, tokenize=True, return_dict=True), "read the"
        )
