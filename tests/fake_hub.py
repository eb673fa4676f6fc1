"""A server on 127.0.0.1 that plays the Hugging Face Hub: what huggingface_hub asks, and its ways to fail."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files of each revision; `gate` is the token that opens it."""

    revisions: dict[str, dict[str, bytes]]  # branch or tag -> path -> content
    gate: str | None = None

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit stands for."""
        commits = {name: self._hash(files) for name, files in self.revisions.items()}
        return commits.get(revision, revision if revision in commits.values() else None)

    def files(self, commit: str) -> dict[str, bytes]:
        return next(files for files in self.revisions.values() if self._hash(files) == commit)

    @staticmethod
    def _hash(files: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class FakeHub:
    """Answers requests for `repositories`, and keeps what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes that arrive of the next answers
    status: int | None = None  # answer everything with this

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(_Handler):
            answers = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: from now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        return sorted(
            path.partition("/resolve/")[2].partition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        )


class _Handler(BaseHTTPRequestHandler):
    answers: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.answers.requests.append((self.command, path, dict(self.headers)))
        if self.answers.status is not None:
            return self._send(self.answers.status, b"{}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api(parts[2:])
        if "resolve" in parts:
            at = parts.index("resolve")
            return self._file("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        return self._send(404, b"{}")

    do_HEAD = do_GET

    def _api(self, parts: list[str]) -> None:
        at = next((i for i, part in enumerate(parts) if part in ("revision", "tree")), len(parts))
        repository = self._repository("/".join(parts[:at]))
        if repository is None:
            return
        commit = repository.commit(parts[at + 1] if at < len(parts) else "main")
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = repository.files(commit)
        answer: Any = {
            "id": "/".join(parts[:at]), "modelId": "/".join(parts[:at]), "sha": commit, "private": False,
            "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files],
        }  # fmt: skip
        if at < len(parts) and parts[at] == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        commit = repository.commit(revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        content = repository.files(commit).get(name)
        if content is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        begin = 0
        if wanted := self.headers.get("Range"):
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cuts = self.answers.cuts.get(name) if self.command == "GET" else None
        self._send(206 if wanted else 200, content[begin:], headers, cuts.pop(0) if cuts else None)

    def _repository(self, repo_id: str) -> Repository | None:
        repository = self.answers.repositories.get(repo_id)
        if repository is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.gate and self.headers.get("Authorization") != f"Bearer {repository.gate}":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if cut_after is None else content[:cut_after])
            self.wfile.flush()
            self.close_connection |= cut_after is not None
