"""
A Hugging Face Hub for tests: it runs in a thread, keeps repositories in memory, remembers what it was asked, and fails
where it is told to. It knows what pushing and loading a model needs; every file is a regular one, without LFS or Xet.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants, hf_api
from transformers.utils import hub as transformers_hub


# Failures that are not answers: a connection that ends in the middle of the request's body, and one that ends after
# the request has been carried out, before the answer.
CUT = "cut"
LOST_ANSWER = "lost answer"

DEFAULT_OWNER = "somebody"
TOKEN = "hf_token_of_the_tests"


@dataclass
class Request:
    """A request that arrived: `POST`, `/api/repos/create`, its bearer token and the JSON of its body, if any."""

    method: str
    path: str
    token: str | None
    json: Any = None


@dataclass
class Commit:
    """A commit: its message, what it changed, and all files that the repository has after it."""

    oid: str
    message: str
    files: dict[str, bytes]
    added: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)


@dataclass
class Repository:
    """A repository: like the Hub's, it starts with one commit that holds `.gitattributes`."""

    repo_id: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self):
        files = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.branches["main"] = [Commit(oid_of(self.repo_id), "initial commit", files)]

    @property
    def commits(self) -> list[Commit]:
        """The commits of `main` after the initial one."""
        return self.branches["main"][1:]

    @property
    def files(self) -> dict[str, bytes]:
        """The files of `main`."""
        return self.branches["main"][-1].files

    def find(self, revision: str) -> Commit:
        """The commit that a branch points to, or that has this id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """Add a commit with the operations of a request's lines."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = self.branches[branch][-1]
        header, *operations = lines
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in operations
            if line["key"] == "file"
        }
        deleted = [line["value"]["path"] for line in operations if line["key"] == "deletedFile"]
        files = {path: content for path, content in {**parent.files, **added}.items() if path not in deleted}
        commit = Commit(oid_of(parent.oid, *lines), header["value"]["summary"], files, sorted(added), deleted)
        self.branches[branch].append(commit)
        return commit


class Refusal(Exception):
    """An answer that is not a success, with the header by which `huggingface_hub` tells refusals apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        self.content = {"error": message, **content}


class FakeHub:
    """
    The Hub, between `with FakeHub() as hub:` and the end of that block.

    `hub.failures` maps a pattern, searched in `METHOD /path`, to what happens to such requests: a status to answer,
    `CUT` or `LOST_ANSWER`.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.failures: dict[str, int | str] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering: connections to it are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that make a new process use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """
        Make this process use this Hub, and the folder `home` as its cache, until `monkeypatch` is undone.

        `huggingface_hub` reads its environment only once, when it is imported: its constants have to be replaced.
        """
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        # What the functions of `huggingface_hub` go by, which PEFT asks for example
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        close_session()  # it may have been opened with a proxy

    def requests_to(self, pattern: str) -> list[Request]:
        """The requests in whose `METHOD /path` the pattern is found."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def failure_of(self, request: Request) -> int | str | None:
        for pattern, failure in self.failures.items():
            if re.search(pattern, f"{request.method} {request.path}"):
                return failure
        return None

    def find(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo_id]

    def create_repository(self, body: dict[str, Any]) -> dict[str, Any]:
        repo_id = f"{body.get('organization') or DEFAULT_OWNER}/{body['name']}"
        url = f"{self.url}/{repo_id}"
        with self._lock:
            if repo_id in self.repositories:
                raise Refusal(409, "You already created this model repo", url=url)
            self.repositories[repo_id] = Repository(repo_id, private=body.get("visibility") == "private")
        return {"url": url, "name": repo_id}

    def create_branch(self, repo_id: str, branch: str) -> dict[str, Any]:
        branches = self.find(repo_id).branches
        if branch in branches:
            raise Refusal(409, "Reference already exists")
        branches[branch] = list(branches["main"])
        return {}

    def preupload(self, repo_id: str, revision: str, body: dict[str, Any]) -> dict[str, Any]:
        present = self.find(repo_id).find(revision).files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": git_hash(present[file["path"]]) if file["path"] in present else None,
                }
                for file in body["files"]
            ]
        }

    def commit(self, repo_id: str, revision: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        with self._lock:
            commit = self.find(repo_id).commit(revision, lines)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo_id}/commit/{commit.oid}"}

    def model_info(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        repository = self.find(repo_id)
        commit = repository.find(revision)
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit.oid,
            "private": repository.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def tree(self, repo_id: str, revision: str, folder: str = "") -> list[dict[str, Any]]:
        """The files in a folder and below it: what a request with `recursive` asks for, which is more than enough."""
        files = self.find(repo_id).find(revision).files
        found = [path for path in sorted(files) if path.startswith(f"{folder}/" if folder else "")]
        if not found:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return [
            {"type": "file", "path": path, "oid": git_hash(files[path]), "size": len(files[path])} for path in found
        ]

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self.find(repo_id).find(revision)
        if path not in commit.files:
            refusal = Refusal(404, f"{path} does not exist", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = commit.oid
            raise refusal
        content = commit.files[path]
        return content, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": commit.oid}


def oid_of(*parts: Any) -> str:
    return hashlib.sha1(json.dumps(parts).encode()).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Finds the method of the Hub that answers a request."""

    protocol_version = "HTTP/1.1"
    # An answer's header and content go out in two writes, which would otherwise wait for each other
    disable_nagle_algorithm = True

    # Repositories that are addressed by their full ids, as all are once they exist
    MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
    ROUTES: ClassVar[list[tuple[str, Callable[..., Any]]]] = [
        (r"POST /api/repos/create", FakeHub.create_repository),
        (r"POST /api/validate-yaml", lambda hub, body: {"errors": [], "warnings": []}),
        (rf"POST {MODEL}/branch/(?P<branch>[^/]+)", lambda hub, body, **names: hub.create_branch(**names)),
        (rf"POST {MODEL}/preupload/(?P<revision>[^/]+)", FakeHub.preupload),
        (rf"POST {MODEL}/commit/(?P<revision>[^/]+)", lambda hub, body, **names: hub.commit(**names, lines=body)),
        (rf"GET {MODEL}(/revision/(?P<revision>[^/]+))?", FakeHub.model_info),
        (rf"GET {MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", FakeHub.tree),
        (r"(GET|HEAD) /(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", FakeHub.resolve),
    ]

    def answer(self) -> None:
        hub: FakeHub = self.server.hub
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, url.path, token)
        hub.requests.append(request)
        failure = hub.failure_of(request)
        length = int(self.headers.get("Content-Length", 0))
        if failure == CUT:
            self.rfile.read(length // 2)
            return self.hang_up()
        content = self.rfile.read(length)
        if content:
            ndjson = self.headers.get("Content-Type") == "application/x-ndjson"
            request.json = [json.loads(line) for line in content.splitlines()] if ndjson else json.loads(content)
        try:
            if isinstance(failure, int):
                raise Refusal(failure, f"The test answers {failure}")
            answer, headers = self.find_answer(hub, request), {}
        except Refusal as refusal:
            return self.send(refusal.status, refusal.content, refusal.headers)
        if failure == LOST_ANSWER:
            return self.hang_up()
        if isinstance(answer, tuple):
            answer, headers = answer
        self.send(200, answer, headers)

    do_GET = do_HEAD = do_POST = answer

    def find_answer(self, hub: FakeHub, request: Request) -> Any:
        for pattern, method in self.ROUTES:
            if match := re.fullmatch(pattern, f"{request.method} {request.path}"):
                names = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if request.method == "POST":
                    names["body"] = request.json
                return method(hub, **names)
        raise Refusal(404, f"The fake Hub has no {request.method} {request.path}")

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Requests are remembered, not printed."""
