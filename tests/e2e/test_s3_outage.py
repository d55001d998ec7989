"""A whole run on S3 survives an outage at any moment of its life. Real Ray, real ranks, moto behind a proxy that refuses or hangs.

Each outage outlasts what one operation is tried for (2 s here). The campaign has the long ones (benchmarks/faults/outages.py)."""

from collections.abc import Iterator

import pytest

from benchmarks.faults.outages import Moment, Outages, opened
from benchmarks.faults.s3 import Weather

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SECONDS, SCALE = 6.0, 10.0


@pytest.fixture(scope="module")
def outages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outages]:
    with opened(tmp_path_factory.mktemp("outages")) as found:
        yield found


@pytest.mark.parametrize(
    ("moments", "weather"),
    [
        (("set-up", "the last commit"), "refuse"),
        (("steady state", "the export"), "hang"),
        (("a rank's death", "the export"), "refuse"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_an_outage_of_the_storage_costs_time_and_nothing_else(outages: Outages, moments: tuple[Moment, ...], weather: Weather) -> None:
    outages.trial(moments, SECONDS, weather, scale=SCALE)
