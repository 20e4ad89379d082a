"""Tokens as a file: one safetensors file of ids (or embeddings), with where they come from.

Ids are stored in the smallest type that holds them. Reading order: `TokenFile`, `write_tokens`,
`read_tokens`, `tokens_of`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowrl.errors import DataError
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.tokens import Tokens

FORMAT = "flowrl.tokens/1"


@dataclass(frozen=True)
class TokenFile:
    """The tokens of N images or clips.

    Attributes:
        tokenizer: folder or Hub id of what made them.
        fingerprint: of its configuration and weights.
        names: of the files.
        length: int64 [N], tokens of each.
        ids: int64 [N, L] or [N, L, G]; None where tokens are continuous.
        embeddings: [N, L, C], only where tokens are continuous.
    """

    tokenizer: str
    fingerprint: str
    names: tuple[str, ...]
    length: Tensor
    ids: Tensor | None = None
    embeddings: Tensor | None = None


def write_tokens(file: Path, content: TokenFile) -> None:
    """Writes a file of tokens; its folder is made if need be."""
    tensors = {"length": content.length}
    if content.ids is not None:
        tensors["ids"] = content.ids.to(_smallest(content.ids)).contiguous()
    elif content.embeddings is not None:
        tensors["embeddings"] = content.embeddings.contiguous()
    about = {
        "format": FORMAT,
        "tokenizer": content.tokenizer,
        "fingerprint": content.fingerprint,
        "names": json.dumps(list(content.names)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=about)


def read_tokens(file: Path) -> TokenFile:
    """What `write_tokens` wrote.

    Raises:
        DataError: there is no such file, or it is another kind of file.
    """
    if not file.is_file():
        raise DataError(
            f"{file}: there is no such file; give one that flowrl tokenizer encode wrote"
        )
    try:
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{file} is no safetensors file ({error})") from error
    if about.get("format") != FORMAT:
        raise DataError(
            f"{file} holds no tokens: its format is {about.get('format')!r}, expected {FORMAT!r}"
        )
    ids = tensors.get("ids")
    return TokenFile(
        about["tokenizer"],
        about["fingerprint"],
        tuple(json.loads(about["names"])),
        tensors["length"],
        None if ids is None else ids.long(),
        tensors.get("embeddings"),
    )


def tokens_of(content: TokenFile, tokenizer: VisualTokenizer, rows: slice) -> Tokens:
    """The tokens of some of the images, as the tokenizer's own."""
    device = next(tokenizer.parameters()).device
    length = content.length[rows].to(device)
    if content.ids is not None:
        return tokenizer.tokens_from_ids(content.ids[rows].to(device), length)
    assert content.embeddings is not None
    embeddings = content.embeddings[rows].to(device)
    mask = torch.arange(embeddings.shape[1], device=device) < length[:, None]
    return Tokens(embeddings, mask, tokenizer.layout)


def fingerprint(tokenizer: VisualTokenizer) -> str:
    """A hash of configuration and weights, whatever folder they lie in."""
    digest = hashlib.sha256(json.dumps(tokenizer.config_dict(), sort_keys=True).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _smallest(ids: Tensor) -> torch.dtype:
    most = int(ids.max()) if ids.numel() else 0
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if most <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
