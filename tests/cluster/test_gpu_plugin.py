"""The messages of the device plugin, checked against the encoding's own specification."""

from __future__ import annotations

import pytest

from e2e.cluster.gpu_plugin import count_messages, devices, field, varint


@pytest.mark.parametrize(("value", "encoded"), [(1, b"\x01"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")])
def test_numbers_are_encoded_in_groups_of_seven_bits(value: int, encoded: bytes) -> None:
    assert varint(value) == encoded


def test_text_is_encoded_as_in_the_specifications_example() -> None:
    assert field(2, b"testing") == bytes.fromhex("120774657374696e67")


def test_devices_are_listed_in_a_stable_order_with_their_health() -> None:
    assert devices({"b": False, "a": True}) == field(1, field(1, b"a") + field(2, b"Healthy")) + field(
        1, field(1, b"b") + field(2, b"Unhealthy")
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_requests_of_any_length_are_counted(count: int) -> None:
    assert count_messages(field(1, b"x" * 200) * count) == count
