"""The Llama family (Touvron et al. 2023): SmolLM2, Llama 2 and 3, Mistral, Qwen2. Read it from top to bottom.

Token ids -> embeddings -> `num_hidden_layers` blocks of attention and MLP, each behind an RMSNorm and added to the
stream -> RMSNorm -> logits. Modules have Hugging Face's names, so PEFT's adapters and checkpoints fit as they are.

In the comments: B sequences, T new tokens, S tokens in all (those kept from before and the new ones), D features of a
token, H query heads, K key and value heads, d features of a head, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .. import backend, nn, ops
from ..backend import Array
from ..batch_parts import over_batch
from ..checkpointing import checkpoint
from ..generate import generate, stream
from ..tensor import Tensor
from ..virtual_tokens import VirtualTokens
from .llama_config import LlamaConfig, rotary_frequencies


class Llama(nn.Module):
    """A causal language model: `model(ids)` gives, at every position, logits for the next token.

    Args:
        config: sizes and choices.
        rng: a generator or seed for the start values.
        dtype: of the parameters; None is the default dtype (float32).
    """

    output_head = "lm_head"

    def __init__(self, config: LlamaConfig, rng: np.random.Generator | int | None = None, dtype: Any = None) -> None:
        self.config, rng = config, backend.generator(rng)
        self.model = Decoder(config, rng, dtype)
        if config.tie_word_embeddings:
            self.lm_head = nn.Linear(1, 1, bias=False)
            self.lm_head.in_features, self.lm_head.out_features = config.hidden_size, config.vocab_size
            self.lm_head.weight = self.model.embed_tokens.weight  # one parameter under two names
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, False, dtype, rng)

    def forward(self, ids: Any, attention_mask: Any = None, cache: list[LayerCache] | None = None) -> Tensor:
        """Logits for the token after each: ids (B, T) integers -> (B, T, V).

        Args:
            attention_mask: (B, S), 0 for padding, which no token sees. The output at padding means nothing.
            cache: from `new_cache`; ids then follow what it holds, and are added to it.
        """
        return self.lm_head(self.hidden_states(ids, attention_mask, cache))  # (B, T, D) -> (B, T, V)

    def hidden_states(self, ids: Any, attention_mask: Any = None, cache: list[LayerCache] | None = None) -> Tensor:
        """What the output head gets to see: (B, T) -> (B, T, D)."""
        return self.model(ids, attention_mask, cache)

    def loss(self, ids: Any, labels: Any = None, attention_mask: Any = None) -> Tensor:
        """The mean cross-entropy of every token given those before it, without ever holding all logits.

        Args:
            ids: (B, T).
            labels: (B, T), the ids again, with −100 where a token is not to be learned; None learns all of them.
            attention_mask: (B, T), as for `forward`; padding needs −100 in `labels` as well.
        """
        h = self.hidden_states(ids, attention_mask)[:, :-1].reshape(-1, self.config.hidden_size)  # (B·(T−1), D)
        labels = ids if labels is None else labels
        labels = labels.data if isinstance(labels, Tensor) else backend.get_namespace(h.data).asarray(labels)
        targets = labels[:, 1:].reshape(-1)  # position t predicts token t + 1
        if type(self.lm_head) is nn.Linear:
            return ops.linear_cross_entropy(h, self.lm_head.weight, targets)
        return ops.cross_entropy(self.lm_head(h), targets)  # an adapted head is more than its weight

    @property
    def context(self) -> int:
        """How many tokens a sequence may have, virtual ones aside."""
        return self.config.max_position_embeddings - self.model.virtual_tokens.length

    def new_cache(self, batch: int, capacity: int) -> list[LayerCache]:
        """Room for the keys and values of `batch` sequences of up to `capacity` tokens, in every layer."""
        c, like = self.config, self.model.embed_tokens.weight.data
        capacity += self.model.virtual_tokens.length
        return [LayerCache((batch, c.num_key_value_heads, capacity, c.head_dim), like) for _ in self.model.layers]

    def generate(
        self,
        ids: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | np.random.Generator | None = None,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Continue one prompt or many; see `minipeft.generate.generate`."""
        return generate(self, ids, max_new_tokens, temperature, top_p, seed, stop_ids, on_token)

    def stream(self, ids: Any, max_new_tokens: int, **options: Any) -> Iterator[int]:
        """The continuation of one prompt, token by token; see `minipeft.generate.stream`."""
        return stream(self, ids, max_new_tokens, **options)


class Decoder(nn.Module):
    """Everything but the output head.

    Attributes:
        checkpointing: blocks keep only their input for backward, and are computed a second time there.
    """

    def __init__(self, config: LlamaConfig, rng: np.random.Generator, dtype: Any = None) -> None:
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype, rng)
        table = self.embed_tokens.weight
        table.data = table.data * 0.02  # as Hugging Face starts: a tied head gives logits of order 1
        self.virtual_tokens = VirtualTokens(config.hidden_size)
        self.layers = [Block(config, rng, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.checkpointing = False

    def forward(self, ids: Any, attention_mask: Any = None, cache: list[LayerCache] | None = None) -> Tensor:
        """(B, T) -> (B, T, D)"""
        ids = ids.data if isinstance(ids, Tensor) else np.asarray(ids) if isinstance(ids, list | tuple) else ids
        if ids.ndim != 2 or not ids.size:
            raise ValueError(f"ids: got shape {ids.shape}; (batch, time) of at least one token is accepted")
        x = self.embed_tokens(ids)  # (B, T) -> (B, T, D)
        start, virtual = (cache[0].length if cache else 0), self.virtual_tokens.length
        stop = start + ids.shape[1] + (0 if start else virtual)
        if stop > self.config.max_position_embeddings:
            also = f", {virtual} of them virtual" if virtual else ""
            raise ValueError(f"ids: {stop} tokens{also}; the model's context has {self.config.max_position_embeddings}")
        own_mask = self._mask(attention_mask, (ids.shape[0], stop - virtual), x.data)
        x, mask = self.virtual_tokens.before(x, own_mask, not start)
        rotary = self._rotary(start, stop, x.data)
        if cache:
            for layer, own in zip(self.layers, cache, strict=True):
                x = layer(x, rotary, mask, own)  # (B, T, D) -> (B, T, D)
        else:
            x = over_batch(lambda x, mask: self._blocks(x, rotary, mask), self, x, mask)
        return self.norm(self.virtual_tokens.after(x, own_mask, not start))

    def _blocks(self, x: Tensor, rotary: tuple[Array, Array], mask: Array | None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        for layer in self.layers:
            x = checkpoint(layer, x, rotary, mask, None) if self.checkpointing else layer(x, rotary, mask, None)
        return x

    def _rotary(self, start: int, stop: int, like: Array) -> tuple[Array, Array]:
        """cos and sin of every position's angles, each (T, d/2).

        Positions count padding too: attention sees only differences of angles, so a shift of all changes nothing.
        """
        angles = np.outer(np.arange(start, stop), rotary_frequencies(self.config))
        xp = backend.get_namespace(like)
        return tuple(backend.move(f(angles).astype(like.dtype), xp) for f in (np.cos, np.sin))

    def _mask(self, attention_mask: Any, shape: tuple[int, int], like: Array) -> Array | None:
        """(B, S) with 0 for padding -> booleans (B, 1, 1, S): the same keys for all heads and queries."""
        if attention_mask is None:
            return None
        mask = attention_mask.data if isinstance(attention_mask, Tensor) else attention_mask
        mask = backend.get_namespace(like).asarray(mask) != 0
        if mask.shape != shape:
            raise ValueError(f"attention_mask: got shape {mask.shape}; one entry for every token, {shape}, is accepted")
        return mask[:, None, None, :]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, rng: np.random.Generator, dtype: Any = None) -> None:
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, rng, dtype)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, rng, dtype)

    def forward(self, x: Tensor, rotary: tuple[Array, Array], mask: Array | None, cache: LayerCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)  # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, D)


class Attention(nn.Module):
    """Every token looks at itself and those before it; H query heads share K heads of keys and values."""

    def __init__(self, config: LlamaConfig, rng: np.random.Generator, dtype: Any = None) -> None:
        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        bias = config.attention_bias or config.model_type == "qwen2"
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias, dtype, rng)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias, dtype, rng)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias, dtype, rng)
        self.o_proj = nn.Linear(width, config.hidden_size, config.attention_bias, dtype, rng)

    def forward(self, x: Tensor, rotary: tuple[Array, Array], mask: Array | None, cache: LayerCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        batch, tokens, _ = x.shape
        q, k, v = (
            y.reshape(batch, tokens, -1, self.head_dim).swapaxes(1, 2)  # (B, T, D) -> (B, H or K, T, d)
            for y in nn.project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = ops.rope(q, *rotary), ops.rope(k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, T, d) -> (B, K, S, d)
        y = ops.scaled_dot_product_attention(q, k, v, mask, is_causal=tokens > 1)  # (B, H, T, d)
        return self.o_proj(y.swapaxes(1, 2).reshape(batch, tokens, -1))  # (B, T, H·d) -> (B, T, D)


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, rng: np.random.Generator, dtype: Any = None) -> None:
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, dtype, rng)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, dtype, rng)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, dtype, rng)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.down_proj(ops.swiglu(*nn.project(x, self.gate_proj, self.up_proj)))  # D -> intermediate_size -> D


class LayerCache:
    """One layer's keys and values of the tokens so far, in arrays with room for those to come.

    Attributes:
        keys, values: (B, K, capacity, d); the first `length` positions are filled.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Array) -> None:
        xp = backend.get_namespace(like)
        self.keys, self.values, self.length = xp.empty(shape, like.dtype), xp.empty(shape, like.dtype), 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add T positions, (B, K, T, d), and return all: (B, K, S, d). They are constants: no gradient goes through.

        Raises:
            ValueError: the cache is full.
        """
        start, self.length = self.length, self.length + k.shape[2]
        if self.length > self.keys.shape[2]:
            raise ValueError(f"cache: room for {self.keys.shape[2]} tokens, {self.length} are needed")
        self.keys[:, :, start : self.length], self.values[:, :, start : self.length] = k.data, v.data
        return Tensor(self.keys[:, :, : self.length]), Tensor(self.values[:, :, : self.length])
