"""The trunk and the heads of a published FlexTok. Read `flextok_parts` first.

Paper: FlexTok, arXiv:2502.13967. Norms have no weights, attention has muP's scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.blocks import attend

Record = dict[str, Any]  # tensors by name, and the shapes that a packer leaves


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weights, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, and muP's scale 8 / head_dim."""

    def __init__(
        self, dim: int, head_dim: int, *, qkv_bias: bool, proj_bias: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.head_dim, self.qk_norm = head_dim, qk_norm
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.wq, self.wk, self.wv)
        )
        if self.qk_norm:
            query, key = norm(query), norm(key)
        # `attend` scales by head_dim ** -0.5; the rest of 8 / head_dim goes to the queries.
        mixed = attend(query * (8 * self.head_dim**-0.5), key, value, mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """SiLU MLP; gated, it has two thirds of the width and a third matrix (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int, *, bias: bool, is_gated: bool) -> None:
        super().__init__()
        hidden = int(2 * hidden / 3) if is_gated else hidden
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        if is_gated:
            self.fc3 = nn.Linear(dim, hidden, bias=bias)
        self.is_gated = is_gated

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.fc1(x))
        return self.fc2(inner * self.fc3(x) if self.is_gated else inner)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and MLP; modulated (AdaLN-zero, arXiv:2212.09748) where it has a time."""

    def __init__(self, dim: int, attn: Attention, mlp: Mlp, *, num_kinds: int | None) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.num_kinds = num_kinds
        if num_kinds is not None:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, num_kinds * 6 * dim))

    def forward(
        self, x: Tensor, mask: Tensor | None, time: Tensor | None, kind: Tensor | None
    ) -> Tensor:
        if self.num_kinds is None:
            x = x + self.attn(norm(x), mask)
            return x + self.mlp(norm(x))  # type: ignore[no-any-return]
        numbers = self.adaLN_modulation(time).unflatten(-1, (self.num_kinds, -1))[:, kind]
        # Gates come first here, and not behind their shift and scale.
        gate, mlp_gate, shift, scale, mlp_shift, mlp_scale = numbers.chunk(6, dim=-1)
        x = x + gate * self.attn(norm(x) * (1 + scale) + shift, mask)
        return x + mlp_gate * self.mlp(norm(x) * (1 + mlp_scale) + mlp_shift)  # type: ignore[no-any-return]


class FlexTransformer(nn.Module):
    """The trunk of the encoder and of the decoder."""

    def __init__(
        self,
        input_seq_read_key: str,
        output_seq_write_key: str,
        dim: int = 768,
        depth: int = 12,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mlp_bias: bool = False,
        gated_mlp: bool = True,
        qk_norm: bool = True,
        block_mask_read_key: str | None = None,
        adaLN_emb_read_key: str | None = None,
        adaLN_packing_fn_read_key: str | None = None,
        adaLN_expansion: int = 1,
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = input_seq_read_key, output_seq_write_key
        self.mask_key, self.time_key = block_mask_read_key, adaLN_emb_read_key
        self.kind_key = adaLN_packing_fn_read_key
        num_kinds = None if adaLN_emb_read_key is None else adaLN_expansion
        self.blocks = nn.ModuleList(
            Block(
                dim,
                Attention(dim, head_dim, qkv_bias=qkv_bias, proj_bias=proj_bias, qk_norm=qk_norm),
                Mlp(dim, int(dim * mlp_ratio), bias=mlp_bias, is_gated=gated_mlp),
                num_kinds=num_kinds,
            )
            for _ in range(depth)
        )

    def forward(self, record: Record) -> None:
        x = record[self.read_key]
        mask = None if self.mask_key is None else record[self.mask_key]
        time = None if self.time_key is None else record[self.time_key]
        kind = None if self.kind_key is None else record[self.kind_key]
        for block in self.blocks:
            x = block(x, mask, time, kind)
        record[self.write_key] = x


class LinearHead(nn.Module):
    """Norm, modulation where it has a time, projection; to patches of an image if it has sizes."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        dim_out: int,
        patch_sizes: tuple[int, ...],
        use_mup_readout: bool,
        adaLN_emb_read_key: str | None,
        adaLN_bias: bool,
        proj_bias: bool,
    ) -> None:
        super().__init__()
        if use_mup_readout:
            raise ValueError("use_mup_readout needs a width that is not in the checkpoint")
        self.read_key, self.write_key = read_key, write_key
        self.time_key, self.patch_sizes = adaLN_emb_read_key, patch_sizes
        if adaLN_emb_read_key is not None:
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(dim, 2 * dim, bias=adaLN_bias)
            )
        self.proj = nn.Linear(dim, dim_out, bias=proj_bias)

    def forward(self, record: Record) -> None:
        x = norm(record[self.read_key])
        if self.time_key is not None:
            numbers = self.adaLN_modulation(record[self.time_key])
            shape = (len(x), *(1 for _ in x.shape[1:-1]), -1)
            shift, scale = (part.reshape(shape) for part in numbers.chunk(2, dim=-1))
            x = x * (1 + scale) + shift
        x = self.proj(x)
        if self.patch_sizes:
            height, width = self.patch_sizes
            x = x.unflatten(-1, (height, width, -1)).transpose(2, 3)  # [B, h, p, w, q, C]
            x = x.flatten(3, 4).flatten(1, 2)
        record[self.write_key] = x


def linear_head(
    read_key: str,
    write_key: str,
    dim: int,
    dim_out: int,
    use_mup_readout: bool,
    adaLN_emb_read_key: str | None = None,
    adaLN_bias: bool = True,
    proj_bias: bool = True,
) -> LinearHead:
    """The release's LinearHead."""
    return LinearHead(
        read_key, write_key, dim, dim_out, (), use_mup_readout, adaLN_emb_read_key, adaLN_bias,
        proj_bias,
    )  # fmt: skip


def patches_head(
    read_key: str,
    write_key: str,
    dim: int,
    channels_out: int,
    patch_sizes: list[int],
    use_mup_readout: bool,
    adaLN_emb_read_key: str | None = None,
    adaLN_bias: bool = True,
    proj_bias: bool = True,
) -> LinearHead:
    """The release's ToPatchesLinearHead."""
    return LinearHead(
        read_key, write_key, dim, channels_out * math.prod(patch_sizes), tuple(patch_sizes),
        use_mup_readout, adaLN_emb_read_key, adaLN_bias, proj_bias,
    )  # fmt: skip
