import pytest
from resilientllm_worker.transport.address import format_address, parse_address


@pytest.mark.parametrize("text", ["stage-0.ns.svc:9000", "10.0.0.7:1", "[fe80::1]:65535"])
def test_an_address_survives_parsing_and_formatting(text: str) -> None:
    assert format_address(*parse_address(text)) == text


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:0", "host:65536", "host:-1", "host:x", "fe80::1", "host:²"]
)
def test_what_is_no_address_is_refused_with_the_form_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        parse_address(text)
