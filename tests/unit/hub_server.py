"""A Hugging Face hub of one repository on loopback, as far as publishing asks it: what the real client sends is kept."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Serves until close(). `files` and `private` are the repository; None means that there is none."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: bool | None = None
        self.files: dict[str, bytes] = {}
        self.refuse = 0
        """Status with which every request is answered, if not 0."""
        self.complaint = ""
        """What is wrong with a card, in the hub's words."""
        self.spoil = False
        """Whether files lose their last byte on the way."""
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.refuse:
            self._send(hub.refuse, {"error": "no"})
        elif path == "/api/repos/create":
            given = json.loads(body)
            hub.private = given.get("visibility", "private" if given.get("private") else "public") == "private"
            self._send(200, {"url": f"{hub.url}/datasets/me/kun"})
        elif hub.private is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._send(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files[line["value"]["path"]] = content[: -1 if hub.spoil else None]
            self._send(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/datasets/me/kun/commit/0"}
            )
        elif path == "/api/validate-yaml":
            errors = [{"message": hub.complaint}] if hub.complaint else []
            self._send(400 if errors else 200, {"errors": errors, "warnings": []})
        else:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in hub.files.items()]
            self._send(200, {"id": "me/kun", "private": hub.private, "siblings": siblings, "sha": "0" * 40})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "content-type": "application/json",
            "content-length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Silent."""
