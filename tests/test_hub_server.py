"""The Hub that the other tests push to must behave as the real one does, as far as a client can tell."""

import importlib
import json
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from hub_server import HubServer, forget_remote_code_and_connections, run_python, use_in_this_process
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# huggingface_hub uploads large files with an argument that its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# Remote code as a model on the Hub has it: the model file imports a file that imports a third one.
REMOTE_CODE = {
    "__init__.py": "",
    "configuration_tiny.py": """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"
""",
    "modeling_tiny.py": """
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig
from .layers_tiny import edition

class TinyModel(LlamaForCausalLM):
    config_class = TinyConfig

    def edition(self):
        return edition()
""",
    "layers_tiny.py": """
from .words_tiny import WORD

def edition():
    return WORD
""",
    "words_tiny.py": "WORD = 'first'\n",
    "processing_tiny.py": """
from transformers import ProcessorMixin

class TinyProcessor(ProcessorMixin):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
""",
}


def text(repo_id: str, name: str, **options: Any) -> str:
    """Download a file and return what it says."""
    return Path(hf_hub_download(repo_id, name, **options)).read_text()


def test_every_commit_stays_readable(hub: HubServer) -> None:
    hub.add_repo("user/model")
    first = hub.commit("user/model", {"word.txt": "first"})
    HfApi(token=hub.token).create_tag("user/model", tag="v1")
    HfApi(token=hub.token).create_branch("user/model", branch="next", revision="v1")
    second = hub.commit("user/model", {"word.txt": "second"})
    hub.commit("user/model", {"word.txt": "third"}, revision="next")

    said = {revision: text("user/model", "word.txt", revision=revision) for revision in (first, "v1", second, "next")}
    assert list(said.values()) == ["first", "first", "second", "third"]
    assert text("user/model", "word.txt") == "second"
    assert list(dict.fromkeys(revision for revision, _ in hub.asked("user/model"))) == [*said, "main"]
    assert HfApi().model_info("user/model", revision="v1").sha == first
    assert HfApi().repo_info("user/model").sha == second


def test_what_is_missing_is_named(hub: HubServer) -> None:
    hub.add_repo("user/model")
    for api in (HfApi(token=False), HfApi(token=hub.token)):  # the Hub answers 401 to the first, 404 to the second
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("user/nothing")
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("user/nothing", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("user/model", ".gitattributes", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("user/model", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("user/model", "nothing.txt")
    assert HfApi().file_exists("user/model", ".gitattributes")
    assert not HfApi().file_exists("user/model", "nothing.txt")
    assert not HfApi().file_exists("user/nothing", "nothing.txt")


def test_private_and_gated_repositories_open_with_the_token(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "word.txt").write_text("secret")
    hub.add_repo("user/private", tmp_path, private=True)
    hub.add_repo("other/private", tmp_path, private=True, token="hf_given")
    hub.add_repo("other/gated", tmp_path, gated=True)

    for token in (False, "hf_given"):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("user/private", "word.txt", token=token)
    assert text("user/private", "word.txt", token=hub.token) == "secret"
    assert text("other/private", "word.txt", token="hf_given") == "secret"
    with pytest.raises(GatedRepoError):
        hf_hub_download("other/gated", "word.txt", token=hub.token)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").repo_info("other/gated")
    assert HfApi(token=hub.token).whoami()["name"] == "user"


def test_uploads_go_both_ways_and_leave_out_what_is_unchanged(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    content = {"config.json": b"{}", "sub/a.safetensors": bytes(range(256)) * 999, "empty.safetensors": b""}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    api = HfApi(token=hub.token)
    assert api.create_repo("user/model").repo_id == api.create_repo("model", exist_ok=True).repo_id == "user/model"

    sha = api.upload_folder(repo_id="user/model", folder_path=folder).oid
    assert [request.token for request in hub.requests if request.method == "PUT"] == [None]  # one large file, signed
    assert api.upload_folder(repo_id="user/model", folder_path=folder).oid == sha
    listed = [[entry.path for entry in api.list_repo_tree("user/model", folder)] for folder in (None, "sub")]
    assert "sub" in listed[0] and listed[1] == ["sub/a.safetensors"]
    last = api.create_commit(
        "user/model",
        [CommitOperationDelete("sub/"), CommitOperationAdd("b.safetensors", content["sub/a.safetensors"])],
        commit_message="Move the weights",
    ).oid

    old, new = Path(snapshot_download("user/model", revision=sha)), Path(snapshot_download("user/model"))
    assert {name: (old / name).read_bytes() for name in content} == content
    assert (new / "b.safetensors").read_bytes() == content["sub/a.safetensors"]
    names = [".gitattributes", "b.safetensors", "config.json", "empty.safetensors"]
    assert api.list_repo_files("user/model") == sorted(hub.files("user/model")) == names
    assert hub.repos["user/model"].commits[last].message == "Move the weights"


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1."),
    reason="it checks cards at huggingface.co, whatever HF_ENDPOINT is",
)
def test_a_model_card_is_pushed(hub: HubServer) -> None:
    hub.add_repo("user/model")
    ModelCard("---\nlicense: mit\n---\n# Words").push_to_hub("user/model", token=hub.token)
    assert ModelCard.load("user/model").data.license == "mit"


def test_only_the_owner_writes(hub: HubServer) -> None:
    hub.add_repo("other/model")
    for api in (HfApi(token=False), HfApi(token=hub.token)):
        with pytest.raises(HfHubHTTPError, match=r"401|403"):
            api.upload_file(repo_id="other/model", path_or_fileobj=b"mine", path_in_repo="word.txt")
        with pytest.raises(HfHubHTTPError, match=r"401|403"):
            api.create_repo("other/new")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=hub.token).upload_file(repo_id="user/new", path_or_fileobj=b"mine", path_in_repo="word.txt")


def test_small_files_upload_with_xet_left_on(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script that does not know of HF_HUB_DISABLE_XET can push, once no file counts as large."""
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    hub.lfs_suffixes = ()
    hub.add_repo("user/model")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    HfApi(token=hub.token).upload_folder(repo_id="user/model", folder_path=tmp_path, allow_patterns="*.safetensors")
    assert Path(hf_hub_download("user/model", "a.safetensors")).read_bytes() == b"weights"


def test_large_files_come_from_another_host_in_parts_if_asked(hub: HubServer) -> None:
    hub.add_repo("user/model", private=True)
    hub.commit("user/model", {"a.safetensors": b"0123456789"})
    path = Path(hf_hub_download("user/model", "a.safetensors", token=hub.token))
    look, download = hub.requests[-2:]
    assert (look.method, look.status, look.token) == ("HEAD", 302, hub.token)
    assert (download.method, download.status, download.token) == ("GET", 200, None)
    assert path.read_bytes() == b"0123456789" and path.resolve().name == download.path.removeprefix("/cdn/")

    rest = urllib.request.Request(f"{hub.cdn}/{path.resolve().name}", headers={"Range": "bytes=4-"})
    with urllib.request.urlopen(rest) as answer:
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"456789", "bytes 4-9/10")


def test_nobody_is_logged_in_until_the_test_says_so(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_token() is None
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert HfApi().whoami()["name"] == "user"
    assert hub.home in Path(constants.HF_HUB_CACHE).parents


def test_remote_code_that_was_loaded_before_does_not_hide_that_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever tests this process ran before: transformers finds a package in the first folder that has been added."""
    earlier = tmp_path / "earlier"
    (earlier / "transformers_modules").mkdir(parents=True)
    (earlier / "transformers_modules" / "__init__.py").touch()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(earlier))
    monkeypatch.syspath_prepend(earlier)
    importlib.import_module("transformers_modules")
    for attempt, word in enumerate(("first", "second")):
        with HubServer(home=tmp_path / f"home{attempt}") as hub, pytest.MonkeyPatch.context() as patch:
            use_in_this_process(hub, patch)
            hub.add_repo("user/code")
            words = {"words.py": f"WORD = {word!r}", "main.py": "from .words import WORD\nclass Main: word = WORD"}
            hub.commit("user/code", words)
            assert get_class_from_dynamic_module("main.Main", "user/code").word == word
            forget_remote_code_and_connections()
    assert str(earlier) in sys.path


def test_a_failing_script_shows_its_traceback(hub: HubServer) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_python("1 / 0", hub)
    seen = run_python(
        "import os; print(os.environ.get('HF_TOKEN'), os.environ['HF_ENDPOINT'])", hub, {"HF_TOKEN": "t"}
    )
    assert seen.stdout.split() == ["t", hub.url]


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A tiny model with remote code, pushed with its processor; then its `main` moves to another word and weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    package = tmp_path / "tiny_package"
    package.mkdir()
    for name, code in REMOTE_CODE.items():
        (package / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    parts = ("configuration", "modeling", "processing")
    configuration, modeling, processing = (importlib.import_module(f"tiny_package.{part}_tiny") for part in parts)
    configuration.TinyConfig.register_for_auto_class()
    modeling.TinyModel.register_for_auto_class("AutoModelForCausalLM")
    processing.TinyProcessor.register_for_auto_class()

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = configuration.TinyConfig(vocab_size=8, hidden_size=16, intermediate_size=16, **sizes)
    torch.manual_seed(0)
    model = modeling.TinyModel(config).eval()
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = processing.TinyProcessor(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    model.push_to_hub("user/tiny", token=hub.token)
    sha = processor.push_to_hub("user/tiny", token=hub.token).oid
    logits = model(torch.tensor([[0, 1]])).logits[0, -1].tolist()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.push_to_hub("user/tiny", token=hub.token)
    hub.commit("user/tiny", {"words_tiny.py": "WORD = 'second'\n"})
    hub.requests.clear()
    return SimpleNamespace(sha=sha, logits=logits)


LOAD = """
import json
import os
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

options = {"revision": os.environ["REVISION"], "trust_remote_code": True}
config = AutoConfig.from_pretrained("user/tiny", **options)
processor = AutoProcessor.from_pretrained("user/tiny", **options)
model = AutoModelForCausalLM.from_pretrained("user/tiny", **options)
logits = model(**processor.tokenizer("a b", return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
print(json.dumps([config.model_type, type(processor).__name__, model.edition(), logits.tolist()]))
"""


def test_transformers_loads_what_it_pushed(hub: HubServer, pushed: SimpleNamespace) -> None:
    seen = json.loads(run_python(LOAD, hub, {"REVISION": pushed.sha}).stdout)
    assert seen[:3] == ["tiny_remote", "TinyProcessor", "first"]
    assert seen[3] == pytest.approx(pushed.logits, abs=1e-5)
    asked = hub.asked("user/tiny")
    assert {revision for revision, _ in asked} == {pushed.sha}  # code and weights alike
    assert {name for _, name in asked} >= REMOTE_CODE.keys() - {"__init__.py"}

    # Now in this process, and from `main`, which has moved.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("user/tiny", trust_remote_code=True)
    assert model.edition() == "second"
    assert model.lm_head.weight.abs().sum() == 0
