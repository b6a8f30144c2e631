"""Where caches go."""

import sys
from pathlib import Path

import pytest

from edgeq.errors import EdgeqError
from edgeq.paths import cache_dir


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("EDGEQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_in_the_home_folder(home):
    system = Path("Library/Caches") if sys.platform == "darwin" else Path(".cache")
    assert cache_dir() == home / system / "edgeq"
    assert cache_dir("models", "x").is_dir()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has a folder of its own")
def test_where_the_standard_says(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache_dir("models") == home / "xdg" / "edgeq" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == home / ".cache" / "edgeq"


def test_where_the_user_says(home, monkeypatch):
    monkeypatch.setenv("EDGEQ_CACHE", str(home / "own"))
    assert cache_dir("models") == home / "own" / "models"


def test_a_place_that_cannot_be_made(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("EDGEQ_CACHE", str(home / "file"))
    with pytest.raises(EdgeqError, match="Name one in the environment variable EDGEQ_CACHE"):
        cache_dir("models")
