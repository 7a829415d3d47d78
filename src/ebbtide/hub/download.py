"""From the hub to the cache: what a repository has, and its files, checked by their hashes.

The client is huggingface_hub's: its session (proxies, certificates), its headers (token), its
retries. Ours is what it does not do: a download that was cut short goes on where it stopped, in
another process too; nothing is used before its hash was right; and it can be cancelled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from ebbtide.cancellation import CancelToken, EbbtideThread
from ebbtide.errors import (
    AccessDeniedError,
    DownloadError,
    EbbtideError,
    ModelNotFoundError,
)
from ebbtide.hub.cache import COMMIT, FileInfo, Listing, Repository, usable
from ebbtide.hub.events import Bars, FileProgress, Listener, ProgressEvent

_AT_ONCE: Final = 4
_CHUNK: Final = 1 << 20
_RETRIES: Final = 5
_PATIENCE: Final = 1.0  # seconds between two looks at whether a lock is still wanted
_PAUSE: Final = 0.1  # seconds; doubled from one attempt that brought nothing to the next
_LIBRARY: Final = "ebbtide"
_NONSENSE: Final = (ValueError, TypeError, LookupError, AttributeError)  # there was an answer
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ResultT = TypeVar("ResultT")

Token = str | bool | None


class Hub:
    """One model on the hub.

    Args:
        repository: Its place in the cache.
        revision: A branch, a tag or a commit.
        token: What opens private and gated models; None for the one that is saved or in
            ``HF_TOKEN``, False for none.
    """

    def __init__(self, repository: Repository, revision: str, token: Token) -> None:
        self._repository = repository
        self._revision = revision
        self._token = token
        self._model = repository.model

    def look_up(self, token: CancelToken) -> tuple[str, Listing]:
        """The commit that the revision is, and every file of it.

        Raises:
            ModelNotFoundError: There is no such model or revision.
            AccessDeniedError: The model is gated or private.
            DownloadError: The hub cannot be reached, or answers with an error.
            PipelineCancelledError: The token was cancelled.
        """
        from huggingface_hub import HfApi, constants

        api = HfApi(endpoint=constants.ENDPOINT, library_name=_LIBRARY)

        def ask() -> tuple[str, Listing]:
            info = api.model_info(
                self._model,
                revision=self._revision,
                files_metadata=True,
                token=self._token,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            return _understood(info)

        try:
            commit, files = _aside(ask, token)
        except Exception as error:
            raise self._translated(error, None) from None
        with contextlib.suppress(OSError):  # a cache that is read-only may hold all that is needed
            self._repository.remember(commit, files)
        return commit, files

    def fetch(
        self, commit: str, files: Sequence[FileInfo], listener: Listener, token: CancelToken
    ) -> None:
        """Download files into the cache; several at a time, on threads of their own.

        Events are told on this thread. A cancellation, or an error of the listener's, is raised at
        once; what came so far stays, and the next download goes on from there.

        Raises:
            DownloadError: A file did not come, is not what it should be, or cannot be written.
            AccessDeniedError: The model is gated or private.
            PipelineCancelledError: The token was cancelled.
        """
        told: queue.SimpleQueue[_News | None] = queue.SimpleQueue()
        work: queue.SimpleQueue[FileInfo] = queue.SimpleQueue()
        for file in files:
            work.put(file)
        stopped = CancelToken(self._model)

        def wake() -> None:
            told.put(None)

        token.attach(wake)
        try:
            for number in range(min(_AT_ONCE, len(files))):
                EbbtideThread(
                    target=self._work, args=(commit, work, told, stopped),
                    name=f"ebbtide-download-{number}", daemon=True,
                ).start()  # fmt: skip
            _listen(self._model, files, told, listener, token)
        finally:
            stopped.cancel()
            if isinstance(listener, Bars):
                listener.close()
            token.detach(wake)

    def _work(
        self,
        commit: str,
        work: queue.SimpleQueue[FileInfo],
        told: queue.SimpleQueue[_News | None],
        stopped: CancelToken,
    ) -> None:
        while not stopped.cancelled:
            try:
                file = work.get_nowait()
            except queue.Empty:
                return
            try:
                self._download(commit, file, told, stopped)
                told.put(_News(file, file.size, done=True))
            except Exception as error:
                told.put(_News(file, 0, error=self._translated(error, file)))
                return

    def _download(
        self,
        commit: str,
        file: FileInfo,
        told: queue.SimpleQueue[_News | None],
        stopped: CancelToken,
    ) -> None:
        blob = self._repository.blob(file)
        lock = self._repository.lock(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock, stopped):  # another process may be downloading the same
            if (self._repository.snapshot(commit) / file.name).is_file():
                return
            if not blob.exists():
                part = blob.with_name(f"{blob.name}.ebbtide-part")
                _check_space(part, file)
                try:
                    self._stream(commit, file, part, told, stopped)
                except OSError as error:
                    if error.errno in _FULL:
                        part.unlink(missing_ok=True)  # who has no room keeps no half of a file
                    raise
                _check_hash(part, file, self._model)
                os.replace(part, blob)
            self._repository.place(file, commit)

    def _stream(
        self,
        commit: str,
        file: FileInfo,
        part: Path,
        told: queue.SimpleQueue[_News | None],
        stopped: CancelToken,
    ) -> None:
        """Append to the part of a file that is there what is missing of it."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self._model, file.name, revision=commit, endpoint=constants.ENDPOINT)
        headers = build_hf_headers(token=self._token, library_name=_LIBRARY)
        headers["Accept-Encoding"] = "identity"  # a part's bytes must be the file's
        left = _RETRIES
        with part.open("ab") as out:
            if out.tell() > file.size:
                _empty(out)
            while out.tell() < file.size:
                stopped.check()
                have = out.tell()
                told.put(_News(file, have))
                wanted = {**headers, "Range": f"bytes={have}-"} if have else headers
                try:
                    with http_stream_backoff(
                        "GET", url, headers=wanted, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                        follow_redirects=True, retry_on_exceptions=(),
                        retry_on_status_codes=(408, 429),
                    ) as response:  # fmt: skip
                        if have and response.status_code in (200, 416):
                            _empty(out)  # the server sends all of it, or has no such part
                        hf_raise_for_status(response)
                        for chunk in response.iter_bytes():
                            stopped.check()
                            out.write(chunk)
                            told.put(_News(file, out.tell()))
                            if out.tell() > file.size:
                                break
                except (OSError, EbbtideError):
                    raise
                except Exception:  # the connection; what came before it broke is kept
                    out.flush()
                    left = _RETRIES if out.tell() > have else left - 1
                    if left < 1:
                        raise
                    if out.tell() == have:
                        time.sleep(_PAUSE * 2 ** (_RETRIES - left))
                    continue
                if out.tell() != file.size:
                    size = out.tell()
                    _empty(out)
                    raise DownloadError(
                        f"{file.name} of model {self._model!r} came with {size:,} bytes in place of"
                        f" {file.size:,}, and was thrown away. Try again.",
                        model=self._model, file=file.name,
                    )  # fmt: skip

    def _translated(self, error: Exception, file: FileInfo | None) -> EbbtideError:
        """What went wrong, in our own words; the client's name the address, never a token."""
        from huggingface_hub import constants, errors

        if isinstance(error, EbbtideError):
            return error
        name = file.name if file else None
        what = f"{name} of model {self._model!r}" if name else f"Model {self._model!r}"
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        where = constants.ENDPOINT
        if isinstance(error, errors.GatedRepoError):
            return AccessDeniedError(
                f"{what} is gated: accept its conditions at {where}/{self._model}, then pass"
                " token=, set HF_TOKEN, or log in with `hf auth login`.",
                model=self._model, file=name, status=status,
            )  # fmt: skip
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelNotFoundError(
                f"Model {self._model!r} has no revision {self._revision!r} on {where}.",
                model=self._model,
            )
        if isinstance(error, errors.EntryNotFoundError):
            return ModelNotFoundError(
                f"{what} is not on {where}.", model=self._model, missing=(name or "",)
            )
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            return ModelNotFoundError(
                f"There is no model {self._model!r} on {where}, or it is private: then pass token=,"
                " set HF_TOKEN, or log in with `hf auth login`.",
                model=self._model,
            )
        if status in (401, 403):
            return AccessDeniedError(
                f"{what} was refused by {where} ({status}): the token is wrong or may not read it."
                " Pass another as token=, or log in again with `hf auth login`.",
                model=self._model, file=name, status=status,
            )  # fmt: skip
        if status == 429:
            return DownloadError(
                f"{where} has had too many requests from here (429). Wait a while and try again, or"
                " pass a token, which has a higher limit.",
                model=self._model, file=name, status=status,
            )  # fmt: skip
        if status is not None:
            return DownloadError(
                f"{what} could not be had: {where} answered with an error of its own ({status})."
                " Try again later.",
                model=self._model, file=name, status=status,
            )  # fmt: skip
        if isinstance(error, OSError) and error.errno in _FULL:
            return _no_space(self._repository.root, file, self._model)
        if isinstance(error, errors.LocalTokenNotFoundError):
            return AccessDeniedError(
                f"{what}: token=True asks for the token that is saved, and there is none. Log in"
                " with `hf auth login`, set HF_TOKEN, or pass the token itself.",
                model=self._model, file=name,
            )  # fmt: skip
        if isinstance(error, OSError) and error.errno is not None and file is not None:
            return DownloadError(
                f"{what} cannot be written to the cache: {error}. Set HF_HUB_CACHE or pass"
                " cache_dir= to use another folder.",
                model=self._model, file=name,
            )  # fmt: skip
        told = "" if "bearer" in str(error).lower() else f": {error}"  # a header, with the token
        return DownloadError(
            f"{what} could not be had from {where}: {type(error).__name__}{told}. Is there a"
            " connection, and is HF_ENDPOINT right? A model that is cached works without one.",
            model=self._model, file=name,
            unreachable=not isinstance(error, _NONSENSE),
        )  # fmt: skip


class _News:
    """What a download thread tells: so many bytes of a file are there."""

    __slots__ = ("done", "error", "file", "loaded")

    def __init__(
        self, file: FileInfo, loaded: int, *, done: bool = False, error: EbbtideError | None = None
    ) -> None:
        self.file = file
        self.loaded = loaded
        self.done = done
        self.error = error


def _listen(
    model: str,
    files: Sequence[FileInfo],
    told: queue.SimpleQueue[_News | None],
    listener: Listener,
    token: CancelToken,
) -> None:
    """Pass on what the download threads tell, until all files are there."""
    state: dict[str, FileProgress] = {}
    for file in files:
        listener(ProgressEvent(status="initiate", name=model, file=file.name))
        state[file.name] = FileProgress(loaded=0, total=file.size)
    started: set[str] = set()
    waiting = len(files)
    while waiting:
        news = told.get()
        token.check()
        if news is None:
            continue
        error = news.error
        if error is not None:
            try:
                raise error
            finally:
                del error, news  # else the error, its traceback and this frame are a cycle
        name = news.file.name
        if name not in started:
            started.add(name)
            listener(ProgressEvent(status="download", name=model, file=name))
            state[name]["loaded"] = -1
        if news.loaded != state[name]["loaded"]:
            state[name]["loaded"] = news.loaded
            one = ProgressEvent(status="progress", name=model, file=name)
            listener(_progress(one, [state[name]]))
            so_far = {key: part.copy() for key, part in state.items()}
            total = ProgressEvent(status="progress_total", name=model, files=so_far)
            listener(_progress(total, list(state.values())))
        if news.done:
            waiting -= 1
            listener(ProgressEvent(status="done", name=model, file=news.file.name))


def _aside(function: Callable[[], ResultT], token: CancelToken) -> ResultT:
    """Run what may wait for the network on a thread of its own, so that a cancel ends the wait."""
    told: queue.SimpleQueue[tuple[ResultT | None, Exception | None] | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            told.put((function(), None))
        except Exception as error:
            told.put((None, error))

    def wake() -> None:
        told.put(None)

    token.attach(wake)
    try:
        EbbtideThread(target=run, name="ebbtide-download", daemon=True).start()
        found = told.get()
    finally:
        token.detach(wake)
    token.check()
    assert found is not None
    result, error = found
    if error is not None:
        try:
            raise error
        finally:
            del error, found  # else the error, its traceback and this frame are a cycle
    return result  # type: ignore[return-value]


def _understood(info: Any) -> tuple[str, Listing]:
    """The commit and its files, of what the client made of the hub's answer.

    Raises:
        ValueError: The answer does not say what is needed of it.
    """
    files = {}
    for one in info.siblings or ():
        hashed = one.lfs.sha256 if one.lfs else one.blob_id
        size = one.lfs.size if one.lfs else one.size
        if hashed and usable(one.rfilename, hashed):
            files[one.rfilename] = FileInfo(one.rfilename, int(size or 0), hashed)
    if not COMMIT.fullmatch(str(info.sha)) or (not files and info.siblings != []):
        raise ValueError("the answer names no commit, or no file with its hash")
    return str(info.sha), files


@contextlib.contextmanager
def _locked(path: Path, stopped: CancelToken) -> Iterator[None]:
    """Hold the lock that all Hugging Face libraries take; wait for it no longer than is wanted."""
    from huggingface_hub.utils import WeakFileLock

    with contextlib.ExitStack() as stack:
        while True:
            stopped.check()
            try:
                stack.enter_context(WeakFileLock(path, timeout=_PATIENCE))
                break
            except TimeoutError:
                continue
        yield


def _progress(event: ProgressEvent, parts: Sequence[FileProgress]) -> ProgressEvent:
    event["loaded"] = sum(one["loaded"] for one in parts)
    event["total"] = sum(one["total"] for one in parts)
    event["progress"] = 100.0 * event["loaded"] / event["total"] if event["total"] else 100.0
    return event


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _check_hash(path: Path, file: FileInfo, model: str) -> None:
    if len(file.hash) == 64:
        digest: Any = hashlib.sha256()
    else:  # what git calls a blob
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != file.hash:
        path.unlink()
        raise DownloadError(
            f"{file.name} of model {model!r} is not what the hub says it is: its hash is {found},"
            f" and should be {file.hash}. It was thrown away: try again.",
            model=model,
            file=file.name,
        )


def _check_space(part: Path, file: FileInfo) -> None:
    there = part.stat().st_size if part.exists() else 0
    if shutil.disk_usage(part.parent).free < file.size - there:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))


def _no_space(root: Path, file: FileInfo | None, model: str) -> DownloadError:
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(root).free
    needs = f"{file.name} needs {file.size / 1e6:,.0f} MB, and " if file else ""
    return DownloadError(
        f"The disk of the cache {root} is full: {needs}{free / 1e6:,.0f} MB are free. Make room, or"
        " pass cache_dir= or set HF_HUB_CACHE to use another disk.",
        model=model,
        file=file.name if file else None,
    )
