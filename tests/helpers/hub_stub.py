"""A stand-in for the Hub on this machine, which speaks as much of its HTTP interface as uploading and downloading take.

    with serving() as hub:             # and huggingface_hub talks to hub.url
        hub.tokens["secret"] = "alice"
        hub.repositories["alice/old"] = Repository({"main": {"README.md": b""}})

Written after what huggingface_hub sends: it parses nothing that the Hub would refuse, and refuses what the Hub refuses.
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
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Repository:
    """What the stub knows of a repository: the files of each branch, who may see them, the messages of its commits."""

    branches: dict[str, dict[str, bytes]]
    private: bool = False
    gated: str = ""  # "files" = they are only for those who were let in; "all" = so is the list of them
    commits: list[str] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        names = json.dumps(sorted((name, _sha(content)) for name, content in self.branches[branch].items()))
        return hashlib.sha1(names.encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or of a commit that is a branch's last."""
        return next((self.branches[b] for b in self.branches if revision in (b, self.sha(b))), None)


@dataclass
class Hub:
    """The state of the stub. `tokens`: token -> user; `requests`: (method, path) as they came."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of large files, by their hash
    requests: list[tuple[str, str]] = field(default_factory=list)
    fails_at: str = ""  # part of a path, at which the stub answers 500

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [request for request in self.requests if request[0] not in ("GET", "HEAD")]


class RefusedError(Exception):
    """An answer other than success: status, message and the code by which huggingface_hub knows the kind."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.code = status, code
        super().__init__(message)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a stub, and yield its state."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    do_GET = do_HEAD = do_POST = do_PUT = lambda self: self._answer()  # noqa: N815  (http.server's names)

    def log_message(self, *_) -> None:
        """Stay silent."""

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        try:
            if self.hub.fails_at and self.hub.fails_at in path:
                raise RefusedError(500, "out of order")
            for methods, pattern, answer in ROUTES:
                if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                    return answer(self, body, **match.groupdict())
            raise RefusedError(404, f"no such address: {path}")
        except RefusedError as error:
            codes = {"X-Error-Code": error.code} if error.code else {}
            self._send({"error": str(error)}, error.status, {"X-Error-Message": str(error)} | codes)

    def _send(self, content: dict | list | bytes = b"", status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(data)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who asks, for what -------------------------------------------------------------------------------------------

    def _user(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _repository(self, name: str, writing: bool = False) -> Repository:
        user = self._user()
        if writing and name.split("/")[0] != user:
            raise RefusedError(403, f"Forbidden: you have no write access to {name}")
        if name not in self.hub.repositories:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if self.hub.repositories[name].gated in ("all", "files" if "/resolve/" in self.path else "all"):
            raise RefusedError(403, f"Access to model {name} is restricted", "GatedRepo")
        return self.hub.repositories[name]

    def _files(self, name: str, revision: str) -> dict[str, bytes]:
        files = self._repository(name).files(revision)
        if files is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    # --- one method for each address ----------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> None:
        self._send({"name": self._user(), "type": "user", "orgs": []})

    def _info(self, body: bytes, name: str, revision: str | None = None) -> None:
        files, repository = self._files(name, revision or "main"), self.hub.repositories[name]
        branch = next(b for b in repository.branches if repository.branches[b] is files)
        siblings = [{"rfilename": path} for path in files]
        self._send({"id": name, "sha": repository.sha(branch), "private": repository.private, "siblings": siblings})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        entries = []
        for path, content in self._files(name, revision).items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _sha(content)[:40]}
            entries.append(entry | ({"lfs": {"oid": _sha(content), "size": len(content), "pointerSize": 134}}
                                    if _sha(content) in self.hub.objects else {}))  # fmt: skip
        self._send(entries)

    def _file(self, body: bytes, name: str, revision: str, path: str) -> None:
        files = self._files(name, revision)
        if path not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{_sha(files[path])[:40]}"', "X-Repo-Commit": revision}
        self._send(files[path], headers=headers)

    def _create(self, body: bytes) -> None:
        wanted, user = json.loads(body), self._user()
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        if name.split("/")[0] != user:
            raise RefusedError(
                403, f'You don\'t have the rights to create a model under the namespace "{name.split("/")[0]}"'
            )
        if name in self.hub.repositories:
            raise RefusedError(409, "You already created this model repo")
        private = wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository({"main": {".gitattributes": b"*.safetensors lfs\n"}}, private)
        self._send({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, writing=True)
        if revision in repository.branches:
            raise RefusedError(409, "Reference already exists")
        repository.branches[revision] = dict(repository.branches["main"])
        self._send({})

    def _validate(self, body: bytes) -> None:
        """Refuse a card as the Hub does: metadata that is no YAML, names that no model has, figures in another form."""
        head = yaml.safe_load(re.match(r"---\n(.*?\n)---\n", json.loads(body)["content"], re.DOTALL)[1])
        errors = []
        if (base := head.get("base_model")) is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors.append({"message": '"base_model" must be the name of a model'})
        for model in head.get("model-index", ()):
            if not model.get("name") or not all(
                {"type"} <= entry["task"].keys()
                and {"type", "name"} <= entry["dataset"].keys()
                and all({"type", "value"} <= metric.keys() for metric in entry["metrics"])
                for entry in model["results"]
            ):
                errors.append({"message": '"model-index" is malformed'})
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        self._repository(name, writing=True)
        self._files(name, revision)
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        self._send({"files": [{"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")],
                               "shouldIgnore": False} for f in files]})  # fmt: skip

    def _batch(self, body: bytes, name: str) -> None:
        self._repository(name, writing=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            actions["verify"] = {"href": f"{self.hub.url}/verify"}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.objects else {"actions": actions}))
        self._send({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        if _sha(body) != oid:
            raise RefusedError(400, "another file than was announced")
        self.hub.objects[oid] = body
        self._send()

    def _verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusedError(422, "not uploaded")
        self._send()

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, writing=True)
        files = dict(self._files(name, revision))
        message = ""
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise RefusedError(400, f"unknown operation {kind}")
        repository.branches[revision] = files
        repository.commits.append(message)
        sha = repository.sha(revision)
        self._send({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})


NAME, API = r"(?P<name>[\w.-]+/[\w.-]+)", r"/api/(?:models|datasets)/(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("GET", API, _Handler._info),
    ("GET", rf"{API}/revision/(?P<revision>.+)", _Handler._info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)", _Handler._tree),
    ("POST", rf"{API}/branch/(?P<revision>.+)", _Handler._branch),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", _Handler._preupload),
    ("POST", rf"{API}/commit/(?P<revision>.+)", _Handler._commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/objects/(?P<oid>\w+)", _Handler._put),
    ("POST", "/verify", _Handler._verify),
    ("GET HEAD", rf"/(?:datasets/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._file),
)
