"""What `flowrl tokenizer train | encode | decode` do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.commands.pretrain import run_training
from flowrl.errors import ConfigError, DataError
from flowrl.tokenizer.schema import load_tokenizer_config

if TYPE_CHECKING:
    from flowrl.pretrain.loop import PretrainRun
    from tokenizers_vis.tokenizer import Solver, VisualTokenizer


def train(config: Path, overrides: Sequence[str]) -> None:
    """Trains, evaluates and exports.

    Raises:
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    loaded = load_tokenizer_config(config, overrides)  # before torch is loaded

    def build() -> PretrainRun:
        from flowrl.tokenizer.build import build_run

        return build_run(loaded, where=config.name)

    run_training(loaded, build, describe, command=["tokenizer", "train", str(config), *overrides])


def describe(run: PretrainRun) -> str:
    """The run in three lines."""
    from flowrl.tokenizer.files import kind

    tokenizer, config = run.weights.training.tokenizer, run.config
    what = kind(tokenizer.sample_shape)
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    cut, num_images = run.batches.cut, len(run.batches)
    epochs = config.run.steps * cut.batch_size / num_images
    return "\n".join(
        [
            f"{tokenizer.name}: {trained / 1e6:.2f} M trained parameters, "
            f"{tokenizer.layout.num_tokens} tokens, {tokenizer.bits:.6g} bits per {what}",
            f"{config.data.source}: {num_images} {what}s of "
            f"{' x '.join(map(str, run.batches.shape))}, {len(run.task.held_out)} others measured",
            f"{config.run.steps} steps of {cut.batch_size} {what}s ({cut.total} x "
            f"{cut.micro_batch_size}) are {epochs:.3g} epochs",
        ]
    )


def encode(
    source: str, images: Sequence[Path], out: Path, *, num_tokens: int | None, batch_size: int
) -> None:
    """Writes the tokens of files of images or clips, whichever the tokenizer takes."""
    import torch

    from flowrl.tokenizer.files import kind, read_sample
    from flowrl.tokenizer.images import to_float
    from flowrl.tokenizer.tokenfile import TokenFile, fingerprint, write_tokens

    tokenizer, folder = load_tokenizer(source)
    shape = tokenizer.sample_shape
    files = [file for given in images for file in _files(given, shape)]
    chosen = tokenizer.token_counts[-1] if num_tokens is None else num_tokens
    device = _device()
    tokenizer.to(device)
    ids, embeddings = [], []
    for first in range(0, len(files), batch_size):
        pixels = torch.stack([read_sample(file, shape) for file in files[first:][:batch_size]])
        try:
            with torch.no_grad():
                tokens = tokenizer.encode(to_float(pixels, device), chosen).compact()
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from error
        if tokens.ids is None:
            embeddings.append(tokens.embeddings.cpu())
        else:
            ids.append(tokens.ids.cpu())
    content = TokenFile(
        folder,
        fingerprint(tokenizer),
        tuple(file.name for file in files),
        torch.full((len(files),), chosen),
        torch.cat(ids) if ids else None,
        torch.cat(embeddings) if embeddings else None,
    )
    write_tokens(out, content)
    print(
        f"{out}: {len(files)} x {chosen} tokens, {tokenizer.bits_of(chosen):.6g} bits per "
        f"{kind(shape)}, {out.stat().st_size} bytes"
    )


def decode(
    file: Path,
    out: Path,
    *,
    source: str | None,
    num_tokens: int | None,
    num_steps: int | None,
    guidance_scale: float | None,
    seed: int,
    batch_size: int,
) -> None:
    """Writes the images or clips of a file of tokens, named as those they were made of."""
    import torch

    from flowrl.tokenizer.files import kind, write_png
    from flowrl.tokenizer.tokenfile import fingerprint, read_tokens, tokens_of
    from flowrl.train.track import to_pixels

    content = read_tokens(file)
    tokenizer, folder = load_tokenizer(source or content.tokenizer)
    if fingerprint(tokenizer) != content.fingerprint:
        raise DataError(
            f"{file} was made by another tokenizer than {folder} is now: its ids mean something "
            "else. Name the one that made it by --tokenizer, or encode the images again"
        )
    if not tokenizer.is_decodable:
        raise ConfigError(f"{folder}: {tokenizer.name} has no decoder")
    solver = _solver(tokenizer, num_steps, guidance_scale)
    if num_tokens is not None:
        content = replace(content, length=content.length.clamp(max=num_tokens))
        if num_tokens not in tokenizer.token_counts:
            raise ConfigError(
                f"--num-tokens={num_tokens}: {tokenizer.name} keeps one of "
                f"{', '.join(map(str, tokenizer.token_counts))} tokens"
            )
    tokenizer.to(_device())
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    names = iter(_names(content.names))
    for first in range(0, len(content.names), batch_size):
        tokens = tokens_of(content, tokenizer, slice(first, first + batch_size))
        with torch.no_grad():
            images = tokenizer.decode(tokens, solver=solver, generator=generator)
        for image in images:
            frames = image.reshape(-1, *image.shape[-3:])
            write_png(to_pixels(frames), out / next(names))
    print(f"{out}: {len(content.names)} {kind(tokenizer.sample_shape)}s")


def load_tokenizer(source: str) -> tuple[VisualTokenizer, str]:
    """The tokenizer of a folder, a run or a Hub id, in evaluation mode; and where it is.

    Raises:
        ConfigError: there is none.
    """
    from tokenizers_vis.registry import CONFIG, load_pretrained

    folder = Path(source).expanduser()
    final = folder / "final"
    if (final / CONFIG).is_file():
        folder = final
    place = str(folder.resolve()) if folder.is_dir() else source
    try:
        return load_pretrained(place), place
    except (LookupError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _solver(
    tokenizer: VisualTokenizer, num_steps: int | None, guidance_scale: float | None
) -> Solver | None:
    given = {"num_steps": num_steps, "guidance_scale": guidance_scale}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    if not tokenizer.is_generative:
        raise ConfigError(
            f"{tokenizer.name} decodes in one forward; leave out "
            + " and ".join(f"--{name.replace('_', '-')}" for name in given)
        )
    return replace(tokenizer.config.solver, **given)


def _files(given: Path, shape: tuple[int, ...]) -> Iterator[Path]:
    """A file of an image or clip, or those of a folder."""
    from flowrl.tokenizer.files import expected, sample_files

    if not given.is_dir():
        yield given
        return
    found = sample_files(given, shape)
    if not found:
        raise DataError(f"{given} holds no {expected(shape)}, which the tokenizer takes")
    yield from found


def _names(names: Sequence[str]) -> Iterator[str]:
    """A PNG's name for every image; a name that comes again gets a number."""
    seen: dict[str, int] = {}
    for name in names:
        stem = Path(name).stem
        seen[stem] = seen.get(stem, 0) + 1
        yield f"{stem}.png" if seen[stem] == 1 else f"{stem}_{seen[stem]}.png"


def _device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(found)
