"""As much of the Hugging Face Hub as uploads and downloads of a model need, in a thread of this process."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one may write to the models of `me`, the other to none. Both may read what is private."""

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """What is on the Hub; requests change it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.models: dict[str, dict[str, Files]] = {}
        """Files by revision, the newest last, by model. A revision is a commit hash."""
        self.private: set[str] = set()
        self.closed: dict[str, str] = {}
        """Why nobody may download a model, as the Hub names it."""
        self.full = False
        self.breaks = False
        """Whether the connection breaks while weights are downloaded."""
        self.large: Files = {}
        """Contents of large files, by SHA-256."""
        self.seen: list[str] = []
        """Method and path of each request."""
        self.invalid_cards: list[str] = []
        """Model cards without a header."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, model: str, **files: bytes) -> str:
        """Change files of a model, whose names are given with `__` for the dot, and return the new revision."""
        revisions = self.models.setdefault(model, {})
        before = next(reversed(revisions.values()), {})
        revision = hashlib.sha1(f"{model} {len(revisions)}".encode()).hexdigest()
        revisions[revision] = before | {name.replace("__", "."): content for name, content in files.items()}
        return revision

    def head(self, model: str) -> Files:
        return next(reversed(self.models[model].values()))


class Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr belongs to the tests."""

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def handle_any(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = self.path.partition("?")[0]
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return handler(self, **match.groupdict())
        return self.refuse(404, "no such route")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def may_write(self, owner: str) -> bool:
        if not self.token:
            self.refuse(401, "Unauthorized")
        elif self.token != WRITER or owner != "me":
            self.refuse(403, "Forbidden")
        return self.token == WRITER and owner == "me"

    def found(self, model: str, revision: str) -> tuple[str, Files] | None:
        """The commit and the files of a revision, or None, and the reason is the answer."""
        revisions = self.server.models.get(model)
        if revisions is None or (model in self.server.private and not self.token):
            self.refuse(401 if not self.token else 404, "RepoNotFound")
        elif model in self.server.closed:
            self.refuse(403, self.server.closed[model])
        else:
            commit = next(reversed(revisions), "") if revision == "main" else revision
            if commit in revisions:
                return commit, revisions[commit]
            self.refuse(404, "RevisionNotFound")
        return None

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted["organization"] or "me"
        model = f"{owner}/{wanted['name']}"
        if not self.may_write(owner):
            return
        status = 409 if model in self.server.models else 200
        if status == 200:
            self.server.models[model] = {}
            self.server.commit(model)
            if wanted.get("visibility") == "private":
                self.server.private.add(model)
        self.answer({"url": f"{self.server.endpoint}/{model}"}, status)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            self.server.invalid_cards.append(content)
        self.answer({"errors": [], "warnings": []})

    def preupload(self, model: str) -> None:
        if self.may_write(model.partition("/")[0]):
            names = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.answer(
                {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
            )

    def batch(self, model: str) -> None:
        objects = json.loads(self.body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.server.endpoint}/large/{each['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def put_large(self, oid: str) -> None:
        self.server.large[oid] = self.body
        self.answer({}, 413 if self.server.full else 200)

    def commit(self, model: str) -> None:
        files: Files = {}
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
        oid = self.server.commit(model, **files)
        self.answer({"commitUrl": f"{self.server.endpoint}/{model}/commit/{oid}", "commitOid": oid})

    def info(self, model: str, revision: str = "main") -> None:
        if found := self.found(model, revision):
            self.answer({"id": model, "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})

    def tree(self, model: str, revision: str) -> None:
        if found := self.found(model, revision):
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in found[1].items()
                ]
            )

    def resolve(self, model: str, revision: str, name: str) -> None:
        if found := self.found(model, revision):
            if name not in found[1]:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
            content = found[1][name]
            tag = hashlib.sha1(content).hexdigest()
            self.close_connection = self.server.breaks
            sent = content[:9] if self.server.breaks and self.command == "GET" else content
            self.answer(sent, ETag=f'"{tag}"', X_Repo_Commit=found[0], Content_Length=str(len(content)))
        return None


MODEL = r"(?P<model>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Request.create),
    ("POST", "/api/validate-yaml", Request.validate),
    ("POST", f"/api/models/{MODEL}/preupload/main", Request.preupload),
    ("POST", rf"/{MODEL}\.git/info/lfs/objects/batch", Request.batch),
    ("PUT", r"/large/(?P<oid>\w+)", Request.put_large),
    ("POST", f"/api/models/{MODEL}/commit/main", Request.commit),
    ("GET", f"/api/models/{MODEL}(/revision/(?P<revision>[^/]+))?", Request.info),
    ("GET", rf"/api/models/{MODEL}/tree/(?P<revision>\w+)", Request.tree),
    ("GET HEAD", rf"/{MODEL}/resolve/(?P<revision>[^/]+)/(?P<name>[\w.-]+)", Request.resolve),
]


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
