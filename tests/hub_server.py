"""The Hugging Face hub, as far as its clients need it to download models and datasets: local folders over HTTP.

    python -m tests.hub_server FOLDER PORT     # then HF_ENDPOINT=http://127.0.0.1:PORT python train.py ...

FOLDER/models/<repository>/ and FOLDER/datasets/<repository>/ are the repositories, such as models/google/vit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40

_MARK = ".repository"
"""A file that tells a repository's folder from a user's."""


class HubServer(ThreadingHTTPServer):
    """A server on 127.0.0.1.

    Args:
        folder: the folder of the repositories.
        port: the port; 0 for any that is free.

    Attributes:
        requests: the method and the path of each request so far.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        """The address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    """A context in which `folder` is served by a thread of this process."""
    with HubServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def repository(hub: Path, kind: str, name: str) -> Path:
    """Make an empty repository in the folder of a server.

    Args:
        hub: the folder that is served.
        kind: "models" or "datasets".
        name: the repository's name.

    Returns:
        The repository's folder.
    """
    folder = hub / kind / name
    folder.mkdir(parents=True)
    (folder / _MARK).touch()
    return folder


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # The client keeps its connection, so a request's body is read even where it is not needed.
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} /{path}")
        is_api = path.startswith("api/")
        path = path.removeprefix("api/")
        kind = "datasets" if path.startswith("datasets/") else "models"
        repository, words = self._repository(kind, path.removeprefix(f"{kind}/").split("/"))
        if repository is None:
            self._refuse("RepoNotFound")
        elif not is_api:  # resolve/<revision>/<file>
            self._send_file(repository, "/".join(words[2:]))
        elif not words or words[0] == "revision":
            self._send_json(_description(repository, self.server.folder / kind))
        elif words[0] == "tree":
            below = repository / "/".join(words[2:])
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            found = below.rglob("*") if recursive else below.glob("*")
            self._send_json([_entry(repository, file) for file in sorted(found)])
        elif words[0] == "paths-info":
            named = [repository / name for name in form.get("paths", [])]
            self._send_json([_entry(repository, file) for file in named if file.exists()])
        else:
            self._refuse("EntryNotFound")

    def _repository(self, kind: str, words: list[str]) -> tuple[Path | None, list[str]]:
        # A repository's name has one word or two.
        for count in (2, 1):
            folder = self.server.folder / kind / "/".join(words[:count])
            if (folder / _MARK).is_file():
                return folder, words[count:]
        return None, words

    def _send_file(self, repository: Path, name: str) -> None:
        file = repository / name
        if not file.is_file():
            self._refuse("EntryNotFound")
            return
        size, start = file.stat().st_size, 0
        wanted = self.headers.get("Range")
        end = size
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else size
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("ETag", f'"{_hash(repository, file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "HEAD":
            with file.open("rb") as content:
                content.seek(start)
                shutil.copyfileobj(content, self.wfile) if end == size else self.wfile.write(content.read(end - start))

    def _send_json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _refuse(self, code: str) -> None:
        self._send(404, {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT}, b"{}")

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _hash(repository: Path, file: Path) -> str:
    return hashlib.sha1(f"{file.relative_to(repository)} {file.stat().st_size}".encode()).hexdigest()


def _entry(repository: Path, file: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(file.relative_to(repository)), "oid": _hash(repository, file)}
    if file.is_dir():
        return {**entry, "type": "directory"}
    return {**entry, "type": "file", "size": file.stat().st_size}


def _description(repository: Path, kind: Path) -> dict[str, Any]:
    files = [str(file.relative_to(repository)) for file in sorted(repository.rglob("*")) if file.is_file()]
    name = str(repository.relative_to(kind))
    return {
        "_id": "0" * 24,
        "id": name,
        "modelId": name,
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": file} for file in files if file != _MARK],
    }


if __name__ == "__main__":
    HubServer(Path(sys.argv[1]), int(sys.argv[2])).serve_forever()
