"""What tests on a card share: what is installed for it, and bundles of the quickstart (quickstart.py), each built once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from quickstart import BUILD, Bundle, make

from edgestill.runtime.engines.capabilities import PRECISIONS
from edgestill.runtime.engines.cuda import Card, Cuda
from edgestill.runtime.engines.flavour import FLAVOURS, open_library
from edgestill.runtime.errors import MissingPart


@pytest.fixture(scope="session")
def card() -> Card:
    """The card at hand; skips the test where there is none."""
    try:
        return Cuda().card()
    except MissingPart as missing:
        pytest.skip(f"needs an NVIDIA GPU ({missing})")


@pytest.fixture(scope="session")
def flavour(card: Card) -> str:
    """The TensorRT that is installed and knows the card; skips the test without one."""
    for name in FLAVOURS:
        try:
            open_library(name)
        except MissingPart:
            continue
        if card.compute_capability in PRECISIONS[name]:
            return name
    pytest.skip(f"no TensorRT here that builds for compute capability {card.compute_capability}")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the build."""
    given = os.environ.get(BUILD)
    return Path(given) if given else tmp_path_factory.mktemp("quickstart") / "build"


@pytest.fixture(scope="session")
def bundle(quickstart: Path, card: Card, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bundles of the quickstart, each built when it is first asked for."""
    profiles = tmp_path_factory.mktemp("profiles")
    return lambda engine, weights: make(quickstart, profiles, engine, weights, card.compute_capability)


@pytest.fixture
def say(
    capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> Callable[[str, object], None]:
    """Report a measured value: on the terminal and in the junit file."""

    def report(name: str, value: object) -> None:
        record_property(name, value)
        with capsys.disabled():
            print(f"\n{name}: {value}")

    return report
