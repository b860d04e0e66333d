"""A tiny random llama whose greedy output proves something.

A test of recovery compares tokens, so the tokens must depend on all of the KV cache: with the usual initialiser a
random model repeats one token whatever its cache holds. Three choices prevent this:

- Attention is *sharp* (large query and key scale), since a mean over a long context hardly changes from step to step
  and ends in a loop, and *loud* beside the residual stream (large output scale), so that what it reads decides the
  next token. Different heads and steps read different places: any block is soon missed.
- Every id decodes to one visible character of its own. A stream then delivers one chunk per token, none is held back
  as an incomplete UTF-8 sequence, and text and token ids say the same.
- The rows of special tokens in the output head are zero while all others are wide, so that a stream does not end
  before its length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from resilientllm_cli.errors import UsageError

BYTE_TOKENS = 256
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 256, 257
VOCABULARY = 320
"""More rows than tokens, a multiple of 64, so that any small tensor-parallel size divides it. Unused rows are zero."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

EMBEDDING_SCALE = 1.0
ATTENTION_LOGIT_SCALE = 5.0
"""Standard deviation of an attention logit: near 0 is a mean over the context, 5 a choice of a few tokens. By trial: at
1.5 greedy output loops and ignores a third of the blocks, at 3 a tenth of them, from 4 on it does neither."""
ATTENTION_SCALE = 3.0
"""How loud attention is: standard deviation of what it adds to the residual stream, were it to read one token."""
MLP_SCALE = 1.0
"""The same of the MLP, for gate and up projections of deviation 1."""
ROPE_THETA = 200.0
"""Low, so that all of a head turns within a short context: what a step reads depends on where it stands, and output
goes on changing even where the prompt repeats itself. By trial: at llama's 10,000 more of such outputs loop."""
LOGIT_SCALE = 6.0
"""Standard deviation of an output logit: at 6 the special tokens, at 0, are practically never sampled."""


@dataclass(frozen=True)
class TinyModel:
    """The shape. Defaults give about 5 MB that 1, 2, 3 or 6 stages of 1 or 2 ranks can share."""

    layers: int = 6
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 256
    max_model_len: int = 4096
    seed: int = 1

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def check(model: TinyModel) -> None:
    """Raises UsageError for a shape that vLLM's CPU attention or llama itself cannot have."""
    numbers = {"layers": model.layers, "heads": model.heads, "kv-heads": model.kv_heads, "hidden": model.hidden}
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"--{name} must be at least 1, found {number}")
    if model.hidden % model.heads or model.head_size not in (32, 64, 128):
        raise UsageError(
            f"--hidden / --heads must be a head size of 32, 64 or 128, found {model.hidden} / {model.heads}"
        )
    if model.heads % model.kv_heads:
        raise UsageError(f"--kv-heads must divide the {model.heads} of --heads, found {model.kv_heads}")


def write_tiny_model(directory: Path, model: TinyModel) -> None:
    """Writes a Hugging Face model directory. The same shape and seed give the same bytes."""
    check(model)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").write_bytes(save(_weights(model), metadata={"format": "pt"}))
    _tokenizer().save(str(directory / "tokenizer.json"))
    documents = {
        "config.json": _config(model),
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID},
        "tokenizer_config.json": _tokenizer_config(model),
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n")


def _config(model: TinyModel) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_model_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
    }


def _tokenizer() -> Tokenizer:
    """Bytes in, one visible character a token out: a byte-level alphabet that decodes to itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def _tokenizer_config(model: TinyModel) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": model.max_model_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _weights(model: TinyModel) -> dict[str, NDArray[np.float32]]:
    """Scales follow from the variance of a sum: a normed input of n entries times weights of deviation s gives s√n."""
    random = np.random.Generator(np.random.PCG64(model.seed))

    def matrix(outputs: int, inputs: int, scale: float) -> NDArray[np.float32]:
        """``scale``: deviation of an output entry for inputs of deviation 1."""
        return random.normal(0.0, scale / inputs**0.5, (outputs, inputs)).astype(np.float32)

    hidden, kv = model.hidden, model.kv_heads * model.head_size
    ones = np.ones(hidden, dtype=np.float32)
    # A logit is a sum of head_size products, divided by √head_size: its deviation is that of query times key.
    query_key = ATTENTION_LOGIT_SCALE**0.5
    weights = {
        "model.embed_tokens.weight": random.normal(0.0, EMBEDDING_SCALE, (VOCABULARY, hidden)).astype(np.float32),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(VOCABULARY, hidden, LOGIT_SCALE),
    }
    weights["lm_head.weight"][BYTE_TOKENS:] = 0.0
    for layer in range(model.layers):
        weights |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": ones,
                "self_attn.q_proj": matrix(hidden, hidden, query_key),
                "self_attn.k_proj": matrix(kv, hidden, query_key),
                "self_attn.v_proj": matrix(kv, hidden, 1.0),
                "self_attn.o_proj": matrix(hidden, hidden, ATTENTION_SCALE),
                "post_attention_layernorm": ones,
                "mlp.gate_proj": matrix(model.intermediate, hidden, 1.0),
                "mlp.up_proj": matrix(model.intermediate, hidden, 1.0),
                "mlp.down_proj": matrix(hidden, model.intermediate, MLP_SCALE),
            }.items()
        }
    return weights
