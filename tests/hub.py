"""A stand-in for the Hub: the requests that uploads and downloads of a model make, served on loopback."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The state of the stand-in.

    Attributes:
        address: its URL.
        repositories: the files of each repository.
        private: the repositories that are private.
        closed: whether requests that write are rejected.
        stored: the large files that were uploaded, by their SHA-256.
    """

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    closed: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a stand-in while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None: ...

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def json(self, value: object, status: int = 200) -> None:
            self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def do_POST(self) -> None:
            content, path = self.body(), unquote(self.path)
            if hub.closed:
                self.json({"error": "You are not allowed to write here"}, 403)
            elif path == "/api/validate-yaml":
                self.json({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                hub.repositories.setdefault(name, {})
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(name)
                self.json({"url": f"{hub.address}/{name}", "name": name, "id": name})
            elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
                files = json.loads(content)["files"]
                modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
                self.json({"files": modes})
            elif path.endswith("/info/lfs/objects/batch"):
                asked = json.loads(content)["objects"]
                places = [{"upload": {"href": f"{hub.address}/store/{each['oid']}"}} for each in asked]
                objects = [each | {"actions": place} for each, place in zip(asked, places, strict=True)]
                self.json({"transfer": "basic", "objects": objects})
            elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
                for line in content.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        hub.repositories[match[1]][value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        hub.repositories[match[1]][value["path"]] = hub.stored[value["oid"]]
                self.json({"commitUrl": f"{hub.address}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.json({"error": path}, 404)

        def do_PUT(self) -> None:
            content = self.body()
            digest = hashlib.sha256(content).hexdigest()
            assert self.path.endswith(digest)
            hub.stored[digest] = content
            self.reply(200, b"")

        def do_GET(self) -> None:
            path = unquote(self.path).partition("?")[0]
            if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path)) and self.known(match[1]):
                names = [{"rfilename": name} for name in hub.repositories[match[1]]]
                self.json({"id": match[1], "sha": COMMIT, "siblings": names, "private": match[1] in hub.private})
            elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)) and self.known(match[1]):
                files = hub.repositories[match[1]].items()
                self.json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files])
            elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and self.known(match[1]):
                content = hub.repositories[match[1]].get(match[2])
                if content is None:
                    self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
                else:
                    self.reply(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})
            else:
                self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def known(self, name: str) -> bool:
            return name in hub.repositories

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
