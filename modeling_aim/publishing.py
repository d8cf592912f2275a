"""Publishing a repository: the files that are shared, without local paths, checked, then uploaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .configuration_aim import AimConfig
from .data.rows import is_hub_id

# What a repository is made of; everything else (checkpoints, optimizers, pickles, logs) stays where it is.
SUFFIXES = {".json", ".safetensors", ".jinja", ".model"}  # .model: of sentencepiece
TEXTS = {"README.md", "merges.txt", "vocab.txt"}
VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}  # hold any text, and no paths
CONFIG, CARD, TRAINING = "config.json", "README.md", "aim_training.json"
LOCAL_PATH = re.compile(r"(?<![\w/.<~\\-])(?:~?/(?!/)|[A-Za-z]:\\)[^\s,;|`\"'()\[\]<>]+")
LOAD = """
import json, sys
sys.modules["modeling_aim"] = None  # as where the package is not installed
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, options = json.loads(sys.argv[1])
if options.pop("load_in_4bit"):
    import torch
    from transformers import BitsAndBytesConfig
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
processor.prompt("What is this?")
"""


@dataclass(frozen=True)
class Published:
    """What was published.

    Args:
        url: of the repository.
        commit: that was made.
        files: names of what was uploaded.
        left_out: names of what was not, in the folder that was published.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def publish(
    output: str | os.PathLike[str],
    repo_id: str,
    *,
    backbone: str | None = None,
    include_backbone: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    check: bool = True,
    load: Mapping[str, Any] | None = None,
) -> Published:
    """Publish what `aim train`, `aim tune` or `aim init` wrote, after loading it as others will.

    Args:
        output: the folder.
        repo_id: the repository on the Hub, made where there is none. Its card is replaced.
        backbone: Hub id of the backbone, where the folder names a local one.
        include_backbone: publish the backbone too, in a subfolder.
        private: for a new repository.
        revision: branch to publish to, made where there is none; the main one by default.
        check: load it first as remote code, in a process with an empty cache, which downloads the backbone again.
        load: keyword arguments of that load: `dtype`, `device_map`, `load_in_4bit`.

    Raises:
        ValueError: the folder holds no AIM repository, an unfinished run or a local backbone; nobody is logged in; or
            loading it fails.
    """
    folder = Path(output)
    config = _config(folder)
    if (folder / TRAINING).is_file() and not json.loads((folder / TRAINING).read_text(encoding="utf-8"))["finished"]:
        raise ValueError(f"The run in {folder} is not finished. Give the command that began it again: it resumes.")
    named = config.get("backbone_name_or_path")
    local = named is not None and os.path.isdir(named)
    if backbone is not None and include_backbone:
        raise ValueError("Give backbone= (--backbone), or include_backbone (--include-backbone), not both.")
    if local and backbone is None and not include_backbone:
        raise ValueError(
            f"The backbone is the local folder {named}, which others do not have. Name the same backbone on the Hub "
            "(--backbone owner/name), or publish it too (--include-backbone)."
        )
    api = HfApi()
    try:
        api.whoami()  # before the backbone is loaded
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(
            f"The Hub knows nobody who could publish ({type(error).__name__}). Log in: hf auth login, or HF_TOKEN=..."
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "repository"
        left_out = stage(folder, staged, repo_id, backbone, include_backbone)
        if check:
            _load_elsewhere(staged, Path(scratch), {"load_in_4bit": False, **(load or {})})
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id, folder_path=staged, revision=revision, commit_message="Publish an AIM plug-in"
        )
        files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    return Published(str(made), str(done.oid), tuple(files), tuple(left_out))


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of an AIM repository.

    Raises:
        ValueError: the folder holds none.
    """
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != AimConfig.model_type:
        what = f"a {config['model_type']}" if "model_type" in config else "no config.json"
        raise ValueError(
            f"{folder} holds {what}; give the folder of an AIM repository, such as --output of aim train."
        )
    return config


def stage(
    folder: Path, target: Path, repo_id: str, backbone: str | None = None, include_backbone: bool = False
) -> list[str]:
    """Copy what others need, with base names in place of local paths.

    Args:
        folder: an AIM repository.
        target: folder to make.
        repo_id: what it will be called, for the card.
        backbone, include_backbone: as for `publish`.

    Returns:
        What is in the folder and was not copied.
    """
    target.mkdir(parents=True)
    config = _config(folder)
    named = str(config.get("backbone_name_or_path") or "")
    if include_backbone:
        from . import AimForConditionalGeneration

        AimForConditionalGeneration.from_pretrained(folder).save_pretrained(target, include_backbone=True)
    inner = str(config.get("backbone_subfolder") or "").partition("/")[0]
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    left_out = []
    for path in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        if path.is_dir() and path.name == inner:
            shutil.copytree(path, target / path.name, ignore=_not_published)
        elif path.is_file() and (_is_published(path.name) or (path.suffix == ".png" and f"({path.name})" in card)):
            if not (target / path.name).exists() or path.name == CARD:
                shutil.copyfile(path, target / path.name)
        else:
            left_out.append(path.name)
    if backbone is not None:
        changed = {**config, "backbone_name_or_path": backbone, "backbone_revision": None}
        (target / CONFIG).write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _hide_paths(target, {named: backbone or "in the folder `backbone`"} if os.path.isdir(named) else {})
    if (target / CARD).is_file():
        _finish_card(target / CARD, repo_id, backbone)
    return left_out


def _is_published(name: str) -> bool:
    return os.path.splitext(name)[1] in SUFFIXES or name in TEXTS or name.endswith("_aim.py")


def _not_published(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (_is_published(name) or os.path.isdir(os.path.join(folder, name)))]


def _hide_paths(target: Path, known: Mapping[str, str]) -> None:
    """Put base names in place of local paths in the card and the JSON files.

    Args:
        target: the folder.
        known: paths that become something else.
    """
    words = dict(known)
    for path in sorted(target.rglob("*.json")):
        if path.name in VOCABULARIES or path.name.endswith(".index.json"):
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        hidden = _with_base_names(content, words, is_record=path.name.startswith("aim_"))
        if hidden != content:
            path.write_text(json.dumps(hidden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if (target / CARD).is_file():
        text = (target / CARD).read_text(encoding="utf-8")
        for path_text in sorted(words, key=len, reverse=True):  # those with spaces too, that no pattern finds
            text = text.replace(path_text, words[path_text])
        (target / CARD).write_text(without_paths(text), encoding="utf-8")


def _with_base_names(value: object, words: dict[str, str], is_record: bool) -> Any:
    """JSON with base names in place of paths; what was replaced is added to `words`.

    Args:
        value: the JSON.
        words: replaced so far.
        is_record: of a run, whose settings have paths inside texts; of other files only whole texts are paths.
    """
    if isinstance(value, Mapping):
        return {name: _with_base_names(item, words, is_record) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_base_names(item, words, is_record) for item in value]
    if isinstance(value, str) and value not in words:
        is_path = os.path.isabs(value) and (os.path.exists(value) or len(Path(value).parts) > 2)
        hidden = base_names(value) if is_record or is_path else value
        words.update({value: hidden} if hidden != value else {})
        return hidden
    return words[value] if isinstance(value, str) else value


def base_names(value: str) -> str:
    """A path, or a source of data or a task with paths in it, with the last parts of the paths alone."""
    pieces = re.split(r"(,(?=\s*[\w-]+=))", value)
    return "".join(_base_name(piece) for piece in pieces)


def _base_name(piece: str) -> str:
    """The same of `PATH`, `KIND:PATH` or `name=PATH`."""
    before, path = re.fullmatch(r"([\w-]{2,}[:=](?!//))?(.*)", piece, re.DOTALL).groups()  # type: ignore[union-attr]
    absolute = bool(re.match(r"~|/[^/]|[A-Za-z]:[\\/]", path)) and "\n" not in path
    relative = bool(before) and "/" in path and "//" not in path and (os.path.exists(path) or not is_hub_id(path))
    if not (absolute or relative):
        return piece
    return (before or "") + (re.split(r"[\\/]", path.rstrip("\\/"))[-1])


def without_paths(text: str) -> str:
    """A text with base names in place of absolute paths; addresses stay."""
    return LOCAL_PATH.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], text)


def _finish_card(path: Path, repo_id: str, backbone: str | None) -> None:
    """The card says by which name the repository is loaded, and of which model on the Hub it is."""
    card = ModelCard(path.read_text(encoding="utf-8").replace("this/repository", repo_id), ignore_metadata_errors=True)
    if backbone is not None:
        data: Any = card.data
        data.base_model, data.base_model_relation = backbone, "adapter"  # else the Hub lists it as a finetune
    path.write_text(str(card), encoding="utf-8")


def _load_elsewhere(staged: Path, scratch: Path, options: Mapping[str, Any]) -> None:
    """Load a repository as remote code in a process that has nothing in its cache and not this package.

    Raises:
        ValueError: it fails; the message has the last line.
    """
    kept = {
        name: value for name, value in os.environ.items() if not re.match(r"HF_(HOME|HUB_CACHE|MODULES_CACHE)", name)
    }
    kept |= {"HF_HOME": str(scratch / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in ("HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        kept.pop(name, None)
    token = get_token()
    kept |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", LOAD, json.dumps([str(staged), dict(options)])]
    done = subprocess.run(
        command, env=kept, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(
            f"Loaded as remote code from an empty cache, the repository fails: {last} Nothing was published."
        )
