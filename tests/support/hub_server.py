"""A Hub on loopback: repositories with commits, private ones, and downloads at a revision.

It speaks what ``huggingface_hub`` asks of the real one to create, commit, list and download.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import unquote, urlsplit

__all__ = ["TOKEN", "Hub", "served"]

TOKEN = "hf_loopback"


@dataclass
class Repository:
    """Files by path at each commit, and where its branches and tags are."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        described = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        parent = self.refs.get(branch, "")
        oid = hashlib.sha1(json.dumps([parent, described]).encode()).hexdigest()
        self.commits[oid], self.refs[branch] = files, oid
        return oid

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def served() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server)

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self._knows_token:
            return self._missing("Invalid username or password.", "RepoNotFound", 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self._json({"files": modes})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            return self._commit(found[1], found[2], body)
        return self._missing(f"No route {path}", "NotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, answer in {
            r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self._info,
            r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._file,
        }.items():
            if found := re.fullmatch(pattern, path):
                name, revision, *rest = found.groups()
                return self._of_repository(name, revision or "main", rest, answer)
        return self._missing(f"No route {path}", "NotFound")

    def _of_repository(self, name: str, revision: str, rest: list[str], answer: Any) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._knows_token):
            status = 404 if self._knows_token else 401  # as the real one: it tells neither apart
            return self._missing("Repository not found", "RepoNotFound", status)
        oid = repository.at(revision)
        if oid is None:
            return self._missing(f"Invalid rev id: {revision}", "RevisionNotFound")
        answer(name, repository.commits[oid], oid, *rest)
        return None

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            told = {"error": "You already created this model repo"}
            return self._json(told | {"url": f"{self.hub.url}/{name}", "name": name}, 409)
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit({".gitattributes": b""}, "main")
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        if branch not in repository.refs:
            return self._missing(f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repository.commits[repository.refs[branch]])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = repository.commit(files, branch)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self._json({"success": True, "commitOid": oid, "commitUrl": url})

    def _info(self, name: str, files: dict[str, bytes], oid: str) -> None:
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "sha": oid, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, name: str, files: dict[str, bytes], oid: str) -> None:
        self._json(
            [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
        )

    def _file(self, name: str, files: dict[str, bytes], oid: str, path: str) -> None:
        if path not in files:
            return self._missing("Entry not found", "EntryNotFound")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self._send(files[path], 200, {"X-Repo-Commit": oid, "ETag": etag})

    @property
    def _knows_token(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _missing(self, message: str, code: str, status: int = 404) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(json.dumps({"error": message}).encode(), status, headers)

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)
