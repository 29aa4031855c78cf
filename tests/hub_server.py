"""A local server of files that speaks what huggingface_hub asks of the hub, ranges and pushes."""

import base64
import hashlib
import http.server
import io
import json
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asking import picture

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = r"(?P<repo>[^/]+/[^/]+)"
RESOLVE = re.compile(rf"(/datasets)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(rf"/api/(datasets|models)/{REPO}/(?P<what>revision|tree)/[^/]+/?(?P<below>.*)")


class Hub:
    """Serves `folder`: data sets and models as hub/<owner>/<name>/..., other files by their path.

    commit: that of all of them. requests: (method, path, first byte) of every request. cut: path ->
    bytes after which the connection breaks, once. wrong: paths whose checksum is said wrongly.
    """

    def __init__(self, folder: Path):
        self.folder, self.url, self.commit = folder, "", COMMIT
        self.connections: list[socket.socket] = []
        self.requests: list[tuple[str, str, int]] = []
        self.cut: dict[str, int] = {}
        self.wrong: set[str] = set()

    def fetched(self, name: str) -> list[int]:
        """The first byte of each download of a file of that name."""
        return [at for method, path, at in self.requests if method == "GET" and path.endswith(name)]


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """A hub that serves a folder while the context lasts."""
    served = Hub(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            served.connections.append(self.connection)

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def do_POST(self):
            """What a push asks: a repository, how to send each file (inline), a commit."""
            content = self.rfile.read(int(self.headers["Content-Length"]))
            served.requests.append(("POST", self.path, 0))
            reply = {"url": f"{served.url}/me/mine", "errors": [], "warnings": []}
            if "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(content)["files"]]
                ways = {"uploadMode": "regular", "shouldIgnore": False}
                reply = {"files": [{"path": path, **ways} for path in paths]}
            elif "/commit/" in self.path:
                at = served.folder / "hub" / "/".join(self.path.split("/")[3:5])
                for line in map(json.loads, content.splitlines()):
                    if line["key"] == "file":
                        at.mkdir(parents=True, exist_ok=True)
                        file = at / line["value"]["path"]
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                reply = {"commitUrl": f"{served.url}/me/mine/commit/{COMMIT}", "commitOid": COMMIT}
            headers = {"Content-Type": "application/json"}
            self.reply(200, json.dumps(reply).encode(), headers, True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            requested_range = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(requested_range[1]) if requested_range else 0
            served.requests.append((self.command, path, first))
            if match := API.match(path):
                return self.tell(match, "recursive=true" in self.path.lower())
            at = RESOLVE.match(path)
            inner = f"hub/{at['repo']}/{at['file']}" if at else path.lstrip("/")
            if not (served.folder / inner).is_file():
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            content = (served.folder / inner).read_bytes()
            headers = {"Accept-Ranges": "bytes"}
            if at:
                reply = b"other" if path in served.wrong else content
                headers |= {"X-Repo-Commit": served.commit, "ETag": f'"{sha256(reply)}"'}
            if first >= len(content) > 0:
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"}, body)
            if requested_range:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            cut = served.cut.pop(path, None) if body else None
            self.reply(206 if requested_range else 200, content[first:], headers, body, cut)

        def tell(self, match: re.Match, recursive: bool) -> None:
            root = served.folder / "hub" / match["repo"]
            at = root / match["below"]
            paths = sorted(
                at.rglob("*") if recursive or match["what"] == "revision" else at.glob("*")
            )
            names = [str(path.relative_to(root)) for path in paths]
            reply = {"id": match["repo"], "sha": served.commit}
            files = [name for name, path in zip(names, paths, strict=True) if path.is_file()]
            reply |= {"siblings": [{"rfilename": name} for name in files]}
            if match["what"] == "tree":
                reply = [
                    {"type": "file" if path.is_file() else "directory", "path": name,
                     "oid": sha256(name.encode())[:40], "size": path.stat().st_size}
                    for name, path in zip(names, paths, strict=True)
                ]  # fmt: skip
            headers = {"Content-Type": "application/json"}
            self.reply(200 if paths else 404, json.dumps(reply).encode(), headers, True)

        def reply(
            self, code: int, content: bytes, headers: dict, body: bool, cut: int | None = None
        ) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if body:
                self.wfile.write(content if cut is None else content[:cut])
            if cut is not None:
                self.close_connection = True

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_port}"
        yield served
        server.shutdown()
        for connection in served.connections:  # that a client has kept open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def image(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """An image file of random pixels."""
    content = io.BytesIO()
    picture(seed, size=size).save(content, kind)
    return content.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    """A .zip of files."""
    archive_bytes = io.BytesIO()
    with zipfile.ZipFile(archive_bytes, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return archive_bytes.getvalue()
