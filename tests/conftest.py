"""What tests share. Real data and weights lie beside the checkout; tests that need them skip where they are absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # small models: threads only wait for one another
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.pop("FLUID_DATA_DIR", None)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # slot budgets measured here are nobody else's

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} in a folder named shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return _shared("data")


@pytest.fixture(scope="session")
def stories() -> Path:
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers that spells bytes, as a folder."""
    from .tiny import save_model

    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_fluid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUID checkpoint, as a folder."""
    import fluid_model

    from .tiny import fluid_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "fluid"
    fluid_model.save(fluid_checkpoint(tau=(2.8, 1.0)), folder)
    return folder
