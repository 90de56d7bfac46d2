"""A small Hugging Face hub: repositories with commits, branches and gates, over the hub's HTTP protocol.

Answers the requests of huggingface_hub: /api/models/ID (with /revision/REV, /tree/REV, /refs) and HEAD and GET of
/ID/resolve/REV/FILE with the commit in a header, ranges, and the hub's error codes. Datasets can be uploaded:
creation, preupload, LFS objects by their basic transfer (not Xet), commits.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

MEMBER, STRANGER = "hf_member", "hf_stranger"  # tokens: of an account that accepted the terms, of one that did not


@dataclass
class Repository:
    """Files by commit; branches and tags name commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit that holds exactly `files`, at the end of `branch`; returns its hash."""
        digest = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.branches[branch] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


class Hub:
    """The server, on a free port of this machine until `close`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.objects: dict[str, bytes] = {}  # uploaded by their SHA-256, not in a commit yet
        self.failures = 0  # commits to refuse with 503
        self.down = False  # answers 503
        self.cut_after: int | None = (
            None  # bytes of a file after which connections break, once per entry in `cuts`
        )
        self.cuts = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, files: Mapping[str, bytes], gated: bool = False) -> Repository:
        """Create a repository with one commit on main."""
        repository = self.repositories[name] = Repository(gated=gated)
        repository.commit(files)
        return repository

    def downloads(self) -> list[str]:
        """Paths of the files whose content was requested."""
        return [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def _write(self) -> None:
        """The requests of an upload; MEMBER alone may write."""
        path, data = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.hub.requests.append((self.command, path, None))
        if self.hub.failures > 0 and "/commit/" in path:
            self.hub.failures -= 1
            return self._refuse(503, "", "try later")
        if path.startswith("/lfs/"):  # a signed address, without a token
            self.hub.objects[path.removeprefix("/lfs/")] = data
            return self._json({})
        if self._token() != MEMBER:
            return self._refuse(403, "", "this token may not write")
        return self._json(*self._written(path, data))

    def _written(self, path: str, data: bytes) -> tuple[Any, int]:
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if path == "/api/repos/create":
            return self._create(json.loads(data))
        if path.endswith(".git/info/lfs/objects/batch"):
            found = [self._instruct(one) for one in json.loads(data)["objects"]]
            return {"objects": found, "transfer": "basic"}, 200
        if parts[4:5] == ["preupload"]:
            return {"files": [_upload_mode(file["path"]) for file in json.loads(data)["files"]]}, 200
        if parts[4:5] == ["commit"]:
            return self._commit("/".join(parts[1:4]), [json.loads(line) for line in data.splitlines()]), 200
        return {"error": "not found"}, 404

    def _create(self, wanted: Mapping[str, Any]) -> tuple[Any, int]:
        name = f"{wanted['type']}s/{wanted['organization']}/{wanted['name']}"
        there = name in self.hub.repositories
        if not there:
            private = wanted.get("private", False) or wanted.get("visibility") == "private"
            self.hub.add(name, {".gitattributes": b""}).private = private
        return {"url": f"{self.hub.endpoint}/{name}"}, 409 if there else 200

    def _instruct(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Where to send an object; nothing if it has arrived before."""
        if wanted["oid"] in self.hub.objects:
            return dict(wanted)
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.branches["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        address = f"{self.hub.endpoint}/{name}/commit/{commit}"
        return {"success": True, "commitUrl": address, "commitOid": commit}

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.down:
            return self._refuse(503, "", "down for maintenance")
        if self._token() not in (None, MEMBER, STRANGER):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            return self._about("/".join(parts[1:4]), parts[4:])
        if parts[:2] == ["api", "models"]:
            return self._about("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        return self._refuse(404, "", "not found")

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit; None after a refusal was sent: without a token, 401 for no repository."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(
                404 if self._token() else 401, "RepoNotFound" if self._token() else "", "Repository not found"
            )
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _about(self, name: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if (found := self._find(name, revision)) is None:
            return None
        repository, commit = found
        if rest[:1] == ["refs"]:
            heads, tags = _refs(repository.branches, "heads"), _refs(repository.tags, "tags")
            return self._json({"branches": heads, "tags": tags, "converts": []})
        files = repository.commits[commit]
        if rest[:1] == ["tree"]:
            return self._json([_entry(path, data) for path, data in sorted(files.items())])
        siblings = [{"rfilename": path} for path in sorted(files)]
        gated = "auto" if repository.gated else False
        about = {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings, "gated": gated}
        return self._json(about | {"private": repository.private})

    def _file(self, name: str, revision: str, path: str, body: bool) -> None:
        if (found := self._find(name, revision)) is None:
            return None
        repository, commit = found
        if repository.gated and self._token() != MEMBER:
            status = 403 if self._token() else 401
            return self._refuse(status, "GatedRepo", f"Access to model {name} is restricted")
        data = repository.commits[commit].get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return self._send(data, commit, body)

    def _send(self, data: bytes, commit: str, body: bool) -> None:
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        cut = self.hub.cut_after
        if cut is not None and self.hub.cuts > 0 and len(data) - start > cut:
            self.hub.cuts -= 1
            self.wfile.write(data[start : start + cut])
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def _json(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"X-Error-Message": message, "Content-Length": "0"} | dict(more or {})
        for name, value in (headers | ({"X-Error-Code": code} if code else {})).items():
            self.send_header(name, value)
        self.end_headers()


def _upload_mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".parquet") else "regular", "shouldIgnore": False}


def _refs(names: Mapping[str, str], kind: str) -> list[dict[str, str]]:
    return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> Iterator[None]:
    """Point huggingface_hub at an endpoint and a cache, without a token; it reads both when it is imported."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    close_session()


def folder_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path, for `Hub.add`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
