"""Files of an AIM repository: found in a folder or on the Hub, read with clear errors, written atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

if TYPE_CHECKING:
    from .configuration_aim import AimConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

STAGE = ".saving-"  # prefix of the scratch folders of a save
LOCK_FILE = ".aim.lock"  # of a folder that is written to, where a folder itself cannot be locked
NO_LOCKS = "{folder} cannot be locked ({error}): let only one process write there."
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_place(name_or_path: str | os.PathLike[str], before: str = "") -> None:
    """Raise `FileNotFoundError` for what is neither a local folder nor a possible Hub id.

    Args:
        name_or_path: what is checked.
        before: begins the message.
    """
    name = str(name_or_path)
    if not os.path.isdir(name) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        what = "is a file" if os.path.exists(name) else "does not exist"
        raise FileNotFoundError(f"{before}{name} {what}. Give a folder, or a Hub id such as owner/name.")


def check_subfolder(subfolder: str) -> None:
    """Raise `ValueError` for a subfolder that leaves its repository."""
    parts = PurePosixPath(subfolder.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in subfolder:
        raise ValueError(
            f"backbone_subfolder={subfolder!r} leaves the repository. Give a folder in it, or name the backbone by "
            "backbone_name_or_path."
        )


def backbone_place(config: PreTrainedConfig, name: str, hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where the backbone of the repository `name` lies: its Hub id or folder, and the arguments of a load from there.

    Args:
        config: the repository's, an `AimConfig`.
        name: its folder or Hub id.
        hub: the arguments (`HUB_KWARGS`) that it is loaded with.

    Raises:
        ValueError: the configuration names no backbone, or a subfolder outside of the repository.
    """
    elsewhere = config.backbone_name_or_path is not None
    folder = config.backbone_subfolder or ""
    check_subfolder(folder)
    if elsewhere:
        check_place(config.backbone_name_or_path, f"The config.json of {name} names the backbone ")
        return config.backbone_name_or_path, {**hub, "revision": config.backbone_revision, "subfolder": folder}
    if config.backbone_subfolder is None:
        kind = PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type")
        if kind is not None and kind != type(config).model_type:
            raise ValueError(
                f"{name} is a backbone, not an AIM repository (its model_type is {kind}). In Python: "
                f"AimForConditionalGeneration.from_backbone({name!r}); on the command line: "
                f"aim init {name} --output my-aim"
            )
        raise ValueError(f"The config.json of {name} names no backbone. Pass a loaded one: backbone=model.")
    return name, {**hub, "subfolder": os.path.join(hub.get("subfolder") or "", folder)}


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of the bytes of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def locate_file(name_or_path: str | os.PathLike[str], filename: str, **hub_kwargs: Any) -> str:
    """Path of `filename` in a folder or, downloaded, in a Hub repository.

    Raises:
        FileNotFoundError: there is no such file; the message names folder or repository and what to do.
    """
    try:
        path = cached_file(str(name_or_path), filename, **hub_kwargs)
    except OSError as error:
        raise FileNotFoundError(
            f"{filename} was not found in {name_or_path} ({error}). Check the name and the revision, and that the "
            "folder or repository was saved whole."
        ) from error
    assert path is not None
    return path


def read_safetensors(path: str, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file and check that it holds exactly the tensors `names`, where given.

    Raises:
        ValueError: the file is damaged, or holds other tensors than `names`.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); it is damaged, cut short or another kind of file "
            f"({os.path.getsize(path)} bytes). Download or save it again."
        ) from error
    if names is not None and set(tensors) != set(names):
        raise ValueError(
            f"{path} holds {_listing(tensors)}, expected {_listing(names)}: it belongs to something else."
        )
    return tensors


def safetensors_metadata(path: str) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:6]) + (f", ... ({len(names)} tensors)" if len(names) > 6 else "") if names else "nothing"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor of any type, as bytes; a view where the tensor is contiguous."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_whole(path: Path, payload: bytes) -> None:
    """Write a file under another name, then rename it: a kill leaves the old file or the new one, whole."""
    scratch = (
        path.parent / f".writing-{secrets.token_hex(8)}"
    )  # not by tempfile, whose files only their owner may read
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def only_one(folder: str | os.PathLike[str], work: str) -> Iterator[None]:
    """Lock a folder for some work while this block runs; a killed process releases the lock.

    Args:
        folder: created if it does not exist, and removed if it is empty at the end.
        work: what is done there, for the message: "aim train".

    Raises:
        ValueError: another process, or another block of this one, has the lock.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    release = _locked(folder)
    if release is None:
        raise ValueError(f"Another `{work}` is at work in {folder}. Wait for it, or give another folder.")
    try:
        yield
    finally:
        release()
        with suppress(OSError):
            os.rmdir(folder)


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Lock a folder while this block runs; the value is whether it is locked, or another has the lock."""
    release = _locked(folder)
    try:
        yield release is not None
    finally:
        if release is not None:
            release()


def _locked(folder: str | os.PathLike[str]) -> Callable[[], object] | None:
    """Lock a folder; returns what releases the lock, or `None` where another has it.

    The system releases the lock of a process that ends. On Windows a folder cannot be opened, so a file in it is
    locked, which is removed at the end. Where the file system knows no locks, the log says so, and nobody is kept out.
    """
    if fcntl is None:
        return _locked_by_file(Path(folder))
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            os.close(handle)
            return None
        logger.warning(NO_LOCKS.format(folder=folder, error=error))
    return partial(os.close, handle)


def _locked_by_file(folder: Path) -> Callable[[], object] | None:
    lock = FileLock(folder / LOCK_FILE)

    def release() -> None:
        lock.release()
        with suppress(OSError):  # another process has opened it
            (folder / LOCK_FILE).unlink()

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        logger.warning(NO_LOCKS.format(folder=folder, error=error))
    return release


@contextmanager
def staged_folder(save_directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder in `save_directory`; its files move there together when the block ends without error.

    `config.json` moves last, so that an interrupted first save is not a repository yet. Scratch folders of dead
    processes are removed.
    """
    target = Path(save_directory)
    if target.is_file():
        raise ValueError(f"{target} is a file; give a folder to save to.")
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    stage, release = _stage(target)
    try:
        _remove_left(target)
        yield stage
        files = [path for path in sorted(stage.rglob("*")) if path.is_file() and path != stage / LOCK_FILE]
        for path in sorted(files, key=lambda path: path == stage / "config.json"):
            final = target / path.relative_to(stage)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
    finally:
        _remove_locked(stage, release)
        if not existed:
            with suppress(OSError):  # fails, as it should, where anything was saved
                target.rmdir()


def _stage(target: Path) -> tuple[Path, Callable[[], object]]:
    """A new scratch folder in `target`, so that files move within one disk, and what releases its lock."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=target))
        with suppress(FileNotFoundError):  # removed by another process before it was locked
            release = _locked(stage)
            if release is not None and stage.exists():
                return stage, release
            if release is not None:
                release()


def _remove_left(target: Path) -> None:
    """Remove scratch folders in `target` whose process is dead."""
    for left in target.glob(f"{STAGE}*"):
        with suppress(OSError):
            release = _locked(left)
            if release is not None:
                _remove_locked(left, release)


def _remove_locked(folder: Path, release: Callable[[], object]) -> None:
    """Remove a folder and release its lock, which may be a file in it that cannot be removed before."""
    shutil.rmtree(folder, ignore_errors=True)
    release()
    with suppress(OSError):
        folder.rmdir()


def upload(folder: str | os.PathLike[str], repo_id: str, **kwargs: Any) -> Any:
    """Upload a saved repository to the Hub.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: the repository, made when it does not exist.
        **kwargs: `token`, `private`, `revision`, `commit_message`, `commit_description`, `create_pr`.
    """
    api = HfApi(token=kwargs.pop("token", None))
    repo_id = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
    if kwargs.get("revision") is not None:
        api.create_branch(repo_id, branch=kwargs["revision"], exist_ok=True)
    kwargs.setdefault("commit_message", "Upload an AIM plug-in")
    if api.file_exists(repo_id, "README.md", revision=kwargs.get("revision")):
        kwargs["ignore_patterns"] = "README.md"  # an existing card is kept
    return api.upload_folder(repo_id=repo_id, folder_path=Path(folder), **kwargs)


def shipped_files() -> list[Path]:
    """The code that a repository carries to be loaded as remote code: the files beside this one."""
    return sorted(Path(__file__).parent.glob("*_aim.py"))


def copy_shipped_files(folder: Path) -> None:
    """Put the code that a repository carries into `folder`."""
    for path in shipped_files():
        (folder / path.name).write_bytes(path.read_bytes())


CARD_USAGE = """No package of this project is needed: transformers loads the code beside this card.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("this/repository", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("this/repository", trust_remote_code=True)

demos = [{"image": "dax1.png", "label": "dax"}, {"image": "wug1.png", "label": "wug"}]
inputs = processor(images="query.png", text=processor.prompt("What is this?"), return_tensors="pt")
ids = model.generate(**inputs.to(model.device, model.dtype), demos=demos, max_new_tokens=8)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

In a pipeline:

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="this/repository", trust_remote_code=True)
demos = [{"image": "dax1.png", "label": "dax"}, {"image": "wug1.png", "label": "wug"}]
prompt = pipe.processor.prompt("What is this?")
answers = pipe(images="query.png", text=prompt, demos=demos, max_new_tokens=8, return_full_text=False)
print(answers[0]["generated_text"])
```

In 4-bit (`pip install bitsandbytes`), load the model by these lines; the rest stays:

```python
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
model = AutoModelForImageTextToText.from_pretrained(
    "this/repository", trust_remote_code=True, quantization_config=four_bit
)
```

`trust_remote_code=True` runs the code of this repository. Look at it, then pin what you have looked at with
`revision="..."`, a full commit hash. The backbone has a licence of its own.
"""


def model_card(config: Any, projector: torch.nn.Module, datasets: Sequence[str] = ()) -> str:
    """A model card that says what the repository holds and how to use it.

    Args:
        config: of the plug-in.
        projector: its weights are counted.
        datasets: Hub ids of the data it was trained on.
    """
    backbone = config.backbone_name_or_path or f"in the folder `{config.backbone_subfolder}`"
    if config.backbone_name_or_path and config.backbone_revision:
        backbone += f" at revision `{config.backbone_revision}`"
    enters = f"input of decoder layer {config.entry_layers}, where they were read"
    if not config.enters_at_depth:
        enters = "input embeddings, through the projector"
    budget = "" if config.max_fused_tokens is None else f", at most {config.max_fused_tokens} tokens"
    parameters = sum(p.numel() for p in projector.parameters())
    hub_id = config.backbone_name_or_path and not os.path.isdir(config.backbone_name_or_path)
    more = f"base_model: {config.backbone_name_or_path}\nbase_model_relation: adapter\n" if hub_id else ""
    more += f"datasets: [{', '.join(datasets)}]\n" if datasets else ""
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [aim, multimodal-in-context-learning, few-shot, custom_code]
{more}---

# AIM plug-in: answers from demonstrations

{_what_it_is(config, parameters)}

| | |
|---|---|
| backbone | {backbone} (`{config.backbone_config.model_type}`, hidden size {config.hidden_size}) |
| read | states after {config.read_layers} layers, span `{config.read_span}`{budget} |
| enter | {enters} |

{CARD_USAGE}"""


def _what_it_is(config: AimConfig, parameters: int) -> str:
    """The first paragraph of a model card."""
    paper = (
        "[AIM: Let Any Multi-modal Large Language Models Embrace Efficient In-Context Learning]"
        "(https://arxiv.org/abs/2406.07588)"
    )
    if parameters:
        return (
            f"A projector ({config.projector_form}, {parameters:,} parameters) that lets a frozen vision-language "
            f"backbone answer\nfrom (image, text) demonstrations at a few *fused virtual tokens* each, after\n{paper}."
        )
    return (
        "This repository lets a stock vision-language backbone answer from (image, text) demonstrations at a few\n"
        "*fused virtual tokens* each. It has no weights and needs no training: the backbone reads each demonstration\n"
        f"alone, and its hidden states are put back at the depth where they were read. After\n{paper}.\n\n"
        "It was not evaluated on this backbone. `aim tune --repo THIS --demos YOUR.jsonl` tells in minutes, from\n"
        "your own demonstrations, whether it helps and which depth is best."
    )
