"""`ebbtide models` says what the cache has and what a load takes, and downloads and removes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hub.loopback import Hub

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture
def online(ebbtide_run: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """The command, with a hub of ours that has one model, and an empty cache."""
    with Hub() as hub:
        hub.add_folder("org/tiny", MODELS / "tiny-bert")
        environment = hub.environment(tmp_path / "cache")

        def run(*words: str, **more: Any) -> Any:
            return ebbtide_run(*words, **{**environment, **more})

        yield run


def test_a_model_is_shown_downloaded_listed_used_and_removed(online: Callable[..., Any]) -> None:
    assert "no model" in online("models").out
    before = json.loads(online("models", "show", "org/tiny", "--dtype", "q8", "--json").out)
    assert before["dtype"] == "q8"
    assert "fp32" in before["dtypes"]
    assert 0 < before["to_download"] < before["size"]
    after = json.loads(online("models", "download", "org/tiny", "--dtype", "q8", "--json").out)
    assert after["to_download"] == 0
    assert [one["name"] for one in after["files"]] == [one["name"] for one in before["files"]]
    [listed] = json.loads(online("models", "--json").out)
    assert (listed["name"], listed["dtypes"]) == ("org/tiny", ["q8"])
    assert listed["size"] >= after["size"]
    used = online(
        "run", "feature-extraction", "tide", "--model", "org/tiny", "--dtype", "q8",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert used.out.startswith("tide\t")
    assert json.loads(online("models", "remove", "org/tiny", "--json").out)["freed"] > 0
    assert online("models", "--json").out.strip() == "[]"


def test_what_is_shown_to_people_fits_a_terminal(online: Callable[..., Any]) -> None:
    online("models", "download", "org/tiny", "--dtype", "q8")
    for words in (("models",), ("models", "show", "org/tiny")):
        shown = online(*words, COLUMNS="80").out
        assert "org/tiny" in shown
        assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "org/none"), "no model 'org/none'"),
        (("show", "org/tiny", "--dtype", "q2"), "It has these dtypes: fp32"),
        (("show", "org/tiny", "--revision", "v9"), "no revision 'v9'"),
        (("show", "org/tiny", "--task", "fil-mask"), "Did you mean 'fill-mask'"),
        (("remove", "org/tiny"), "The cache has no model 'org/tiny'"),
        (("remove", "../tiny"), "A model's id is needed"),
    ],
)
def test_what_is_not_there_is_said(
    online: Callable[..., Any], words: tuple[str, ...], said: str
) -> None:
    ended = online("models", *words)
    assert ended.code != 0
    assert said in ended.err
    assert ended.out == ""
