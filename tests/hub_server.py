"""A server that speaks the Hugging Face Hub's HTTP, on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

# /api/models/a/b[/what[/revision[/path]]] and /[datasets/]a/b/resolve/revision/path.
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)(?:/([^/]+)(?:/(.*))?)?)?$")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


def _handler(root: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            if found := API.match(path):
                kind, name, what, revision, below = found.groups()
                if (root / kind / name).is_dir():
                    if revision not in (None, "main", _revision(root / kind / name)):
                        return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                    return self._json(self._answer(root / kind / name, name, what, below or "", sent))
            elif found := FILE.match(path):
                kind, name, _, file = found.groups()
                if (file_path := root / (kind or "models") / name / file).is_file():
                    return self._file(file_path.read_bytes(), _revision(root / (kind or "models") / name))
                if (root / (kind or "models") / name).is_dir():
                    return self._send(
                        404,
                        b"",
                        {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _revision(root / (kind or "models") / name)},
                    )
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_POST = do_GET

        def _answer(self, directory: Path, name: str, what: str | None, below: str, sent: str) -> object:
            paths = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
            if what == "tree":
                return [_entry(directory, path) for path in paths if not below or path.startswith(below + "/")]
            if what == "paths-info":
                wanted = json.loads(sent)["paths"] if sent.startswith("{") else parse_qs(sent)["paths"]
                return [_entry(directory, path) for path in paths if path in wanted]
            files = [{"rfilename": path} for path in paths if (directory / path).is_file()]
            return {
                "id": name,
                "sha": _revision(directory),
                "siblings": files,
                "private": False,
                "tags": [],
                "downloads": 0,
            }

        def _json(self, found: object) -> None:
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _file(self, content: bytes, revision: str) -> None:
            about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": revision}
            if part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start, end = int(part[1]), int(part[2]) if part[2] else len(content) - 1
                about["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                return self._send(206, content[start : end + 1], about)
            self._send(200, content, about)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _revision(directory: Path) -> str:
    """There is one at a time; another when any file changes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return hashlib.sha1(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def _entry(directory: Path, path: str) -> dict:
    file = directory / path
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
    content = file.read_bytes()
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def hub_server(root: Path) -> Iterator[dict[str, str]]:
    """What a process needs in its environment to reach it: its models are the directories root/models/NAME/NAME, its
    data sets root/datasets/NAME/NAME."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(root / "home"), "HF_TOKEN": ""}
    finally:
        server.shutdown()
        server.server_close()
