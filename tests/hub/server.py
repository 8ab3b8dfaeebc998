"""The HTTP interface of the Hub that its client uses, in memory and on this machine only.

Repositories of models and data sets with branches, commits and large files (LFS), for `huggingface_hub`'s own client. What
it answers, statuses and headers among it, follows what that client reads.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USERS = {"token-of-me": "me", "token-of-you": "you"}
LARGE = (".safetensors",)


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on top of a branch, named by what it holds and its parent."""
        digest = hashlib.sha1(self.branches[branch].encode())
        for name in sorted(files):
            digest.update(name.encode() + hashlib.sha1(files[name]).digest())
        self.branches[branch] = digest.hexdigest()
        self.commits[self.branches[branch]] = dict(files)
        return self.branches[branch]


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class Hub:
    """A running server; `with Hub() as hub` stops it at the end.

    `faults` holds (method, pattern of the path, status) of requests that are to fail, each once; the status 0 closes
    the connection without an answer. `large` is asked by path whether a file goes over LFS.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[tuple[str, str, int]] = []
        self.requests: list[str] = []
        self.large = LARGE
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def publish(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", private: bool = False) -> str:
        """Put any files at any paths, as no client would."""
        repository = self.repositories.setdefault((repo_type, repo_id), Repository(private))
        return repository.commit({**repository.commits[repository.branches["main"]], **files})

    def files(self, repo_id: str, repo_type: str = "model", branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_type, repo_id]
        return repository.commits[repository.branches[branch]]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def respond(self, status: int, content: object = b"", headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = headers or {}
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self):
        address = urlsplit(self.path)
        path, body = unquote(address.path), self.body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            fault = next((f for f in self.hub.faults if f[0] == self.command and re.search(f[1], path)), None)
            if fault is not None:
                self.hub.faults.remove(fault)
                if fault[2] == 0:
                    self.close_connection = True
                    return self.connection.close()
                return self.respond(fault[2], {"error": "broken on purpose"})
            try:
                for method, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        return action(self, body, **match.groupdict())
                raise Refused(404, f"No such page: {path}", "EntryNotFound")
            except Refused as refused:
                headers = {"X-Error-Message": refused.message}
                headers |= {"X-Error-Code": refused.code} if refused.code else {}
                return self.respond(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    # Who asks, and for what

    def user(self) -> str | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, kind: str, repo: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get(("dataset" if kind.startswith("dataset") else "model", repo))
        owner, user = repo.split("/")[0], self.user()
        if found is None or (found.private and user != owner):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refused(403, f"You have no write access to {repo}")
        return found

    def commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, f"No revision {revision}", "RevisionNotFound")
        return commit

    # The pages

    def create(self, body):
        wanted, user = json.loads(body), self.user()
        owner, kind = wanted["organization"] or user, wanted.get("type", "model")
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if owner != user:
            raise Refused(403, f"You have no rights to create a repository in {owner}")
        name = f"{owner}/{wanted['name']}"
        status = 409 if (kind, name) in self.hub.repositories else 200
        if status == 200:
            created = self.hub.repositories[kind, name] = Repository(wanted.get("visibility") == "private")
            created.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        prefix = "datasets/" if kind == "dataset" else ""
        self.respond(status, {"url": f"{self.hub.url}/{prefix}{name}", "id": name})

    def validate(self, body):
        """The card's metadata; of a model it has to name what the widget needs, with a known spelling."""
        wanted = json.loads(body)
        data = yaml.safe_load(wanted["content"].split("---")[1])
        problems = [] if isinstance(data, dict) else ["metadata is no mapping"]
        if not problems:
            tags = data.get("tags")
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                problems.append("tags must be a list of strings")
            if wanted["repoType"] == "model" and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.get("base_model"))):
                problems.append("base_model must be a repository")
            if "license" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license"])):
                problems.append("license is unknown")
        errors = [{"message": problem} for problem in problems]
        self.respond(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, body, kind, repo, name):
        repository = self.repository(kind, repo, write=True)
        if name in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        self.respond(201)

    def info(self, body, kind, repo, revision="main"):
        repository = self.repository(kind, repo)
        commit = self.commit_of(repository, revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        self.respond(200, {"id": repo, "sha": commit, "private": repository.private, "siblings": siblings})

    def tree(self, body, kind, repo, revision):
        repository = self.repository(kind, repo)
        files = repository.commits[self.commit_of(repository, revision)]
        self.respond(200, [{"type": "file", "path": name, **self.entry(name, data)} for name, data in files.items()])

    def entry(self, name: str, data: bytes) -> dict:
        if not name.endswith(self.hub.large):
            return {"size": len(data), "oid": git_digest(data)}
        oid = hashlib.sha256(data).hexdigest()
        return {
            "size": len(data),
            "oid": git_digest(oid.encode()),
            "lfs": {"oid": oid, "size": len(data), "pointerSize": 1},
        }

    def preupload(self, body, kind, repo, revision):
        repository = self.repository(kind, repo, write=True)
        held = repository.commits[self.commit_of(repository, revision)]
        files = []
        for wanted in json.loads(body)["files"]:
            large = wanted["path"].endswith(self.hub.large)
            file = {"path": wanted["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if wanted["path"] in held:
                data = held[wanted["path"]]
                file["oid"] = hashlib.sha256(data).hexdigest() if large else git_digest(data)
            files.append(file)
        self.respond(200, {"files": files})

    def batch(self, body, kind, repo):
        self.repository(kind or "model", repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/storage/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.stored else {"actions": actions})})
        self.respond(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The content is not what its name says")
        self.hub.stored[oid] = body
        self.respond(200)

    def commit(self, body, kind, repo, revision):
        repository = self.repository(kind, repo, write=True)
        files = dict(repository.commits[self.commit_of(repository, revision)])
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, revision)
        self.respond(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, body, kind, repo, revision, name):
        repository = self.repository(kind or "model", repo)
        commit = self.commit_of(repository, revision)
        files = repository.commits[commit]
        if name not in files:
            raise Refused(404, f"No file {name}", "EntryNotFound")
        data, entry = files[name], self.entry(name, files[name])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Content-Length": str(len(data))}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        self.respond(200, data, headers)


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_PAGE = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("POST",), _API + r"/branch/(?P<name>.+)", Handler.branch),
    (("POST",), _API + r"/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), _API + r"/commit/(?P<revision>.+)", Handler.commit),
    (("GET",), _API + r"/tree/(?P<revision>[^/]+)", Handler.tree),
    (("GET",), _API + r"(?:/revision/(?P<revision>.+))?", Handler.info),
    (("POST",), _PAGE + r"\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/storage/(?P<oid>\w+)", Handler.store),
    (("GET", "HEAD"), _PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]
