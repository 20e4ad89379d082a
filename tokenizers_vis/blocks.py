"""One transformer block for every model here: boolean mask, rotary places, AdaLN, KV cache.

timm's block has neither a mask nor modulation, and Llama's positions are one-dimensional; the
tokenizers and the autoregressive models on them need all of these together. Reading order:
`Attention`, `Block`, `Transformer`; masks by `causal_mask` and `level_causal_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [L, head_dim / 2] each
_SHORT = 160  # positions up to which plain products are faster on a CPU, in float32, too


class KVCache:
    """Keys and values of the positions so far, for one attention layer.

    Without gradient they are written into room that doubles when it is full, so that a new position
    costs no copy of all before it; with gradient they are joined.
    """

    def __init__(self) -> None:
        self.length = 0
        self._room: list[Tensor] = []

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [B, heads, S, head_dim], the new ones last."""
        start, self.length = self.length, self.length + keys.shape[2]
        if not start:
            self._room = [keys, values]
        elif torch.is_grad_enabled():
            pairs = zip(self._room, (keys, values), strict=True)
            self._room = [torch.cat([old[:, :, :start], new], 2) for old, new in pairs]
        else:
            if self._room[0].shape[2] < self.length:
                self._room = [F.pad(old, (0, 0, 0, 2 * self.length - start)) for old in self._room]
            for old, new in zip(self._room, (keys, values), strict=True):
                old[:, :, start : self.length] = new
        keys, values = (each[:, :, : self.length] for each in self._room)
        return keys, values

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` positions."""
        self.length = min(self.length, length)


class HeadNorm(nn.Module):
    """RMSNorm in its input's dtype; torch's own is slow where autocast made the two differ."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys.

    Args:
        dim: width.
        num_heads: that divide it.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.query_norm = HeadNorm(dim // num_heads)
        self.key_norm = HeadNorm(dim // num_heads)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D].

        Args:
            x: the positions, with a cache only the new ones.
            mask: bool [L, S], [B, L, S] or [B, 1, L, S]; True = position l sees position s.
            rotation: of the positions in x.
            cache: of the positions before.
        """
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = self.query_norm(qkv[0]), self.key_norm(qkv[1])
        value = qkv[2]
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.extend(key, value)
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        mixed = attend(query, key, value, mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention [B, heads, L, head_dim]; bool mask, True = is seen.

    On a CPU short sequences go by plain products: forward and backward at 96 positions in bfloat16
    take 14 ms, and 64 ms by torch's kernel (float32: 25 and 29).
    """
    if query.device.type != "cpu" or key.shape[2] > _SHORT:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(value.dtype) @ value


class SwiGlu(nn.Module):
    """The gated MLP of arXiv:2002.05202: W_o (SiLU(W_g x) * W_u x)."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and gated MLP; with a condition, AdaLN-zero (arXiv:2212.09748).

    Args:
        dim: width.
        num_heads: that divide it.
        condition_dim: width of the condition; None = no modulation.
        num_kinds: of positions, each modulated in its own way.
    """

    def __init__(
        self, dim: int, num_heads: int, *, condition_dim: int | None = None, num_kinds: int = 1
    ) -> None:
        super().__init__()
        affine = condition_dim is None
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)
        self.attention = Attention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)
        self.mlp = SwiGlu(dim, 8 * dim // 3)
        self.num_kinds = num_kinds
        self.modulation: nn.Linear | None = None
        if condition_dim is not None:
            self.modulation = nn.Linear(condition_dim, 6 * dim * num_kinds)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rotation: Rotation | None = None,
        condition: Tensor | None = None,
        kind: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D], with what `Attention.forward` takes.

        A modulated block takes a condition [B, condition_dim], and int64 kinds [L] of the positions
        where there are several.
        """
        if self.modulation is None:
            x = x + self.attention(
                self.attention_norm(x), mask=mask, rotation=rotation, cache=cache
            )
            return x + self.mlp(self.mlp_norm(x))
        if condition is None:
            raise ValueError("this block is modulated: give a condition [B, C]")
        numbers = self.modulation(F.silu(condition)).view(len(x), self.num_kinds, -1)
        if kind is not None:  # a product, whose gradient is faster than that of an index
            numbers = F.one_hot(kind, self.num_kinds).to(numbers) @ numbers
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = numbers.chunk(6, dim=-1)
        inner = self.attention_norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(inner, mask=mask, rotation=rotation, cache=cache)
        return x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)


class Transformer(nn.Module):
    """Blocks one after the other, all with the same mask and places, and a last norm.

    Args:
        dim, num_heads, condition_dim, num_kinds: as `Block`'s.
        depth: number of blocks.
        rotary_axes: 0 = no rotary places, else the number of coordinates that `forward` is given.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        num_heads: int,
        condition_dim: int | None = None,
        num_kinds: int = 1,
        rotary_axes: int = 0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, condition_dim=condition_dim, num_kinds=num_kinds)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head_dim = dim // num_heads
        self.rotary_axes = rotary_axes

    def new_cache(self) -> list[KVCache]:
        """An empty cache for every block."""
        return [KVCache() for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
        condition: Tensor | None = None,
        kind: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D], with what `Block.forward` takes, one cache per block.

        Where there are rotary axes it takes coords [L, rotary_axes]; NaN = no place on that axis.
        """
        rotation = None
        if self.rotary_axes:
            if coords is None or coords.shape[-1] != self.rotary_axes:
                raise ValueError(f"rotary places need coords [L, {self.rotary_axes}]")
            rotation = rotation_of(coords.to(x.device), self.head_dim)
        caches = cache if cache is not None else [None] * len(self.blocks)
        for block, own in zip(self.blocks, caches, strict=True):
            x = block(x, mask=mask, rotation=rotation, condition=condition, kind=kind, cache=own)
        return self.norm(x)


def rotation_of(coords: Tensor, head_dim: int, *, base: float = 100.0) -> Rotation:
    """The rotation of every place: an equal share of the pairs of a head for each axis.

    Paper: RoFormer, arXiv:2104.09864, on several axes as in 2-D RoPE. Frequencies run from half a
    turn per unit of a coordinate up to `base` times that (a coordinate of [0, 1] has cell centres,
    so the same weights serve other resolutions). NaN: not rotated on that axis.

    Args:
        coords: [L, A].
        head_dim: of which A * 2 pairs fit at least once.
        base: ratio of the highest to the lowest frequency.
    """
    axes, pairs = coords.shape[-1], head_dim // 2
    per_axis = pairs // axes
    if per_axis < 1:
        raise ValueError(f"heads of {head_dim} are too narrow for rotary places on {axes} axes")
    spread = torch.linspace(0, 1, per_axis, device=coords.device)
    frequency = math.pi * base**spread
    angle = torch.nan_to_num(coords)[..., None] * frequency
    angle = angle.flatten(-2)
    angle = F.pad(angle, (0, pairs - angle.shape[-1]))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Pairs (first half, second half) of x [..., L, head_dim], turned by the rotation."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def time_embedding(time: Tensor, dim: int, *, scale: float = 1000.0) -> Tensor:
    """Sinusoids [B, dim] of a time [B] in [0, 1] (arXiv:1706.03762, as in DiT)."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device) / half)
    angle = scale * time.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def causal_mask(length: int, *, device: torch.device | None = None) -> Tensor:
    """Bool [L, L]: a position sees itself and those before."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def level_causal_mask(level: Tensor) -> Tensor:
    """Bool [L, L]: a position sees its own level [L] and lower ones (VAR, HieraTok)."""
    return level[:, None] >= level[None, :]


def image_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, H/p * W/p, C * p * p], row by row."""
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height} x {width} does not divide into patches of {patch_size}")
    grid = images.reshape(
        batch, channels, height // patch_size, patch_size, width // patch_size, patch_size
    )
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def patches_to_image(patches: Tensor, patch_size: int, *, height: int, width: int) -> Tensor:
    """The inverse of `image_to_patches`; height and width in pixels."""
    batch, rows, columns = len(patches), height // patch_size, width // patch_size
    grid = patches.reshape(batch, rows, columns, -1, patch_size, patch_size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)
