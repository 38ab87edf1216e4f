"""A stand-in for the hub's HTTP API, as far as an upload uses it. It keeps what it gets in memory."""

import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """Repositories by id, each a dictionary of files; `answers` replaces the status of paths that match its keys."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.cards: list[dict[str, Any]] = []
        """Front matter that was validated."""
        self.answers: dict[str, int] = {}

    @property
    def address(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Be silent."""

    def _answer(self, status: int, content: Any = None) -> None:
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        forced = next((status for part, status in hub.answers.items() if part in path), None)
        if forced is not None:
            self._answer(forced, {"error": "forced"})
        elif path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = body
            self._answer(200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif path == "/api/whoami-v2":
            self._answer(200, {"name": "me", "type": "user", "orgs": []})
        elif path == "/api/validate-yaml":
            hub.cards.append(_checked_card(json.loads(body)["content"]))
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+?/.+?)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            self._answer(
                200,
                {
                    "files": [
                        {"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)
                    ]
                },
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+?/.+?)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            self._answer(
                *((200, {"id": found[1]}) if found[1] in hub.files else (404, {"error": "Repository not found"}))
            )
        else:
            self._answer(404, {"error": f"the stand-in has no {path}"})

    do_GET = do_POST = do_PUT = _serve

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if name in self.server.files:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"})
            return
        self.server.files[name], self.server.private[name] = {}, bool(request.get("private"))
        self._answer(200, {"url": f"{self.server.address}/{name}", "name": name})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name][value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.large[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1" * 40})


def _checked_card(content: str) -> dict[str, Any]:
    """The front matter of a card, by the rules of the hub: https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.S)
    assert found is not None, "the card has no front matter"
    data: dict[str, Any] = yaml.safe_load(found[1])
    if data.get("license") == "other":
        assert re.fullmatch(r"[a-z0-9-.]+", data["license_name"]) and data["license_link"].startswith("https://")
    assert data.get("base_model_relation") in (None, "adapter", "finetune", "merge", "quantized")
    assert all(isinstance(tag, str) for tag in data["tags"])
    assert all(set(image) <= {"text", "output"} for image in data.get("widget", []))
    return data


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a stand-in in a thread."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
