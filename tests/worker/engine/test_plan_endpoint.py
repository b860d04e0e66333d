"""``PUT /v1/plan``: whatever comes, the answer says what it was taken for, and only a plan changes the plan."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, Plan, StageId
from resilientllm_api.ports import PLAN_PATH
from resilientllm_worker.engine.control_server import MAX_PLAN_BYTES, PlanStore, make_app
from starlette.testclient import TestClient

TOKEN = b"a token"
ADDRESSES = {StageId(instance=i, stage=s): f"127.0.0.1:{1000 + 10 * i + s}" for i in range(3) for s in range(2)}
AT_HAND, NEWER = (make_plans("test", version, 3, 2, ADDRESSES, Limits())[0] for version in (5, 6))
DOCUMENT: Any = json.loads(NEWER.model_dump_json(by_alias=True))

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
KEYS = ["version", "stages", "donors", "id", "address", "leaving", "lost", "limits", "heartbeatIntervalSeconds"]


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """A newer plan, of which some values are others, missing, or there twice."""
    document = copy.deepcopy(DOCUMENT)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = document
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                match draw(st.sampled_from(["other", "missing", "more"])):
                    case "other":
                        place[key] = draw(anything | st.sampled_from([-1, 0, 1, 10**30, "", "1.2.3.4:70000", [], {}]))
                    case "missing":
                        del place[key]
                    case _ if isinstance(place, list):
                        place.append(copy.deepcopy(inner))
                    case _:
                        place[draw(st.sampled_from(KEYS))] = draw(anything)
                break
            place = inner
    return json.dumps(document).encode(errors="surrogatepass")


@st.composite
def scratched(draw: st.DrawFn) -> bytes:
    """The bytes of a newer plan, of which some are others."""
    data = bytearray(NEWER.model_dump_json(by_alias=True).encode())
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def put(body: bytes, token: bytes = TOKEN) -> tuple[int, Plan | None, Plan | None]:
    """Status, the plan after it, and the one that an engine would find which starts anew."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.json"
        store = PlanStore(0, path)
        assert store.put(AT_HAND) is None
        client = TestClient(make_app(store, TOKEN), raise_server_exceptions=False)
        answer = client.put(PLAN_PATH, content=body, headers={b"authorization": b"Bearer " + token})
        return answer.status_code, store.plan, PlanStore(0, path).plan


@given(body=st.binary(max_size=300) | anything.map(lambda each: json.dumps(each).encode()) | bent() | scratched())
@settings(max_examples=300, deadline=None)
def test_whatever_comes_is_a_plan_or_is_refused_and_changes_nothing(body: bytes) -> None:
    status, plan, kept = put(body)
    assert status in (204, 409, 422), body
    assert plan == kept
    if status == 204:
        assert plan == Plan.model_validate_json(body)
        assert plan.version >= AT_HAND.version
    else:
        assert plan == AT_HAND


@pytest.mark.parametrize("body", [b'{"version": NaN}', b'{"name": "\xff"}', b'{"name": "\\ud800"}', b"[" * 10_000])
def test_what_json_cannot_say_again_is_refused_like_anything_else(body: bytes) -> None:
    assert put(body)[:2] == (422, AT_HAND)


def test_a_newer_plan_is_taken_and_kept() -> None:
    assert put(NEWER.model_dump_json(by_alias=True).encode()) == (204, NEWER, NEWER)


def test_a_body_above_the_limit_is_refused() -> None:
    assert put(b" " * (MAX_PLAN_BYTES + 1))[:2] == (413, AT_HAND)


@given(token=st.binary(max_size=20).filter(lambda token: token.strip() != TOKEN))
@settings(max_examples=50, deadline=None)
def test_nobody_changes_the_plan_without_the_token(token: bytes) -> None:
    status, plan, _ = put(NEWER.model_dump_json(by_alias=True).encode(), token)
    assert (status, plan) == (401, AT_HAND)
