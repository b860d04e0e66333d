"""The test model: made without a download, the same for a seed, and every KV block matters to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resilientllm_cli.errors import UsageError
from resilientllm_cli.tiny_model import BYTE_TOKENS, TinyModel, write_tiny_model
from tokenizers import Tokenizer


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_it_is_a_hugging_face_directory_of_a_few_megabytes(tiny_model: Path) -> None:
    found = files(tiny_model)
    assert set(found) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(map(len, found.values())) < 10_000_000
    assert json.loads(found["config.json"])["num_hidden_layers"] == 6


def test_everybody_may_read_it(tiny_model: Path) -> None:
    assert all(path.stat().st_mode & 0o044 for path in tiny_model.iterdir())


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "same", TinyModel())
    write_tiny_model(tmp_path / "other", TinyModel(seed=TinyModel.seed + 1))
    assert files(tmp_path / "same") == files(tiny_model)
    assert files(tmp_path / "other")["model.safetensors"] != files(tiny_model)["model.safetensors"]


def test_every_token_is_one_visible_character_of_its_own(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    texts = [tokenizer.decode([token]) for token in range(BYTE_TOKENS)]
    assert all(len(text) == 1 and text.isprintable() and not text.isspace() for text in texts)
    assert len(set(texts)) == BYTE_TOKENS


def test_any_text_can_be_a_prompt(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    ids = tokenizer.encode("naïve 模型\n\x00").ids
    assert len(ids) == 1 + len("naïve 模型\n\x00".encode())
    assert max(ids[1:]) < BYTE_TOKENS


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TinyModel(layers=0), "--layers must be at least 1, found 0"),
        (TinyModel(hidden=100), "head size of 32, 64 or 128, found 100 / 4"),
        (TinyModel(kv_heads=3), "--kv-heads must divide the 4 of --heads, found 3"),
    ],
)
def test_an_impossible_shape_is_refused(shape: TinyModel, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        write_tiny_model(tmp_path, shape)
