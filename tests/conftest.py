"""What all tests share: hypothesis without deadlines, as speed is shown in benchmarks and never asserted in a test; a finished run's model.

CI tries the same examples each time, so that its verdict is about the change; everywhere else they are new ones.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("finetune", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("finetune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long` too: minutes each, of tools and of other projects")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.skip(reason="takes minutes; `make long` runs it"))


@pytest.fixture(scope="module")
def threads_kept() -> Iterator[None]:
    """For modules that set the number of torch's threads: the next ones have it as it was."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has its model, a small one, and nothing else."""
    from tests.trainer.test_predict import export  # needs torch, which most tests do without

    storage = tmp_path_factory.mktemp("runs")
    export(storage)
    return storage / "pets"
