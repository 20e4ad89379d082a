"""The modules that a published FlexTok's configuration may name, and the reading of it.

Paper: FlexTok, arXiv:2502.13967. The released format is a list of modules, each of which reads and
writes entries of one record; the configuration wires them and the weights are named after them.
Here they are rebuilt for batches of equal images (the release packs lists of images into one
sequence; without a neighbour its masks say the same). Nothing is instantiated but what `PARTS`
names. Reading order: `Pipeline`, the parts in the order of a configuration, `flextok_layers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.published.flextok_layers import (
    FlexTransformer,
    Record,
    linear_head,
    patches_head,
)

KEPT, HIDDEN = "kept", "hidden"  # of a record: bool [B, L], tokens that count; bool [B], null


class Pipeline(nn.Module):
    """One part after the other: the release's SequentialModuleDictWrapper.

    Args:
        spec: its configuration, with `module_dict`.
        where: for errors, e.g. "encoder".

    Raises:
        ValueError: a part or an argument that is not known here.
    """

    def __init__(self, spec: Mapping[str, Any], *, where: str) -> None:
        super().__init__()
        if "module_dict" not in spec:
            raise ValueError(f"{where} of a FlexTok has a module_dict, got {sorted(spec)}")
        self.module_dict = nn.ModuleDict(
            {
                name: _part(part, where=f"{where}.module_dict.{name}")
                for name, part in spec["module_dict"].items()
            }
        )

    def forward(self, record: Record) -> Record:
        for part in self.module_dict.values():
            part(record)
        return record


class PerSampleOp(nn.Module):
    """Channels to the end, or back to the front."""

    def __init__(self, read_key: str, write_key: str, per_sample_op: Mapping[str, Any]) -> None:
        super().__init__()
        self.read_key, self.write_key = read_key, write_key
        operation = str(per_sample_op["_target_"]).rpartition(".")[2]
        if operation not in ("channels_first_to_last", "channels_last_to_first"):
            raise ValueError(f"the operation {operation} is not known")
        self.to_last = operation == "channels_first_to_last"

    def forward(self, record: Record) -> None:
        x = record[self.read_key]
        record[self.write_key] = x.movedim(1, -1) if self.to_last else x.movedim(-1, 1)


class PatchEmbedder(nn.Module):
    """[B, H, W, C] -> embedded patches [B, h, w, D], or [B, h * w, D] flattened."""

    def __init__(
        self,
        input_tensor_list_read_key: str,
        patches_list_write_key: str,
        patch_sizes: list[int],
        channels_in: int,
        dim: int,
        flatten_patches: bool = True,
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = input_tensor_list_read_key, patches_list_write_key
        self.patch_sizes, self.flatten_patches = tuple(patch_sizes), flatten_patches
        self.patch_proj = nn.Linear(channels_in * math.prod(patch_sizes), dim)

    def forward(self, record: Record) -> None:
        x = record[self.read_key]
        height, width = self.patch_sizes
        x = x.unflatten(2, (-1, width)).unflatten(1, (-1, height))  # [B, h, p, w, q, C]
        x = self.patch_proj(x.transpose(2, 3).flatten(3))
        record[self.write_key] = x.flatten(1, 2) if self.flatten_patches else x


class PositionalEmbeddingAdder(nn.Module):
    """Adds places: a fixed table of sines, or learnt ones for one or two axes."""

    def __init__(
        self,
        read_key: str,
        write_key: str,
        dim: int,
        max_sizes: list[int],
        posemb_type: str = "sincos",
        posemb_scaling: str = "absolute",
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = read_key, write_key
        self.max_sizes, self.kind, self.scaling = tuple(max_sizes), posemb_type, posemb_scaling
        axes = len(max_sizes)
        if posemb_type == "sincos" and axes == 2:
            self.posembs = nn.Parameter(_sines(*max_sizes, dim=dim), requires_grad=False)
        elif posemb_type in ("learnable_sum", "learnable_prod") and axes <= 2:
            self.posembs = nn.Parameter(0.02 * torch.randn(axes, 1, dim, max_sizes[0]))
        else:
            raise ValueError(f"posemb_type {posemb_type} on {axes} axes is not known")
        if posemb_scaling not in ("absolute", "interpolate"):
            raise ValueError(f"posemb_scaling {posemb_scaling} is not known")

    def forward(self, record: Record) -> None:
        x = record[self.read_key]
        record[self.write_key] = x + self._places(tuple(x.shape[1:-1])).movedim(1, -1)

    def _places(self, shape: tuple[int, ...]) -> Tensor:
        table: Tensor = self.posembs
        if self.kind != "sincos":
            table = self.posembs[0]
            if len(self.max_sizes) == 2:
                rows, columns = self.posembs[0][..., None], self.posembs[1][..., None, :]
                table = rows + columns if self.kind == "learnable_sum" else rows * columns
        if self.scaling == "interpolate":
            mode = "linear" if len(shape) == 1 else "bilinear"
            return F.interpolate(table, shape, mode=mode, align_corners=True)
        index = (slice(None), slice(None), *(slice(size) for size in shape))
        return table[index]


class Registers1D(nn.Module):
    """The registers' first values, as many as there are."""

    def __init__(
        self,
        input_tensor_list_read_key: str,
        registers_write_key: str,
        dim: int,
        n_max: int,
        n_eval: int | None = None,
    ) -> None:
        super().__init__()
        if n_eval not in (None, n_max):
            raise ValueError(f"n_eval {n_eval} other than n_max {n_max} is not known")
        self.read_key, self.write_key = input_tensor_list_read_key, registers_write_key
        self.registers = nn.Parameter(0.02 * torch.randn(n_max, dim))

    def forward(self, record: Record) -> None:
        batch = len(record[self.read_key])
        record[self.write_key] = self.registers.expand(batch, -1, -1)


class LinearLayer(nn.Module):
    """A projection."""

    def __init__(
        self, read_key: str, write_key: str, dim_in: int, dim: int, proj_bias: bool = True
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = read_key, write_key
        self.proj = nn.Linear(dim_in, dim, bias=proj_bias)

    def forward(self, record: Record) -> None:
        record[self.write_key] = self.proj(record[self.read_key])


class MaskedNestedDropout(nn.Module):
    """One learnt vector in place of every token that does not count."""

    def __init__(self, read_write_key: str, dim: int) -> None:
        super().__init__()
        self.key = read_write_key
        self.dropout_mask_token = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, record: Record) -> None:
        if KEPT in record:
            x = record[self.key]
            record[self.key] = torch.where(record[KEPT][..., None], x, self.dropout_mask_token)


class NullCond(nn.Module):
    """The null condition, learnt or zero, in place of all tokens of an image."""

    def __init__(self, read_write_key: str, dim: int | None, dropout_prob: float) -> None:
        super().__init__()
        self.key, self.dropout_prob = read_write_key, dropout_prob
        self.nullcond = None if dim is None else nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, record: Record) -> None:
        if HIDDEN in record:
            x = record[self.key]
            null = x.new_zeros(()) if self.nullcond is None else self.nullcond
            record[self.key] = torch.where(record[HIDDEN][:, None, None], null, x)


def learned_null(
    read_write_key: str,
    dim: int,
    dropout_prob: float = 0.0,
    replace_with_single_token: bool = False,
) -> NullCond:
    """The release's LearnedNullCond."""
    if replace_with_single_token:
        raise ValueError("a null condition of a single token is not known")
    return NullCond(read_write_key, dim, dropout_prob)


def zero_null(read_write_key: str, dropout_prob: float = 0.0) -> NullCond:
    """The release's ZeroNullCond."""
    return NullCond(read_write_key, None, dropout_prob)


class SequencePacker(nn.Module):
    """Sequences one after the other, with their mask: the release's BlockWiseSequencePacker."""

    def __init__(
        self,
        input_list_read_keys: list[str],
        packed_seq_write_key: str,
        block_mask_write_key: str,
        inner_packed_shapes_write_key: str,
        mask_mode: str = "full",
        per_subseq_embs: bool = False,
        emb_packing_fn_write_key: str | None = None,
    ) -> None:
        super().__init__()
        if mask_mode not in ("full", "causal", "causal_last"):
            raise ValueError(f"mask_mode {mask_mode} is not known")
        self.read_keys, self.write_key = tuple(input_list_read_keys), packed_seq_write_key
        self.mask_key, self.shapes_key = block_mask_write_key, inner_packed_shapes_write_key
        self.mask_mode, self.per_subseq_embs = mask_mode, per_subseq_embs
        self.kind_key = emb_packing_fn_write_key

    def forward(self, record: Record) -> None:
        parts = [record[key] for key in self.read_keys]
        flat = [part.flatten(1, -2) for part in parts]
        lengths = [part.shape[1] for part in flat]
        x = torch.cat(flat, dim=1)
        record[self.write_key] = x
        record[self.shapes_key] = [part.shape[1:-1] for part in parts]
        place = torch.arange(x.shape[1], device=x.device)
        mask = None
        if self.mask_mode != "full":
            mask = place[:, None] >= place
            if self.mask_mode == "causal_last":
                mask = mask | (place < sum(lengths[:-1]))
        record[self.mask_key] = mask
        if self.kind_key is not None:  # which modulation a position has
            number = torch.arange(len(parts), device=x.device) * self.per_subseq_embs
            record[self.kind_key] = number.repeat_interleave(torch.tensor(lengths, device=x.device))


class SequenceUnpacker(nn.Module):
    """The inverse of `SequencePacker`."""

    def __init__(
        self,
        packed_seq_read_key: str,
        inner_seq_write_keys: list[str],
        inner_packed_shapes_read_key: str,
    ) -> None:
        super().__init__()
        self.read_key, self.write_keys = packed_seq_read_key, tuple(inner_seq_write_keys)
        self.shapes_key = inner_packed_shapes_read_key

    def forward(self, record: Record) -> None:
        shapes = record[self.shapes_key]
        parts = record[self.read_key].split([math.prod(shape) for shape in shapes], dim=1)
        for key, part, shape in zip(self.write_keys, parts, shapes, strict=True):
            record[key] = part.unflatten(1, tuple(shape))


class TimestepEmbedder(nn.Module):
    """Sinusoids of the noise level, then an MLP; its lowest frequency is 1 / 256 of the highest."""

    def __init__(
        self,
        timesteps_read_key: str,
        time_embedding_write_key: str,
        dim: int,
        frequency_embedding_size: int = 256,
        max_timestep: float = 1000.0,
    ) -> None:
        super().__init__()
        self.read_key, self.write_key = timesteps_read_key, time_embedding_write_key
        self.num_frequencies, self.scale = frequency_embedding_size // 2, 1000.0 / max_timestep
        if frequency_embedding_size % 2:
            raise ValueError(f"frequency_embedding_size {frequency_embedding_size} is odd")
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, dim), nn.SiLU(), nn.Linear(dim, dim)
        )

    def forward(self, record: Record) -> None:
        time = record[self.read_key]
        exponent = torch.arange(self.num_frequencies, device=time.device) / self.num_frequencies
        angle = time.float()[:, None] * self.scale * torch.exp(-math.log(256) * exponent)
        record[self.write_key] = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


# The last word of a part's _target_ -> what makes it.
PARTS: dict[str, Any] = {
    "BlockWiseSequencePacker": SequencePacker,
    "FlexTransformer": FlexTransformer,
    "LearnedNullCond": learned_null,
    "LinearHead": linear_head,
    "LinearLayer": LinearLayer,
    "MaskedNestedDropout": MaskedNestedDropout,
    "PatchEmbedder": PatchEmbedder,
    "PerSampleOp": PerSampleOp,
    "PositionalEmbeddingAdder": PositionalEmbeddingAdder,
    "Registers1D": Registers1D,
    "SequenceUnpacker": SequenceUnpacker,
    "TimestepEmbedder": TimestepEmbedder,
    "ToPatchesLinearHead": patches_head,
    "ZeroNullCond": zero_null,
}
# Arguments that change nothing here: of training, of packing, or of names that are ours.
IGNORED = {
    "weight_init_style", "zero_init_query_proj", "use_act_checkpoint", "drop", "drop_path_rate",
    "n_min", "size_sampling_mode", "ordering_mode", "register_sizes_read_write_key",
    "n_patches_write_key", "max_seq_len", "pad_to_multiple", "compile_block_mask",
    "return_materialized_mask", "outer_packed_shapes_write_key", "outer_packed_shapes_read_key",
    "eval_keep_k_read_key", "train_keep_k_write_key", "eval_drop_flag_read_key", "dtype_override",
    "posemb_write_key", "intermediate_layer_write_key", "intermediate_layers",
    "_convert_", "_recursive_",
}  # fmt: skip
# Arguments that are known at one value only (the release's default).
FIXED = {"score_mod_read_key": None, "rope_forward_read_key": None, "temb_as_tokens": False,
         "extra_registers_write_key": None, "extra_registers_dim": None}  # fmt: skip


def _part(spec: Mapping[str, Any], *, where: str) -> nn.Module:
    """One part of a configuration."""
    target = str(spec.get("_target_", "")).rpartition(".")[2]
    if target not in PARTS:
        raise ValueError(f"{where}: the part {spec.get('_target_')} is not known here")
    args = {key: value for key, value in spec.items() if key not in IGNORED | {"_target_"}}
    for key in FIXED.keys() & args.keys():
        if args.pop(key) != FIXED[key]:
            raise ValueError(f"{where}: {key} other than {FIXED[key]} is not known here")
    for key in ("norm_layer", "act_layer"):
        if key in args and not _is_default(args.pop(key)):
            raise ValueError(f"{where}: {key} {spec[key]} is not known here")
    try:
        return PARTS[target](**args)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _is_default(layer: Any) -> bool:
    """Whether a layer of a configuration is a norm without weights, or SiLU."""
    if not isinstance(layer, Mapping):
        return False
    target = str(layer.get("_target_", "")).rpartition(".")[2]
    return target == "SiLU" or (
        target == "Fp32LayerNorm" and layer.get("elementwise_affine") is False
    )


def _sines(height: int, width: int, *, dim: int) -> Tensor:
    """[1, dim, height, width] of MoCo v3: sin and cos of the row, then of the column."""
    if dim % 4:
        raise ValueError(f"places of sines need a width that 4 divides, got {dim}")
    omega = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    rows = (torch.arange(height)[:, None] * omega)[:, None].expand(-1, width, -1)
    columns = (torch.arange(width)[:, None] * omega)[None].expand(height, -1, -1)
    table = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1)
    return table.permute(2, 0, 1)[None].contiguous()
