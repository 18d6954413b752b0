"""A small vision transformer (Dosovitskiy et al. 2021): images cut into patches, each patch a token.

Pre-norm blocks, learned positions, the mean over tokens instead of a class token. The projections have the names that
Hugging Face gives them, so `target_modules=["q_proj", "v_proj"]` and `"all-linear"` mean here what they mean there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend, nn, ops
from ..tensor import Tensor
from ..virtual_tokens import VirtualTokens


class ViT(nn.Module):
    """Digits to logits: patches -> tokens -> `depth` blocks -> norm -> mean over tokens -> head.

    Args:
        image_size, patch_size: sides in pixels; 8 and 2 give 16 tokens of 4 pixels.
        dim: features of a token.
        depth: number of blocks.
        heads: attention heads, each with dim/heads features.
        mlp_dim: hidden features of a block's MLP.
        classes: number of logits.
        rng: a generator or seed for the start values.
        dtype: of the parameters; None is the default dtype (float32).

    Raises:
        ValueError: sides or heads that do not divide evenly.
    """

    output_head = "head"

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        dim: int = 48,
        depth: int = 2,
        heads: int = 4,
        mlp_dim: int = 96,
        classes: int = 10,
        rng: np.random.Generator | int | None = None,
        dtype: Any = None,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(f"patch_size: got {patch_size}; a divisor of image_size = {image_size} is accepted")
        if dim % heads:
            raise ValueError(f"heads: got {heads}; a divisor of dim = {dim} is accepted")
        self.image_size, self.patch_size, rng = image_size, patch_size, backend.generator(rng)
        tokens = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbedding(patch_size**2, dim, rng, dtype)
        self.position_embedding = nn.Parameter(_normal(rng, (tokens, dim), dtype))
        self.virtual_tokens = VirtualTokens(dim)
        self.layers = [Block(dim, heads, mlp_dim, rng, dtype) for _ in range(depth)]
        self.norm = nn.LayerNorm(dim, dtype=dtype)
        self.head = nn.Linear(dim, classes, dtype=dtype, rng=rng)

    def forward(self, images: Any) -> Tensor:
        """images (B, image_size²), or (B, image_size, image_size) -> logits (B, classes)"""
        x = self.patches(ops.tensor(images))  # (B, 64) -> (B, 16, 4)
        x = self.patch_embed(x) + self.position_embedding  # (B, 16, 4) -> (B, 16, dim)
        x, _ = self.virtual_tokens.before(x)
        for layer in self.layers:
            x = layer(x)  # (B, 16, dim) -> (B, 16, dim)
        x = self.virtual_tokens.after(x)
        return self.head(self.norm(x).mean(axis=1))  # (B, 16, dim) -> (B, dim) -> (B, 10)

    def patches(self, images: Tensor) -> Tensor:
        """The image cut into squares, row by row: (B, side²) -> (B, tokens, patch_size²)"""
        side, p = self.image_size, self.patch_size
        if images.ndim < 2 or images.size != images.shape[0] * side**2:
            raise ValueError(f"images: got shape {images.shape}; (B, {side**2}) or (B, {side}, {side}) is accepted")
        x = images.reshape(-1, side // p, p, side // p, p)  # (B, 4, 2, 4, 2): block row, row, block column, column
        return x.transpose(0, 1, 3, 2, 4).reshape(-1, (side // p) ** 2, p * p)  # (B, 4, 4, 2, 2) -> (B, 16, 4)


class PatchEmbedding(nn.Module):
    """The linear map of a patch's pixels to a token.

    It is no `nn.Linear`, as in Hugging Face's ViT, where it is a convolution: `"all-linear"` leaves it out.

    Attributes:
        weight: (dim, pixels). bias: (dim,).
    """

    def __init__(self, pixels: int, dim: int, rng: np.random.Generator, dtype: Any = None) -> None:
        self.weight = nn.Parameter(nn.uniform(rng, pixels**-0.5, (dim, pixels), dtype))
        self.bias = nn.Parameter(nn.uniform(rng, pixels**-0.5, (dim,), dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, pixels) -> (B, tokens, dim)"""
        return ops.linear(x, self.weight, self.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, rng: np.random.Generator, dtype: Any = None) -> None:
        self.input_layernorm = nn.LayerNorm(dim, dtype=dtype)
        self.self_attn = SelfAttention(dim, heads, rng, dtype)
        self.post_attention_layernorm = nn.LayerNorm(dim, dtype=dtype)
        self.mlp = FeedForward(dim, mlp_dim, rng, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)"""
        x = x + self.self_attn(self.input_layernorm(x))  # (B, T, dim)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, dim)


class SelfAttention(nn.Module):
    """Multi-head attention of every token to all tokens."""

    def __init__(self, dim: int, heads: int, rng: np.random.Generator, dtype: Any = None) -> None:
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, dtype=dtype, rng=rng)
        self.k_proj = nn.Linear(dim, dim, dtype=dtype, rng=rng)
        self.v_proj = nn.Linear(dim, dim, dtype=dtype, rng=rng)
        self.o_proj = nn.Linear(dim, dim, dtype=dtype, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)"""
        batch, tokens, dim = x.shape
        q, k, v = [
            proj(x).reshape(batch, tokens, self.heads, -1).swapaxes(1, 2)  # (B, T, dim) -> (B, H, T, dim/H)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        ]
        y = ops.scaled_dot_product_attention(q, k, v)  # (B, H, T, dim/H)
        return self.o_proj(y.swapaxes(1, 2).reshape(batch, tokens, dim))  # (B, T, dim) -> (B, T, dim)


class FeedForward(nn.Module):
    """down(GELU(up(x)))."""

    def __init__(self, dim: int, mlp_dim: int, rng: np.random.Generator, dtype: Any = None) -> None:
        self.up_proj = nn.Linear(dim, mlp_dim, dtype=dtype, rng=rng)
        self.down_proj = nn.Linear(mlp_dim, dim, dtype=dtype, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)"""
        return self.down_proj(ops.gelu(self.up_proj(x)))  # (B, T, dim) -> (B, T, mlp_dim) -> (B, T, dim)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Start values of the positions: normal with deviation 0.5, the size of an embedded patch.

    With Hugging Face's 0.02 the tokens are hardly told apart at first, and after 600 steps 7 of 100 unseen digits are
    read wrong instead of 2.
    """
    return (0.5 * rng.standard_normal(shape)).astype(dtype or backend.get_default_dtype())
