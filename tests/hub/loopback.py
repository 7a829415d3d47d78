"""A small model hub on loopback: what huggingface_hub's client asks for, and what can go wrong.

    with Hub() as hub:
        commit = hub.add("org/name", {"config.json": b"{}", "m.onnx": b"..."}, lfs=("m.onnx",))
        hub.fault("/cdn/*/m.onnx", cut_after=1)
        run(script, env={**os.environ, **hub.environment(tmp_path / "cache")})
        assert hub.requests[0] == ("GET", "/api/models/org/name", None, False)

The hub is at ``127.0.0.1``. Large files (``lfs``) are answered with a redirect to the same port at
``localhost``, which is another host to a client, and must not be shown the client's token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import re
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(
    r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<what>revision|tree|refs|auth-check)(?:/(?P<rest>.+))?)?"
)
_CDN = re.compile(r"/cdn/(?P<sha256>[0-9a-f]{64})/.+")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_LARGE = ("*.onnx", "*.onnx_data*", "*.bin", "*.safetensors")
_DATE = "2024-01-01T00:00:00.000Z"
_PATIENCE = 10.0


class Request(NamedTuple):
    """A request as it came.

    Attributes:
        method: ``GET`` or ``HEAD``.
        path: As it was sent, with its query. What is asked of the CDN begins with ``/cdn/``.
        range: The Range header.
        authorised: Whether there was an Authorization header.
    """

    method: str
    path: str
    range: str | None
    authorised: bool


@dataclasses.dataclass(eq=False)
class Fault:
    """Something that goes wrong; see `Hub.fault`.

    Attributes:
        hits: How many requests it has hit.
        reached: Set when a request is held or stalled here.
        release: Lets held and stalled requests go on. A hub that closes sets it too, and ends them.
    """

    pattern: str
    times: int | None
    method: str | None
    status: int | None
    headers: Mapping[str, str]
    body: bytes
    refuse: bool
    hold: bool
    cut_after: int | None
    reset: bool
    stall_after: int | None
    flip: int | None
    ignore_range: bool
    release: threading.Event
    hits: int = 0
    reached: threading.Event = dataclasses.field(default_factory=threading.Event)

    def end(self) -> None:
        """Hit no further request, and release those that are held or stalled."""
        self.times = 0
        self.release.set()

    @property
    def _of_body(self) -> bool:
        cut = self.cut_after is not None or self.stall_after is not None
        return cut or self.flip is not None or self.ignore_range

    def _hits(self, request: Request, answer: _Answer) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        if self.method not in (None, request.method) or (self.ignore_range and not request.range):
            return False
        if self._of_body and (request.method != "GET" or answer.status != 200):
            return False
        return fnmatch.fnmatchcase(unquote(urlsplit(request.path).path), self.pattern)


class Hub:
    """The hub; it listens from the start until `close`.

    Attributes:
        endpoint: Its address, for ``HF_ENDPOINT`` and ``endpoint=``.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._requests: list[Request] = []
        self._encodings: set[str | None] = set()
        self._faults: list[Fault] = []
        self._errors: list[BaseException] = []
        self._models: dict[str, _Model] = {}
        self._renamed: dict[str, str] = {}
        self._tokens: set[str] = set()
        self._large: dict[str, bytes] = {}
        self._server = _Server(self)
        self._port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._accepting = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="hub", daemon=True
        )
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End every connection and thread, also those that are held, stalled or idle.

        Raises:
            RuntimeError: A thread did not end, or the hub itself failed at a request.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for fault in self._faults:
                fault.release.set()
        self._server.shutdown()
        self._accepting.join(_PATIENCE)
        left = self._server.end_connections()
        self._server.server_close()
        if left:
            raise RuntimeError(f"threads of the hub did not end: {left}")
        if self._errors:
            raise RuntimeError("the hub failed at a request") from self._errors[0]

    # What there is

    def add(
        self,
        model: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        lfs: Iterable[str] = (),
    ) -> str:
        """Commit to a branch; earlier commits stay. The commit is its hash, as git computes it.

        Args:
            model: Its id. A model that is not there is made, and is public.
            files: All files of the commit, not only those that changed.
            revision: The branch; made if it is not there.
            lfs: Names, or patterns of names, of the files that the CDN has.
        """
        patterns = tuple(lfs)
        made = {
            name: _File.of(content, any(fnmatch.fnmatchcase(name, one) for one in patterns))
            for name, content in files.items()
        }
        with self._changed:
            there = self._models.setdefault(model, _Model())
            parent = there.branches.get(revision)
            folders = _folders(made)
            if parent is not None and there.commits[parent].folders[""] == folders[""]:
                return parent
            above = f"parent {parent}\n" if parent else ""
            who = "hub <hub@localhost> 1704067200 +0000"
            text = f"tree {folders['']}\n{above}author {who}\ncommitter {who}\n\nUpload\n"
            commit = _git("commit", text.encode())
            there.commits[commit] = _Commit(made, folders)
            there.branches[revision] = commit
            self._large.update((one.sha256, one.content) for one in made.values() if one.lfs)
        return commit

    def add_folder(
        self, model: str, path: Path, *, revision: str = "main", lfs: Iterable[str] = _LARGE
    ) -> str:
        """Commit every file of a folder; see `add`."""
        files = {
            one.relative_to(path).as_posix(): one.read_bytes()
            for one in sorted(path.rglob("*"))
            if one.is_file()
        }
        return self.add(model, files, revision=revision, lfs=lfs)

    def tag(self, model: str, name: str, revision: str = "main") -> str:
        """Tag a commit, and return it."""
        with self._changed:
            there = self._models[model]
            commit = there.find(revision)
            assert commit is not None, f"{model} has no revision {revision}"
            there.tags[name] = commit
        return commit

    def rename(self, old: str, new: str) -> None:
        """Rename a model; requests for its old name are redirected."""
        with self._changed:
            self._models[new] = self._models.pop(old)
            self._renamed[old] = new

    # Who may have it

    def account(self, token: str) -> None:
        """Know a token; of itself it opens nothing. All other tokens are refused everywhere."""
        with self._changed:
            self._tokens.add(token)

    def private(self, model: str, token: str) -> None:
        """Hide a model from all but this token; to the others there is no such model."""
        with self._changed:
            self._models[model].private = True
            self._admit(model, token)

    def gated(self, model: str, allowed_token: str | None = None) -> None:
        """Give a model's files to nobody but this token; what files it has can be seen by all."""
        with self._changed:
            self._models[model].gated = True
            self._admit(model, allowed_token)

    # What goes wrong

    def fault(
        self,
        pattern: str,
        *,
        times: int | None = 1,
        method: Literal["GET", "HEAD"] | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"The hub is at fault",
        refuse: bool = False,
        hold: bool = False,
        cut_after: int | None = None,
        reset: bool = False,
        stall_after: int | None = None,
        flip: int | None = None,
        ignore_range: bool = False,
        release: threading.Event | None = None,
    ) -> Fault:
        """Let requests go wrong. A request is hit by one fault: the first that is not used up.

        Args:
            pattern: Of the path, without its query and unquoted; ``*`` matches slashes too. Those
                of large files are ``/<id>/resolve/<revision>/<file>``, which redirects, and
                ``/cdn/<sha256>/<id>/<file>``, which has the content.
            times: How many requests are hit; None for all.
            method: Of the requests that are hit; None for both.
            status: Answer with this status, these ``headers`` and this ``body``.
            refuse: Close the connection without an answer.
            hold: Answer only when `Fault.release` is set.
            cut_after: Close the connection after so many bytes of the answer's body.
            reset: Cut by a reset in place of a close.
            stall_after: After so many bytes of the answer's body, wait for `Fault.release`.
            flip: Flip a bit in this byte of the file, and leave the headers as they are.
            ignore_range: Answer a request for a part of a file with all of it.
            release: An event of the caller's in place of the fault's own.

        ``cut_after``, ``stall_after``, ``flip`` and ``ignore_range`` hit answers with content only:
        neither HEAD nor redirects nor refusals.
        """
        fault = Fault(
            pattern, times, method, status, headers or {}, body, refuse, hold, cut_after, reset,
            stall_after, flip, ignore_range, release or threading.Event(),
        )  # fmt: skip
        assert fault._of_body or status or refuse or hold, "a fault in which nothing goes wrong"
        with self._changed:
            self._faults.append(fault)
        return fault

    # What was asked

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order they came."""
        with self._changed:
            return list(self._requests)

    @property
    def leaked(self) -> list[Request]:
        """The requests that showed a token to the CDN."""
        return [one for one in self.requests if one.authorised and one.path.startswith("/cdn/")]

    @property
    def encodings(self) -> set[str | None]:
        """How files may be encoded for those who asked for them: the Accept-Encoding headers."""
        with self._changed:
            return set(self._encodings)

    def wait_for(
        self, predicate: Callable[[list[Request]], object], timeout: float = _PATIENCE
    ) -> list[Request]:
        """Wait until the requests so far are as wanted, and return them.

        Raises:
            TimeoutError: They are not in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(list(self._requests)), timeout):
                raise TimeoutError(f"not within {timeout} s; requests so far: {self._requests}")
            return list(self._requests)

    def environment(
        self, cache_dir: Path, *, token: str | None = None, timeout: int = 2
    ) -> dict[str, str]:
        """Variables for a process whose client is to use this hub, to be put over `os.environ`.

        Args:
            cache_dir: Becomes ``HF_HUB_CACHE``. ``HF_HOME`` is a sibling of it.
            token: Becomes ``HF_TOKEN``; None empties it, which is the same as none.
            timeout: Whole seconds that the client waits for an answer, and for more of a file.
        """
        home = cache_dir.with_name(f"{cache_dir.name}.home")
        here = "127.0.0.1,localhost"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_CACHE": str(cache_dir),
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "HF_TOKEN_PATH": str(home / "token"),
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(timeout),
            "HF_HUB_ETAG_TIMEOUT": str(timeout),
            "NO_PROXY": here,
            "no_proxy": here,
        }

    # How requests are answered

    def _admit(self, model: str, token: str | None) -> None:
        if token is not None:
            self._tokens.add(token)
            self._models[model].readers.add(token)

    def _meet(self, request: Request, headers: Mapping[str, str]) -> tuple[_Answer, Fault | None]:
        """Log a request, and find its answer and the fault that hits it."""
        host, authorization = headers.get("Host", ""), headers.get("Authorization")
        with self._changed:
            if self._closed:
                raise ConnectionAbortedError("the hub closes")
            self._requests.append(request)
            if not request.path.startswith("/api/"):
                self._encodings.add(headers.get("Accept-Encoding"))
            self._changed.notify_all()
            answer = self._answer(request, host, authorization)
            hitting = (one for one in self._faults if one._hits(request, answer))
            fault = next(hitting, None)
            if fault:
                fault.hits += 1
        return answer, fault

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._errors.append(error)

    def _answer(self, request: Request, host: str, authorization: str | None) -> _Answer:
        path, query = urlsplit(request.path).path, urlsplit(request.path).query
        if host.partition(":")[0] == "localhost":
            found = _CDN.fullmatch(path)
            content = self._large.get(found["sha256"]) if found else None
            if found is None or content is None:
                return _refusal(404, "The CDN has no such file")
            return _Answer(200, content, {"ETag": f'"{found["sha256"]}"'}, ranges=True)
        scheme, _, token = (authorization or "").partition(" ")
        if authorization is not None and (scheme != "Bearer" or token not in self._tokens):
            return _refusal(401, "Invalid credentials in Authorization header")
        resolve, api = _RESOLVE.fullmatch(path), _API.fullmatch(path)
        asked = api or resolve
        if asked is None:
            return _refusal(404, "Sorry, we can't find the page you are looking for.")
        name = asked["id"]
        if name in self._renamed:
            target = request.path.replace(name, self._renamed[name], 1)
            return _Answer(307, f"Redirecting to {target}".encode(), {"Location": target})
        model = self._models.get(name)
        if model is None or (model.private and token not in model.readers):
            if not token:
                return _refusal(401, "Invalid username or password.", "RepoNotFound")
            return _refusal(404, "Repository not found", "RepoNotFound")
        closed = model.gated and token not in model.readers
        if closed and (api is None or api["what"] == "auth-check"):
            restricted = f"Access to model {name} is restricted"
            message = (
                f"{restricted} and you are not in the authorized list. Visit"
                f" {self.endpoint}/{name} to ask for access."
                if token
                else f"{restricted}. You must have access to it and be authenticated to access it."
                " Please log in."
            )
            return _refusal(403 if token else 401, message, "GatedRepo")
        if api is not None:
            return self._answer_api(name, model, api, parse_qs(query))
        assert resolve is not None
        revision, wanted = unquote(resolve["revision"]), unquote(resolve["file"])
        sha = model.find(revision)
        if sha is None:
            return _refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = {"X-Repo-Commit": sha}
        file = model.commits[sha].files.get(wanted)
        if file is None:
            return _refusal(404, "Entry not found", "EntryNotFound", commit)
        if not file.lfs:
            return _Answer(200, file.content, {**commit, "ETag": f'"{file.oid}"'}, ranges=True)
        target = f"http://localhost:{self._port}/cdn/{file.sha256}/{quote(f'{name}/{wanted}')}"
        size, etag = str(len(file.content)), f'"{file.sha256}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": size, "Accept-Ranges": "bytes"}
        headers = {**commit, **linked, "ETag": f'"{file.oid}"', "Location": target}
        return _Answer(302, f"Found. Redirecting to {target}".encode(), headers)

    def _answer_api(
        self, name: str, model: _Model, api: re.Match[str], query: dict[str, list[str]]
    ) -> _Answer:
        def yes(option: str) -> bool:
            return query.get(option, [""])[-1].lower() in ("true", "1")

        what, rest = api["what"], api["rest"]
        if what == "auth-check":
            return _Answer(200, b"OK")
        if what == "refs":
            refs = {
                kind: [
                    {"name": one, "ref": f"refs/{place}/{one}", "targetCommit": commit}
                    for one, commit in named.items()
                ]
                for kind, place, named in (
                    ("branches", "heads", model.branches),
                    ("tags", "tags", model.tags),
                )
            }
            return _json({**refs, "converts": [], "pullRequests": []})
        quoted, _, inside = (rest or "main").partition("/")
        revision, folder = unquote(quoted), unquote(inside).strip("/")
        sha = model.find(revision)
        if sha is None:
            return _refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = model.commits[sha]
        if what == "tree":
            if folder not in commit.folders:
                missing = f"{folder} does not exist on {revision}"
                return _refusal(404, missing, "EntryNotFound", {"X-Repo-Commit": sha})
            return _json(commit.tree(folder, yes("recursive"), sha if yes("expand") else None))
        about: dict[str, Any] = {
            "_id": sha[:24],
            "id": name,
            "modelId": name,
            "author": name.rpartition("/")[0] or None,
            "sha": sha,
            "createdAt": _DATE,
            "lastModified": _DATE,
            "private": model.private,
            "gated": "manual" if model.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "spaces": [],
            "siblings": [
                {"rfilename": one, **(file.blob() if yes("blobs") else {})}
                for one, file in sorted(commit.files.items())
            ],
        }
        if yes("securityStatus"):
            about["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
        if "expand" in query:
            kept = {"_id", "id", *query["expand"]}
            about = {key: value for key, value in about.items() if key in kept}
        return _json(about)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of a commit: its content, and its name in git (of the pointer, where it is large)."""

    content: bytes
    sha256: str
    oid: str
    lfs: bool
    pointer_size: int

    @classmethod
    def of(cls, content: bytes, lfs: bool) -> _File:
        sha256 = hashlib.sha256(content).hexdigest()
        version = "version https://git-lfs.github.com/spec/v1"
        pointer = f"{version}\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        return cls(content, sha256, _git("blob", pointer if lfs else content), lfs, len(pointer))

    def blob(self) -> dict[str, Any]:
        about: dict[str, Any] = {"size": len(self.content), "blobId": self.oid}
        if self.lfs:
            size = len(self.content)
            about["lfs"] = {"sha256": self.sha256, "size": size, "pointerSize": self.pointer_size}
        return about


@dataclasses.dataclass(frozen=True)
class _Commit:
    """The files of a commit, and its folders with their names in git; ``""`` is the root."""

    files: dict[str, _File]
    folders: dict[str, str]

    def tree(self, folder: str, recursive: bool, expanded: str | None) -> list[dict[str, Any]]:
        """What is in a folder; with the commit, where ``expanded`` is one."""
        last = {"id": expanded, "title": "Upload", "date": _DATE}
        listed: list[dict[str, Any]] = []
        for path in sorted({*self.folders, *self.files} - {"", folder}):
            parents = _parents(path)
            if (folder not in parents) if recursive else (folder != parents[0]):
                continue
            entry: dict[str, Any]
            if path in self.folders:
                entry = {"type": "directory", "oid": self.folders[path], "size": 0, "path": path}
            else:
                file = self.files[path]
                size = len(file.content)
                entry = {"type": "file", "oid": file.oid, "size": size, "path": path}
                if file.lfs:
                    pointer_size = file.pointer_size
                    entry["lfs"] = {"oid": file.sha256, "size": size, "pointerSize": pointer_size}
                if expanded:
                    scanned = {"status": "safe", "avScan": None, "pickleImportScan": None}
                    entry["securityFileStatus"] = scanned
            if expanded:
                entry["lastCommit"] = last
            listed.append(entry)
        return listed


@dataclasses.dataclass
class _Model:
    """A model: its commits, what names them, and who may have it."""

    commits: dict[str, _Commit] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: set[str] = dataclasses.field(default_factory=set)

    def find(self, revision: str) -> str | None:
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)


@dataclasses.dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ranges: bool = False


def _json(value: object) -> _Answer:
    return _Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _refusal(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> _Answer:
    plain = message.encode("ascii", "backslashreplace").decode()
    kind = {"Content-Type": "application/json", "X-Error-Message": plain}
    named = {"X-Error-Code": code} if code else {}
    body = json.dumps({"error": message}).encode()
    return _Answer(status, body, {**kind, **named, **(headers or {})})


def _part(answer: _Answer, wanted: str | None) -> _Answer:
    """The part of a file that a Range header asks for; all of it where the header says nothing."""
    found = _RANGE.fullmatch(wanted or "")
    if not answer.ranges or found is None or not any(found.groups()):
        return answer
    size = len(answer.body)
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return _Answer(416, b"", {**answer.headers, "Content-Range": f"bytes */{size}"})
    headers = {**answer.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return _Answer(206, answer.body[start:stop], headers, ranges=True)


def _git(kind: str, content: bytes) -> str:
    whole = b"%s %d\0%s" % (kind.encode(), len(content), content)
    return hashlib.sha1(whole, usedforsecurity=False).hexdigest()


def _parents(path: str) -> list[str]:
    """The folders that something is in, the innermost first; the last is ``""``, the root."""
    return ["" if str(one) == "." else str(one) for one in PurePosixPath(path).parents]


def _folders(files: Mapping[str, _File]) -> dict[str, str]:
    """The folders of a commit, and the trees that git makes of them."""
    paths = {""}.union(*(_parents(one) for one in files))
    trees: dict[str, str] = {}
    for folder in sorted(paths, key=lambda one: -len(_parents(one)) if one else 0):
        inside = {
            PurePosixPath(one).name + end: (mode, oid)
            for end, mode, named in (
                ("", "100644", {name: file.oid for name, file in files.items()}),
                ("/", "40000", trees),
            )
            for one, oid in named.items()
            if _parents(one)[0] == folder
        }
        lines = (
            f"{mode} {name.removesuffix('/')}".encode() + b"\0" + bytes.fromhex(oid)
            for name, (mode, oid) in sorted(inside.items())
        )
        trees[folder] = _git("tree", b"".join(lines))
    return trees


class _Server(ThreadingHTTPServer):
    """Serves a hub, and knows its connections and threads so as to end them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._serving: list[threading.Thread] = []
        self._to_reset: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the host's name
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name="hub-connection",
            daemon=True,
        )
        with self._lock:
            self._open.add(request)
            self._serving = [*(one for one in self._serving if one.is_alive()), thread]
            thread.start()

    def reset(self, connection: socket.socket) -> None:
        """Let a connection end with a reset."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with self._lock:
            self._to_reset.add(connection)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            reset = request in self._to_reset
            self._to_reset.discard(request)
            self._open.discard(request)
        if reset:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # else the client left
            self.hub._failed(error)

    def end_connections(self) -> Sequence[threading.Thread]:
        """End the connections, and return the threads that nevertheless go on."""
        with self._lock:
            threads = self._serving
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(_PATIENCE)
        return [one for one in threads if one.is_alive()]


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._do()

    def do_HEAD(self) -> None:
        self._do()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; the hub has its own log."""

    def _do(self) -> None:
        authorization = self.headers["Authorization"]
        wanted = self.headers["Range"]
        request = Request(self.command, self.path, wanted, authorization is not None)
        hub = self.server.hub
        answer, fault = hub._meet(request, self.headers)
        if fault is None:
            self._send(_part(answer, wanted))
            return
        if fault.hold:
            self._wait(fault)
        if fault.refuse:
            self.close_connection = True
            return
        if fault.status is not None:
            about = {"Content-Type": "text/plain", **fault.headers}
            self._send(_Answer(fault.status, fault.body, about))
            return
        if fault.flip is not None:
            content = bytearray(answer.body)
            content[fault.flip] ^= 1
            answer = dataclasses.replace(answer, body=bytes(content))
        self._send(answer if fault.ignore_range else _part(answer, wanted), fault)

    def _wait(self, fault: Fault) -> None:
        fault.reached.set()
        fault.release.wait()
        if self.server.hub._closed:
            raise ConnectionAbortedError("the hub closes")

    def _send(self, answer: _Answer, fault: Fault | None = None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = answer.body
        if fault is not None and fault.stall_after is not None:
            self.wfile.write(body[: fault.stall_after])
            self._wait(fault)
            body = body[fault.stall_after :]
        elif fault is not None and fault.cut_after is not None:
            body = body[: fault.cut_after]
            self.close_connection = True
        self.wfile.write(body)
        if fault is not None and fault.cut_after is not None and fault.reset:
            self.server.reset(self.connection)
