"""Does my tokenizer do what flowrl relies on? The rules are those of `check_tokenizer`.

Reading order: `check_tokenizer`, then what it calls, in its order.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowrl.testing.words import require, require_same

_ENOUGH_STEPS = 3  # AdaLN-zero lets no gradient through until its gates have moved


def check_tokenizer(tokenizer: Any, images: Tensor, *, tolerance: float = 1e-4) -> None:
    """Raises unless `tokenizer`, a `tokenizers_vis.tokenizer.VisualTokenizer`, keeps its word.

    Encoding: in evaluation mode it is a pure function that draws no number and changes no state;
    in training mode, too, it changes no state; embeddings are float32 [B, L, C] and finite, ids
    int64 within the codebook; every number of tokens of `token_counts` can be kept, and masks
    exactly the others; another number, and images of another shape, are refused by a ValueError; an
    image's tokens do not depend on its neighbours. Ids lead back to the same embeddings, bit by
    bit, also for fewer positions. Decoding: images float32 of the samples' shape in [0, 1], the
    same for the same generator, whatever lies beyond the mask. Dtypes, and the way back from ids,
    are the same under bfloat16 autocast. Training: named, weighted, finite losses; their gradient,
    and that of the tokens' embeddings, reaches every parameter that encoding has. What
    `save_pretrained` wrote loads as the same tokenizer.

    Args:
        tokenizer: small enough to run some twenty times; its weights are not changed.
        images: float [B, *sample_shape] in [0, 1], of two images or more that differ.
        tolerance: absolute, for what may differ by rounding.
    """
    require(len(images) > 1, "images", "two or more", len(images))
    tokenizer = copy.deepcopy(tokenizer).eval()
    with torch.no_grad():
        _check_encode(tokenizer, images, tolerance)
        _check_refusals(tokenizer, images)
        if tokenizer.encode(images).ids is not None:
            _check_ids(tokenizer, images)
        _check_autocast(tokenizer, images)
    _check_training(tokenizer, images)
    tokenizer.eval()
    with torch.no_grad():  # after training: closed gates would hide what a decoder looks at
        if tokenizer.is_decodable:
            _check_decode(tokenizer, images, tolerance)
        _check_saving(tokenizer, images)


def _check_encode(tokenizer: Any, images: Tensor, tolerance: float) -> None:
    state, before = torch.get_rng_state(), _state(tokenizer)
    tokens = tokenizer.encode(images)
    again = tokenizer.encode(images)
    require_same(torch.get_rng_state(), state, 0, "the random state", "after encode()")
    for name, value in _state(tokenizer).items():
        require_same(value, before[name], 0, name, "after encode() in evaluation mode")
    tokenizer.train().encode(images)
    tokenizer.eval()
    for name, value in _state(tokenizer).items():
        require_same(value, before[name], 0, name, "after encode() in training mode")
    require_same(
        again.embeddings, tokens.embeddings, 0, "embeddings", "when encode() is called twice"
    )
    embeddings = tokens.embeddings
    wanted = (len(images), tokenizer.layout.num_tokens)
    shape = tuple(embeddings.shape[:2])
    require(
        shape == wanted and embeddings.ndim == 3,
        "embeddings",
        f"{[*wanted, 'C']}",
        embeddings.shape,
    )
    require(embeddings.dtype == torch.float32, "embeddings", "float32", embeddings.dtype)
    require(bool(embeddings.isfinite().all()), "embeddings", "finite numbers", "NaN or infinity")
    require(bool(tokens.mask.all()), "the mask of all tokens", "True", "False somewhere")
    alone = tokenizer.encode(images[:1])
    if tokens.ids is None:
        require_same(alone.embeddings, embeddings[:1], tolerance, "embeddings", "of an image alone")
    else:
        share = float((alone.ids == tokens.ids[:1]).float().mean())
        require(share > 0.9, "ids of an image alone", "as in a batch", f"{share:.0%} agree")
    counts = tokenizer.token_counts
    require(list(counts) == sorted(set(counts)), "token_counts", "ascending", counts)
    for count in {counts[0], counts[len(counts) // 2], counts[-1]}:
        kept = tokenizer.encode(images, count).length
        require(
            bool((kept == count).all()),
            f"encode(num_tokens={count})",
            f"of {count} tokens",
            kept.tolist(),
        )


def _check_refusals(tokenizer: Any, images: Tensor) -> None:
    beyond = tokenizer.token_counts[-1] + 1
    _refuses(lambda: tokenizer.encode(images, beyond), f"encode(num_tokens={beyond})")
    _refuses(lambda: tokenizer.encode(images, 0), "encode(num_tokens=0)")
    if between := [n for n in range(1, beyond) if n not in tokenizer.token_counts]:
        _refuses(lambda: tokenizer.encode(images, between[0]), f"encode(num_tokens={between[0]})")
    _refuses(lambda: tokenizer.encode(images[..., :-1]), "encode() of images of another shape")


def _check_ids(tokenizer: Any, images: Tensor) -> None:
    tokens = tokenizer.encode(images)
    require(tokens.ids.dtype == torch.int64, "ids", "int64", tokens.ids.dtype)
    back = tokenizer.tokens_from_ids(tokens.ids)
    require_same(back.embeddings, tokens.embeddings, 0, "embeddings", "when they come from the ids")
    if len(tokenizer.token_counts) > 1:
        count = tokenizer.token_counts[0]
        prefix = tokenizer.tokens_from_ids(tokens.ids[:, :count])
        mask = tokenizer.encode(images, count).mask
        require_same(prefix.mask, mask, 0, "the mask", "when it comes from a prefix's ids")
        length = torch.full((len(images),), count, device=images.device)
        cut = tokenizer.tokens_from_ids(tokens.ids, length)
        require_same(cut.mask, mask, 0, "the mask", "when it comes from ids and their length")
    _refuses(lambda: tokenizer.tokens_from_ids(tokens.ids + 10**9), "ids beyond the codebook")
    found = tokenizer.usage(tokens.ids)
    require(bool(found), "usage()", "statistics by name", found)


def _check_decode(tokenizer: Any, images: Tensor, tolerance: float) -> None:
    def decoded(tokens: Any) -> Tensor:
        return tokenizer.decode(tokens, generator=torch.Generator().manual_seed(1))  # type: ignore[no-any-return]

    for count in {tokenizer.token_counts[0], tokenizer.token_counts[-1]}:
        tokens = tokenizer.encode(images, count)
        drawn = decoded(tokens)
        require(drawn.shape == images.shape, "decode()", f"{list(images.shape)}", list(drawn.shape))
        in_range = bool(((drawn >= 0) & (drawn <= 1)).all())
        require(in_range, "decoded images", "within [0, 1]", f"{drawn.min()} to {drawn.max()}")
        require_same(
            decoded(tokens), drawn, 0, "images", "when decode() is called twice with a seed"
        )
        mask = tokens.mask[..., None]
        garbage = torch.where(mask, tokens.embeddings, 1e3 * torch.ones_like(tokens.embeddings))
        ids = tokens.ids
        if ids is not None:
            inside = tokens.mask if ids.ndim == 2 else mask
            ids = torch.where(inside, ids, ids.flip(0))
        spoilt = type(tokens)(garbage, tokens.mask, tokens.layout, ids)
        require_same(
            decoded(spoilt), drawn, 0, f"images of {count} tokens", "whatever the others are"
        )
        alone = decoded(tokens.select(torch.tensor([0], device=images.device)))
        require_same(alone, drawn[:1], tolerance, "an image", "when it is decoded alone")


def _check_autocast(tokenizer: Any, images: Tensor) -> None:
    where = "under autocast"
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        tokens = tokenizer.encode(images)
        dtype = tokens.embeddings.dtype
        require(dtype == torch.float32, f"embeddings {where}", "float32", dtype)
        if tokens.ids is not None:
            back = tokenizer.tokens_from_ids(tokens.ids).embeddings
            require_same(back, tokens.embeddings, 0, "embeddings from ids", where)
        if tokenizer.is_decodable:
            drawn = tokenizer.decode(tokens)
            require(drawn.dtype == torch.float32, f"images {where}", "float32", drawn.dtype)


def _check_saving(tokenizer: Any, images: Tensor) -> None:
    from tokenizers_vis.registry import load_pretrained, save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(tokenizer, folder)
        loaded = load_pretrained(folder).to(images.device)
    require(
        loaded.config == tokenizer.config, "a loaded config", f"{tokenizer.config}", loaded.config
    )
    tokens, same = tokenizer.encode(images), loaded.encode(images)
    require_same(same.embeddings, tokens.embeddings, 0, "embeddings", "when saved and loaded")
    if tokenizer.is_decodable:
        drawn, again = tokenizer.decode(tokens), loaded.decode(tokens)
        require_same(again, drawn, 0, "decoded images", "when saved and loaded")


def _check_training(tokenizer: Any, images: Tensor) -> None:
    parameters = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    tokens = tokenizer.encode(images)
    traced = tokens.embeddings if tokens.features is None else tokens.features
    require(traced.requires_grad, "encode() with gradients on", "a gradient", "none")
    traced.float().square().sum().backward()
    encoding = [name for name, p in parameters.items() if p.grad is not None]
    tokenizer.train()
    _check_straight_through(tokenizer, images, {name: parameters[name] for name in encoding})
    optimizer = torch.optim.Adam(list(parameters.values()), lr=1e-3)
    counts = torch.tensor(tokenizer.token_counts, device=images.device)
    drawn = counts[torch.arange(len(images), device=images.device) % len(counts)]
    for step in range(_ENOUGH_STEPS):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        output = tokenizer(images, progress=0.5, num_tokens=drawn, generator=generator)
        for name, term in output.losses.items():
            is_scalar = term.value.ndim == 0 and bool(term.value.isfinite())
            require(is_scalar, f"loss '{name}'", "a finite scalar", term.value)
        require(bool((output.tokens.length == drawn).all()), "tokens kept in training",
                f"{drawn.tolist()}", output.tokens.length.tolist())  # fmt: skip
        output.loss.backward()
        optimizer.step()
    cut_off = [n for n in encoding if parameters[n].grad is None or not parameters[n].grad.any()]
    require(not cut_off, "the losses' gradient", "in all of the encoder", f"none in {cut_off}")


def _check_straight_through(tokenizer: Any, images: Tensor, encoding: dict[str, Tensor]) -> None:
    """What a decoder, a prior or a teacher says to the tokens must reach who made them."""
    generator = torch.Generator().manual_seed(0)
    embeddings = tokenizer(images, progress=1.0, generator=generator).tokens.embeddings
    require(embeddings.requires_grad, "embeddings in training", "with a gradient", "none")
    # In a random direction: the sum of squares of bits, or of unit codes, is constant.
    direction = torch.randn(embeddings.shape, generator=generator).to(embeddings)
    found = torch.autograd.grad(
        (embeddings * direction).sum(), list(encoding.values()), allow_unused=True
    )
    cut_off = [
        name
        for name, gradient in zip(encoding, found, strict=True)
        if gradient is None or not gradient.any()
    ]
    require(not cut_off, "the embeddings' gradient", "in all of the encoder", f"none in {cut_off}")


def _refuses(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except ValueError:
        return
    require(False, what, "a ValueError", "no error")


def _state(tokenizer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tokenizer.state_dict().items()}
