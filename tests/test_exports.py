"""The public names are the documented ones, and the documented commands are the ones that exist."""

import re
from pathlib import Path

import click

import edgeq
from edgeq import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readme_documents_all_public_names() -> None:
    assert set(re.findall(r"`edgeq\.(\w+)", README)) == set(edgeq.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    for name in edgeq.__all__:
        assert getattr(edgeq, name).__doc__, name
    assert set(edgeq.__all__) <= set(dir(edgeq))


def test_the_readme_documents_all_verbs() -> None:
    table = README.partition("## What to type")[2].partition("\n\nMODEL")[0]
    named = set(re.findall(r"`(?:edgeq )?([a-z]+)[ `]", table))
    assert named == set(cli.edgeq.list_commands(click.Context(cli.edgeq)))
