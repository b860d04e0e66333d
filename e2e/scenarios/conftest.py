"""One cluster and one object for all scenarios, whole before each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.demo import installation
from e2e.scenarios import ledger
from e2e.scenarios.ground import Ground
from e2e.scenarios.scenario import Scenario

_FAILURE = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if call.when == "call" and call.excinfo is not None:
        item.stash[_FAILURE] = f"{'xfailed' if hasattr(report, 'wasxfail') else 'failed'}: {call.excinfo.exconly()}"
    return report  # type: ignore[return-value]


# Not of the session: other tests of clusters come after these, and would share the machine with this one.
@pytest.fixture(scope="package")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = Ground(installation.open_to_all(tmp_path_factory.mktemp("scenarios")))
    try:
        made.make()
        yield made
    finally:
        made.down()


@pytest.fixture
def scenario(ground: Ground, request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """With the cluster whole. What came of it is written to the ledger, however it ends."""
    name = f"{request.node.path.stem.removeprefix('test_')}/{request.node.name.removeprefix('test_')}"
    made = Scenario(ground, name, ground.whole())
    try:
        yield made
    finally:
        failure = request.node.stash.get(_FAILURE, None)
        if failure is not None:
            made.keep_evidence(failure)
        made.close()
        ledger.write(made.line(failure or "passed"))
