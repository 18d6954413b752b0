"""P-Tuning: GPT Understands, Too. Liu et al. 2021 (arXiv 2103.10385), section 3.2.

    x = [h₁ … h_P, e(x₁) … e(x_T)]        h = MLP(E)  or  MLP([→LSTM(E) : ←LSTM(E)])        (eqs. 5 and 6)

P virtual tokens stand before the embedded input. They are not trained themselves: E (P, D) and the prompt encoder that
turns it into h (P, D) are. After training the encoder is dropped and h is all that is saved, as PEFT does.

Nothing in the model changes, so there is nothing to merge; every pass is P tokens longer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from .. import backend, ops
from ..backend import Array, get_namespace
from ..checks import check_choice, check_count
from ..module import in_mode
from ..nn import Dropout, Embedding, Linear, Module, Parameter, ReLU, Sequential, uniform
from ..tensor import Tensor, no_grad
from ..virtual_tokens import VirtualTokens
from .base import AdapterLayer, Method

# --- formulas ---------------------------------------------------------------------------------------------------------


def lstm_cell(gates: Any, h: Any, c: Any, W_hh: Any, b_hh: Any) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), as in PyTorch:

        i, f, g, o = σ, σ, tanh, σ of (W_ih x + b_ih + W_hh h + b_hh);   c' = f·c + i·g;   h' = o·tanh(c')

    `gates` (B, 4H) is W_ih x + b_ih, which all steps share one product for; h and c (B, H), W_hh (4H, H): (h', c').
    """
    z = gates + ops.linear(h, W_hh, b_hh)  # (B, H) -> (B, 4H)
    H = z.shape[-1] // 4
    i, f, o = (ops.sigmoid(z[:, k * H : (k + 1) * H]) for k in (0, 1, 3))
    c = f * c + i * ops.tanh(z[:, 2 * H : 3 * H])
    return o * ops.tanh(c), c


def lstm(x: Any, W_ih: Any, W_hh: Any, b_ih: Any, b_hh: Any, reverse: bool = False) -> Tensor:
    """The h of every step, from h = c = 0: x (B, T, in), W_ih (4H, in), W_hh (4H, H), b_ih, b_hh (4H): (B, T, H).

    Args:
        reverse: from the last step to the first.

    Raises:
        ValueError: shapes that do not fit.
    """
    x, W_ih, W_hh, b_ih, b_hh = ops.operands("lstm", x, W_ih, W_hh, b_ih, b_hh)
    width = W_hh.shape[-1]
    if x.ndim != 3 or W_ih.shape != (4 * width, x.shape[2]) or W_hh.shape[0] != 4 * width or not x.shape[1]:
        raise ValueError(f"lstm: x (B, T, in) {x.shape}, W_ih (4H, in) {W_ih.shape}, W_hh (4H, H) {W_hh.shape}")
    batch, steps, _ = x.shape
    gates = ops.linear(x, W_ih, b_ih)  # (B, T, in) -> (B, T, 4H)
    h = c = Tensor(get_namespace(x.data).zeros((batch, width), dtype=x.dtype))
    outputs: list[Tensor] = [h] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        h, c = lstm_cell(gates[:, t], h, c, W_hh, b_hh)
        outputs[t] = h
    return ops.stack(outputs, axis=1)


# --- the prompt encoder -----------------------------------------------------------------------------------------------


class LSTM(Module):
    """Layers of bidirectional LSTMs, with PyTorch's names: (B, T, in) -> (B, T, 2·hidden_size).

    Args:
        input_size: in.
        hidden_size: H of each direction.
        num_layers: each takes what both directions of the one before gave.
        dropout: between the layers, while training.
        rng: a generator or seed for the start values, uniform in ±1/√H.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float = 0.0,
        dtype: Any = None,
        rng: Any = None,
    ) -> None:
        self.num_layers, rng = num_layers, backend.generator(rng)
        for layer in range(num_layers):
            width = input_size if layer == 0 else 2 * hidden_size
            for direction in ("", "_reverse"):
                for name, shape in (
                    ("weight_ih", (4 * hidden_size, width)),
                    ("weight_hh", (4 * hidden_size, hidden_size)),
                    ("bias_ih", (4 * hidden_size,)),
                    ("bias_hh", (4 * hidden_size,)),
                ):
                    values = uniform(rng, hidden_size**-0.5, shape, dtype)
                    setattr(self, f"{name}_l{layer}{direction}", Parameter(values))
        self.dropout = Dropout(dropout, rng=int(rng.integers(2**62)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, 2H): the directions side by side, the forward one first."""
        for layer in range(self.num_layers):
            x = self.dropout(x) if layer else x
            both = []
            for direction in ("", "_reverse"):
                names = (f"{kind}_l{layer}{direction}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
                both.append(lstm(x, *(getattr(self, name) for name in names), reverse=bool(direction)))
            x = ops.concatenate(both, axis=-1)
        return x


class PromptEncoder(Module):
    """The virtual tokens: a table E, and what turns it into them. Names and shapes are PEFT's.

    Args:
        config: its sizes, `token_dim` among them; with `inference_mode` the table holds the tokens themselves.

    Attributes:
        embedding: E, (P, D).
        lstm_head: for "LSTM", two directions of `encoder_hidden_size`.
        mlp_head: Linears with ReLU between them, three for "MLP", two for "LSTM".
    """

    def __init__(self, config: PromptEncoderConfig, rng: np.random.Generator | int | None = None, dtype: Any = None):
        rng, D, H = backend.generator(rng), config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = Embedding(config.num_virtual_tokens, D, dtype, rng)
        self.lstm_head: LSTM | None = None
        self.mlp_head: Sequential | None = None
        if config.inference_mode:
            return
        sizes = [D, H, H, D]
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = LSTM(D, H, config.encoder_num_layers, config.encoder_dropout, dtype, rng)
            sizes = [2 * H, 2 * H, D]
        layers: list[Module] = [Linear(i, o, dtype=dtype, rng=rng) for i, o in itertools.pairwise(sizes)]
        self.mlp_head = Sequential(*[part for layer in layers for part in (ReLU(), layer)][1:])

    def forward(self) -> Tensor:
        """The virtual tokens h, (P, D)."""
        x = self.embedding.weight
        if self.lstm_head is not None:
            x = self.lstm_head(x.reshape(1, *x.shape))[0]  # (P, D) -> (1, P, D) -> (P, 2H)
        return x if self.mlp_head is None else self.mlp_head(x)

    def extra_repr(self) -> str:
        return "tokens={}, dim={}".format(*self.embedding.weight.shape)


# --- the layer --------------------------------------------------------------------------------------------------------


class PromptLayer(AdapterLayer):
    """Takes the place of a model's `VirtualTokens`: the active adapters' tokens, one after the other.

    They stand directly before a sequence's first token: where a batch is padded on the left, behind the padding, so
    that each sequence gives what it gives alone. (PEFT puts them before the padding.)

    Attributes:
        prompt_encoder: by adapter name.
    """

    base_layer: VirtualTokens
    unmergeable = "virtual tokens are an input, no weight holds them; keep the adapter, or unload() it"

    def __init__(self, base_layer: VirtualTokens) -> None:
        super().__init__(base_layer)
        self.prompt_encoder: dict[str, PromptEncoder] = {}

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that this layer has."""
        return list(self.prompt_encoder)

    def _active(self) -> list[PromptEncoder]:
        return [] if self.disabled else [self.prompt_encoder[n] for n in self.active if n in self.prompt_encoder]

    @property
    def length(self) -> int:
        """P, of all active adapters together."""
        return sum(encoder.embedding.num_embeddings for encoder in self._active())

    def before(self, x: Tensor, mask: Array | None = None, first: bool = True) -> tuple[Tensor, Array | None]:
        """See `VirtualTokens.before`."""
        P, pads, xp = self.length, _padding(mask), get_namespace(x.data)
        if not P:
            return x, mask
        batch = x.shape[0]
        if first:
            h = ops.concatenate([encoder() for encoder in self._active()], axis=0)  # (P, D)
            h = h + Tensor(xp.zeros((batch, 1, 1), dtype=h.dtype))  # (B, P, D)
            x = _taken(ops.concatenate([h, x], axis=1), _behind_padding(pads, P, x.shape[1]))
        if mask is None:
            return x, None
        seen = xp.concatenate([xp.ones((batch, P), dtype=bool), mask[:, 0, 0]], axis=1)  # (B, P + S)
        order = _behind_padding(pads, P, mask.shape[-1])
        seen = seen if order is None else seen[xp.arange(batch)[:, None], order]
        return x, seen[:, None, None, :]

    def after(self, x: Tensor, mask: Array | None = None, first: bool = True) -> Tensor:
        """See `VirtualTokens.after`."""
        P, pads = self.length, _padding(mask)
        if not P or not first:
            return x
        if pads is None:
            return x[:, P:]
        xp = get_namespace(pads)
        place = xp.arange(x.shape[1] - P)[None]
        return _taken(x, xp.where(place < pads[:, None], place, place + P))

    def extra_repr(self) -> str:
        return f"length={self.length}, active={self.active}"


def _padding(mask: Array | None) -> Array | None:
    """How many places of each row, (B,), are padding before its first token; None where no row has any."""
    if mask is None:
        return None
    seen, xp = mask[:, 0, 0], get_namespace(mask)
    pads = xp.where(seen.any(axis=1), seen.argmax(axis=1), seen.shape[1])
    return pads if bool(pads.any()) else None


def _behind_padding(pads: Array | None, P: int, T: int) -> Array | None:
    """For each row the order (B, P + T) of [P virtual tokens, T own] in which its padding comes first."""
    if pads is None:
        return None
    xp = get_namespace(pads)
    place, pads = xp.arange(P + T)[None], pads[:, None]
    return xp.where(place < pads, place + P, xp.where(place < pads + P, place - pads, place))


def _taken(x: Tensor, order: Array | None) -> Tensor:
    """The tokens of each row in this order: (B, T, D), (B, T') -> (B, T', D)"""
    return x if order is None else x[get_namespace(order).arange(x.shape[0])[:, None], order]


# --- the method -------------------------------------------------------------------------------------------------------

ENCODERS = ("MLP", "LSTM")


@dataclass
class PromptEncoderConfig:
    """How many virtual tokens, and what makes them; names and defaults are PEFT's.

    Args:
        num_virtual_tokens: P.
        encoder_reparameterization_type: "MLP" (two hidden layers) or "LSTM" (bidirectional, and an MLP behind it).
        encoder_hidden_size: H; left out, the model's token size.
        encoder_num_layers: of the LSTM.
        encoder_dropout: between the LSTM's layers.
        token_dim: D; left out, the model's token size, which it must be.
        num_transformer_submodules: 1 or left out; 2 is for encoder–decoder models, which are not here.
        num_attention_heads, num_layers: kept for PEFT's file, without effect.

    Raises:
        ValueError: at once, for a value outside what is accepted.
    """

    num_virtual_tokens: int | None = None
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    peft_type: str = "P_TUNING"

    file_trains: ClassVar[bool] = False  # a file has the tokens, not the encoder

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers", "token_dim"):
            value, optional = getattr(self, name), name in ("encoder_hidden_size", "token_dim")
            if value is not None or not optional:
                setattr(self, name, check_count(name, value))
        kind = self.encoder_reparameterization_type
        check_choice("encoder_reparameterization_type", kind, ENCODERS)
        self.encoder_reparameterization_type = ENCODERS[ENCODERS.index(kind)]  # PEFT's is an enum of strings
        if not isinstance(self.encoder_dropout, int | float | np.number) or not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout: got {self.encoder_dropout!r}; a probability in [0, 1) is accepted")
        if self.num_transformer_submodules not in (None, 1):
            raise ValueError(
                f"num_transformer_submodules: got {self.num_transformer_submodules!r}; 1 is accepted, the models here "
                "are no encoder–decoders"
            )

    def build(self) -> PTuning:
        """The method that this config describes."""
        return PTuning(self)

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PromptEncoderConfig:
        """The config in PEFT's adapter_config.json.

        Raises:
            ValueError: it uses a feature of PEFT's that is not here.
        """
        known = {f.name for f in fields(cls)}
        extra = {k: v for k, v in data.items() if k not in known | {"auto_mapping", "peft_version", "revision"} and v}
        if extra:
            raise ValueError(
                f"adapter config: {', '.join(f'{k}={v!r}' for k, v in extra.items())} is not supported here"
            )
        return cls(**{key: value for key, value in data.items() if key in known})


class PTuning(Method):
    """Puts a `PromptLayer` in the place of the model's `VirtualTokens`."""

    layer = PromptLayer
    wraps = VirtualTokens

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__(config)
        self.like: Array | None = None

    def targets(self, model: Module) -> list[str]:
        """The place for virtual tokens.

        Raises:
            ValueError: the model has none: it has no tokens.
        """
        names = [n for n, m in model.named_modules() if isinstance(m, VirtualTokens) and not n.endswith("base_layer")]
        names += [n for n, m in model.named_modules() if isinstance(m, PromptLayer)]
        if not names:
            raise ValueError(
                f"model: {type(model).__name__} has no place for virtual tokens; P-Tuning needs a model of tokens "
                "(Llama, ViT), not of single vectors"
            )
        return names

    def check(self, name: str, place: Module) -> None:
        """Raise ValueError where token_dim is not the model's."""
        dim = getattr(place, "base_layer", place).dim
        if self.config.token_dim not in (None, dim):
            raise ValueError(f"token_dim: got {self.config.token_dim}; the model's tokens have {dim} features")

    def prepare(self, model: Module, batches: Iterable[Any] | None, loss_fn: Any) -> None:
        """Note the library and dtype of the model's numbers."""
        weight = next(model.parameters()).data
        self.like = get_namespace(weight).empty(0, dtype=weight.dtype)

    def wrap(self, name: str, place: Module) -> PromptLayer:
        """The layer with new virtual tokens; a PromptLayer gets more."""
        layer = place if isinstance(place, PromptLayer) else PromptLayer(place)
        dtype = self.like.dtype if self.like.dtype in (np.float32, np.float64) else np.float32
        config = replace(self.config, token_dim=layer.base_layer.dim)
        encoder = PromptEncoder(config, self.rng, dtype)
        layer.prompt_encoder[self.adapter] = encoder.to(get_namespace(self.like))
        return layer

    def owned(self, model: Module, own: dict[str, Parameter]) -> dict[str, Parameter]:
        """Loaded from a file, the tokens under PEFT's name; in training, the encoder's parameters."""
        return {"prompt_embeddings": next(iter(own.values()))} if self.config.inference_mode else own

    def saved(self, model: Any, config: Any, values: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        """PEFT's format: the tokens that the encoder makes, without it, and the sizes that the config left out."""
        layer = next(layer for _, layer in model.adapter_layers() if self.adapter in layer.adapters)
        encoder, base = layer.prompt_encoder[self.adapter], model.get_base_model()
        with no_grad(), in_mode(encoder, training=False):  # a file has no dropout
            tokens = encoder().data
        config = replace(
            config,
            token_dim=layer.base_layer.dim,
            encoder_hidden_size=config.encoder_hidden_size or layer.base_layer.dim,
            num_transformer_submodules=1,
            task_type=config.task_type or ("CAUSAL_LM" if base.output_head == "lm_head" else None),
        )
        return config, {"prompt_embeddings": tokens}
