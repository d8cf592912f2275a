"""A Hugging Face Hub endpoint on localhost, so that tests push and load models without the real Hub.

It keeps model repositories in memory with git-like revisions: every commit has a sha and stays readable, branches and
tags point at commits. The installed `huggingface_hub` and `transformers` talk to it unmodified:

    with HubServer(home=tmp_path) as hub:
        sha = hub.add_repo("user/model", folder)
        run_python("from transformers import AutoModel; AutoModel.from_pretrained('user/model')", hub)
        assert (sha, "config.json") in hub.asked("user/model")

Like the real Hub it sends large files from another host (`localhost` instead of `127.0.0.1`), hides private
repositories and names errors in `X-Error-Code`. It does not speak xet: with hf_xet installed, uploads of large files
need `HF_HUB_DISABLE_XET=1`, which `HubServer.env` and the `hub` fixture set.
"""

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import forked
import pytest

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model")
LFS_SIZE = 10_000_000  # bytes; above it every file is a large file
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class Request(NamedTuple):
    """An answered request; `path` is as sent, quoted and with its query, `token` is None for an anonymous one."""

    method: str
    path: str
    status: int
    token: str | None


class Reply(NamedTuple):
    """An answer other than JSON with status 200."""

    body: bytes
    status: int
    headers: dict[str, str]


class HubError(Exception):
    """An error answer; huggingface_hub chooses its exception by `code` (X-Error-Code), else by the status."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        headers |= {"X-Error-Message": ascii(message)[1:-1]} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply(json.dumps({"error": message}).encode(), status, headers)


@dataclass(frozen=True)
class Commit:
    """One revision: the whole tree, as path -> sha256 of the content."""

    sha: str
    message: str
    files: dict[str, str]
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))


@dataclass
class Repo:
    """A repository. A private one exists for its owner only; a gated one shows its files to its owner only."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag or a full sha names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


class HubServer(AbstractContextManager["HubServer"]):
    """The endpoint, up until its `with` ends: `add_repo` and `commit` fill it, `asked` and `requests` tell its use.

    Args:
        home: the HF_HOME (cache, remote code, stored token) given to scripts and to the `hub` fixture.
        user: the account of `token`. A token reads and writes what is under the name of its user, and no other private
            repository; `tokens` maps every token that is valid here to its user.

    Files with one of `lfs_suffixes` count as large. Empty it to let small files be uploaded with xet left on.
    """

    def __init__(self, home: str | Path, user: str = "user") -> None:
        self.home = Path(home)
        self.token = f"hf_{user}"
        self.tokens = {self.token: user}
        self.lfs_suffixes: tuple[str, ...] = LFS_SUFFIXES
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}/cdn"
        # The default poll interval would add half a second to the end of every test.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(
        self,
        repo_id: str,
        folder: str | Path | None = None,
        private: bool = False,
        gated: bool = False,
        token: str = "",
    ) -> str:
        """Create a repository, with the files of `folder` if given; return the sha of its `main`.

        `token` becomes valid as one more token of the owner, e.g. to open a private repository of somebody else.
        """
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        if token:
            self.tokens[token] = repo.owner
        sha = self.commit(repo_id, {".gitattributes": GITATTRIBUTES}, message="initial commit")
        if folder is None:
            return sha
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return self.commit(repo_id, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def commit(
        self, repo_id: str, files: Mapping[str, str | bytes | None], revision: str = "main", message: str = "Upload"
    ) -> str:
        """Write `files` (None deletes one) on top of a branch, new or not; return the sha of the commit."""
        with self.lock:
            repo = self.repos[repo_id]
            parent = repo.branches.get(revision, "")
            tree = dict(repo.commits[parent].files) if parent else {}
            for path, content in files.items():
                tree.pop(path, None)
                if content is not None:
                    tree[path] = self.keep(content.encode() if isinstance(content, str) else content)
            # As in git the sha follows from content and history: the same pushes give the same shas in every run.
            sha = hashlib.sha1(json.dumps([repo_id, parent, message, sorted(tree.items())]).encode()).hexdigest()
            repo.commits[sha] = Commit(sha, message, tree)
            repo.branches[revision] = sha
            return sha

    def keep(self, content: bytes) -> str:
        """Store `content` under its sha256 and return that."""
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return all a repository holds at a revision, as path -> content."""
        return {path: self.blobs[oid] for path, oid in self.repos[repo_id].at(revision).files.items()}

    def asked(self, repo_id: str) -> list[tuple[str, str]]:
        """Return the (revision, file) of every look at or download of a file of `repo_id`, in order."""
        file = re.compile(rf"/{re.escape(repo_id)}/resolve/([^/]+)/(.+)")
        found = (file.fullmatch(request.path) for request in self.requests)
        return [(unquote(match[1]), unquote(match[2])) for match in found if match]

    def is_lfs(self, path: str, size: int) -> bool:
        """Whether a file is large: uploaded apart from the commit and sent from the other host."""
        return size > LFS_SIZE or (size > 0 and path.endswith(self.lfs_suffixes))

    def entry(self, path: str, oid: str) -> dict[str, Any]:
        """Describe a file as the tree API does."""
        content = self.blobs[oid]  # the real oid of a large file is that of its pointer; no client compares it
        described = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if self.is_lfs(path, len(content)):
            described["lfs"] = {"oid": oid, "sha256": oid, "size": len(content), "pointerSize": 134}
        return described

    def env(self) -> dict[str, str]:
        """Return the environment of this process, turned to the server and rid of tokens, caches and proxies."""
        foreign = re.compile(r"HF_|HUGGING_?FACE|TRANSFORMERS_(CACHE|OFFLINE)|\w+_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        quiet = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
        return kept | quiet | {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "NO_PROXY": "*"}


def run_python(
    code: str, hub: HubServer, extra_env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a Python of its own, as a user of this Hub would; its `stdout` and `stderr` are in what returns.

    It starts in `hub.home` with `hub.env()` and `extra_env`, so without a token unless `extra_env` has HF_TOKEN. With
    `check`, a script that fails raises AssertionError with its traceback.
    """
    hub.home.mkdir(parents=True, exist_ok=True)
    env = hub.env() | dict(extra_env or {})
    done = forked.run_python(["-c", code], env=env, cwd=hub.home)
    if check and done.returncode:
        raise AssertionError(f"the script failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that this process uses too, with nobody logged in and everything cached under `tmp_path`."""
    with HubServer(home=tmp_path / "hf_home") as server:
        use_in_this_process(server, monkeypatch)
        yield server
        forget_remote_code_and_connections()


def use_in_this_process(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the imported huggingface_hub and transformers to `hub` until `monkeypatch` undoes it.

    The environment alone comes too late: they read it when they are imported, into constants and one default client.
    """
    import huggingface_hub.hf_api
    import transformers.dynamic_module_utils

    forget_remote_code_and_connections()
    env = hub.env()
    for name in os.environ.keys() - env.keys():
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    paths = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HUGGINGFACE_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules"}
    paths |= {"HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "tokens", "AGENT_HARNESSES_PATH": "agents.json"}
    constants = {name: str(hub.home / path) for name, path in paths.items()} | {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"hf.co", "huggingface.co", "127.0.0.1"}),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("huggingface_hub", "transformers"):
            for constant in constants.keys() & vars(module).keys():  # some modules hold copies
                monkeypatch.setattr(module, constant, constants[constant])
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    # transformers adds its folder of remote code at the end, where that of an earlier cache would hide its packages
    path = [place for place in sys.path if not Path(place, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", path)


def forget_remote_code_and_connections() -> None:
    """Drop what this process keeps of a Hub outside the constants: imported remote code and open connections."""
    from huggingface_hub.utils import close_session

    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    close_session()


def git_oid(content: bytes) -> str:
    """Return git's name for a file; by comparing it, the client leaves unchanged files out of a commit."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    """One connection. `answer` reads a request, `route` finds who answers it, the rest are the answers."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together; apart, the second waits for the first to be acknowledged

    def answer(self) -> None:
        self.body = self.read_body()  # always: what is left unread would be taken for the next request
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        verb = "GET" if self.command == "HEAD" else self.command
        try:
            if self.token and self.token not in self.hub.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            self.user = self.hub.tokens.get(self.token or "")
            with self.hub.lock:
                found = self.route(verb, *(unquote(part) for part in url.path.strip("/").split("/")))
            reply = found if isinstance(found, Reply) else Reply(json.dumps(found).encode(), 200, {})
        except HubError as error:
            reply = error.reply
        except Exception as error:
            logging.getLogger(__name__).exception("%s %s", self.command, self.path)
            reply = HubError(501, repr(error)).reply  # not 500, which clients try again for half a minute
        self.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def route(self, verb: str, *path: str) -> Any:
        """Return the answer to a request: a `Reply`, or what its JSON holds."""
        match [verb, *path]:
            case ["GET", user, name, "resolve", revision, *file]:
                return self.resolve(self.open(f"{user}/{name}"), revision, "/".join(file))
            case ["GET", "cdn", oid]:
                if self.token:  # as signed addresses do; the client must not send a token to another host
                    raise HubError(400, "Only one auth mechanism allowed")
                return self.content(oid, {"ETag": f'"{oid}"'})
            case ["GET", "api", "whoami-v2"] if self.user:
                return {"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": {}}
            case ["GET", "api", "whoami-v2"]:
                raise HubError(401, "Invalid username or password.")
            case ["GET", "api", "agent-harnesses"]:
                return {"standardEnvVars": [], "harnesses": {}}
            case ["POST", "api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["POST", "api", "repos", "create"]:
                return self.create(**json.loads(self.body))
            case ["POST", user, name, "info", "lfs", "objects", "batch"]:
                self.open(f"{user}/{name.removesuffix('.git')}", write=True)
                actions = [self.lfs_action(**file) for file in json.loads(self.body)["objects"]]
                return {"transfer": "basic", "objects": actions}
            case ["PUT", "lfs", oid] if oid == hashlib.sha256(self.body).hexdigest():
                return Reply(b"", 200, {"ETag": self.hub.keep(self.body)})
            case ["POST", "lfs", "verify"] if json.loads(self.body)["oid"] in self.hub.blobs:
                return {}
            case [_, "api", "models", user, name, *rest]:
                return self.route_model(self.open(f"{user}/{name}", write=verb != "GET"), verb, *rest)
        raise HubError(501, f"{Path(__file__).name} has no answer to {self.command} {self.path}")

    def route_model(self, repo: Repo, verb: str, *path: str) -> Any:
        """Continue `route` below /api/models/user/name."""
        match [verb, *path]:
            case ["GET"]:
                return self.info(repo, "main")
            case ["GET", "revision", revision]:
                return self.info(repo, revision)
            case ["GET", "tree", revision, *folder]:
                return self.tree(repo, repo.at(revision), "".join(f"{part}/" for part in folder))
            case ["POST", "preupload", revision]:
                tree = repo.at(revision).files
                return {"files": [self.upload_mode(tree, **file) for file in json.loads(self.body)["files"]]}
            case ["POST", "commit", revision] if "create_pr" not in self.query:
                return self.commit(repo, revision, [json.loads(line) for line in self.body.splitlines()])
            case ["POST", "branch", name]:
                return self.create_ref(repo, repo.branches, name, json.loads(self.body).get("startingPoint", "main"))
            case ["POST", "tag", revision]:
                return self.create_ref(repo, repo.tags, json.loads(self.body)["tag"], revision)
        raise HubError(501, f"{Path(__file__).name} has no answer to {self.command} {self.path}")

    def open(self, repo_id: str, write: bool = False) -> Repo:
        """Return a repository; to somebody who may not read it, it looks missing.

        The Hub's 401 has no code: huggingface_hub knows it by an https address, which this server does not have.
        """
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo.owner):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != repo.owner:
            raise HubError(403 if self.user else 401, f"You have no write access to {repo_id}.")
        return repo

    def resolve(self, repo: Repo, revision: str, path: str) -> Reply:
        if repo.gated and self.user != repo.owner:
            raise HubError(403 if self.user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:  # with the sha: the client then remembers that there is no such file
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        oid = commit.files[path]
        content = self.hub.blobs[oid]
        if not self.hub.is_lfs(path, len(content)):
            return self.content(oid, headers | {"ETag": f'"{git_oid(content)}"'})
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return Reply(b"", 302, headers | {"Location": f"{self.hub.cdn}/{oid}"})

    def content(self, oid: str, headers: dict[str, str]) -> Reply:
        """Answer with a file, or with the rest of it that a resumed download asks for."""
        content = self.hub.blobs[oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return Reply(content, 200, headers | {"Accept-Ranges": "bytes"})
        start, part = int(asked[1]), content[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
        if not part:
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        return Reply(part, 206, headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"})

    def info(self, repo: Repo, revision: str) -> dict[str, Any]:
        commit = repo.at(revision)
        files = [self.hub.entry(path, oid) for path, oid in sorted(commit.files.items())]
        siblings = [{"rfilename": file["path"], "blobId": file["oid"], **file} for file in files]
        state = {"private": repo.private, "gated": "auto" if repo.gated else False, "lastModified": commit.date}
        return {"id": repo.id, "author": repo.owner, "sha": commit.sha, "tags": [], "siblings": siblings, **state}

    def tree(self, repo: Repo, commit: Commit, folder: str) -> list[dict[str, Any]]:
        files = {path: oid for path, oid in sorted(commit.files.items()) if path.startswith(folder)}
        if folder and not files:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        folders = {str(parent) for path in files for parent in Path(path).parents if str(parent).startswith(folder)}
        entries = [{"type": "directory", "path": path, "oid": git_oid(path.encode())} for path in folders - {"."}]
        entries += [self.hub.entry(path, oid) for path, oid in files.items()]
        deep = self.query.get("recursive", "").lower() == "true"
        return [entry for entry in entries if deep or "/" not in entry["path"].removeprefix(folder)]

    def create(self, name: str, organization: str | None = None, visibility: str = "", **other: Any) -> Any:
        repo_id = f"{organization or self.user}/{name}"
        if self.user != repo_id.split("/")[0]:
            raise HubError(403 if self.user else 401, f"You have no rights to create {repo_id}.")
        if other.get("type", "model") != "model":
            raise HubError(501, f"{Path(__file__).name} holds models only")
        answer = {"url": f"{self.hub.url}/{repo_id}", "error": "You already created this model repo"}
        if repo_id in self.hub.repos:
            return Reply(json.dumps(answer).encode(), 409, {})
        self.hub.add_repo(repo_id, private=visibility == "private" or bool(other.get("private")))
        return {"url": answer["url"]}

    def create_ref(self, repo: Repo, refs: dict[str, str], name: str, revision: str) -> dict[str, Any]:
        if name in refs:
            raise HubError(409, f"Reference {name} already exists")
        refs[name] = repo.at(revision).sha
        return {}

    def upload_mode(self, tree: dict[str, str], path: str, size: int, **sample: str) -> dict[str, Any]:
        """Say how to upload a file, and what is there now, so that a file that has not changed is left out."""
        lfs, oid = self.hub.is_lfs(path, size), tree.get(path)
        if oid and not lfs:
            oid = git_oid(self.hub.blobs[oid])
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def lfs_action(self, oid: str, size: int) -> dict[str, Any]:
        """Say where to upload a large file, or, by giving no actions, that it is here already."""
        if oid in self.hub.blobs:
            return {"oid": oid, "size": size}
        upload, verify = {"href": f"{self.hub.url}/lfs/{oid}"}, {"href": f"{self.hub.url}/lfs/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        base = repo.at(branch)
        if branch not in repo.branches:
            raise HubError(404, f"{branch} is not a branch", "RevisionNotFound")
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", base.sha) != base.sha:
            raise HubError(412, f"{branch} has moved since {header['parentCommit']}")
        files: dict[str, bytes | None] = {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                files[value["path"]] = None
            elif key == "deletedFolder":
                files |= dict.fromkeys(path for path in base.files if path.startswith(value["path"].rstrip("/") + "/"))
        sha = self.hub.commit(repo.id, files, branch, header["summary"])
        return {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.id}/commit/{sha}"}

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Record the request instead of printing it."""
        self.hub.requests.append(Request(self.command, self.path, int(code), self.token))
