"""What `flowrl tokenizer eval` and `flowrl tokenizer report` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from flowrl.tokenizer.evaluation.evaluate import Record


def evaluate_all(
    sources: Sequence[str],
    *,
    data: str,
    out: Path,
    name: str | None,
    num_images: int,
    num_train: int,
    num_tokens: str | None,
    num_steps: int | None,
    guidance_scale: float | None,
    features: str,
    lpips: str | None,
    lpips_backbone: str | None,
    ar_steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Measures tokenizers one after the other; each gets a folder in OUT, replaced if it is there.

    Args:
        sources: folders of tokenizers, of their runs, or Hub ids.
        data: "shapes", a folder of images or a Hugging Face data set.
        out: folder that gets a folder per tokenizer.
        name: of the only tokenizer; None = by its source.
        num_images: held-out images that are measured.
        num_train: images that the probes are trained on.
        num_tokens: numbers separated by commas; None = powers of two and all.
        num_steps: of a generative decoder; None = its own.
        guidance_scale: of a generative decoder; None = its own.
        features: see `load_features`.
        lpips: file of LPIPS's heads; None = LPIPS is left out.
        lpips_backbone: file of its network; None = the one in torch's cache.
        ar_steps: of the autoregressive probe; 0 = it is left out.
        batch_size: images per forward.
        seed: of everything that is drawn.

    Raises:
        ConfigError: a source, a name or a number that does not fit.
    """
    names = [name] if name is not None else [name_of(source) for source in sources]
    if len(set(names)) < len(sources):
        raise ConfigError(
            f"{len(sources)} tokenizers would be called {', '.join(names)}; evaluate them one by "
            "one, with --name"
        )
    counts = None if num_tokens is None else _numbers(num_tokens)
    from flowrl.commands.tokenizer_tools import load_tokenizer
    from flowrl.tokenizer.evaluation.ar_probe import ArSettings
    from flowrl.tokenizer.evaluation.evaluate import Settings, evaluate
    from flowrl.tokenizer.evaluation.features import load_features
    from flowrl.tokenizer.evaluation.page import file_name, write_evaluation
    from flowrl.tokenizer.evaluation.perceptual import load_lpips
    from flowrl.tokenizer.evaluation.samples import load_samples

    device = _device()
    network = load_features(features, device=device)
    distance = None if lpips is None else load_lpips(lpips, lpips_backbone, device=device)
    ar = ArSettings(steps=ar_steps) if ar_steps else None
    settings = Settings(counts=counts, batch_size=batch_size, seed=seed, ar=ar)
    for source, title in zip(sources, names, strict=True):
        tokenizer = load_tokenizer(source)[0].to(device)
        if len(tokenizer.sample_shape) != 3:
            raise ConfigError(
                f"{source} takes clips {list(tokenizer.sample_shape)}; there is no source of clips"
            )
        size = (tokenizer.sample_shape[1], tokenizer.sample_shape[2])
        held_out, train = load_samples(
            data, size, num_held_out=num_images, num_train=num_train, seed=seed
        )
        solver = solver_of(tokenizer, num_steps, guidance_scale)
        result = evaluate(
            tokenizer,
            held_out,
            train,
            features=network,
            lpips=distance,
            settings=replace(settings, solver=solver),
        )
        file = write_evaluation(result, out / file_name(title), name=title, source=source)
        _say(f"{title}: {summary(result.record)}")
        _say(str(file))


def report(evaluations: Sequence[Path], *, out: Path, claims: Path | None) -> None:
    """Writes the page of evaluations and prints the files' names."""
    from flowrl.tokenizer.evaluation.page import make_page

    if out.suffix != ".html":
        raise ConfigError(f"--out={out}: the page is an .html file")
    for path in make_page(evaluations, out, claims=claims):
        _say(str(path))


def name_of(source: str) -> str:
    """What a tokenizer is called: the last part of its source, of NAME/final the one before."""
    parts = [part for part in Path(source).parts if part not in ("final", "/", ".", "..")]
    return parts[-1] if parts else Path(source).resolve().name


def solver_of(tokenizer: Any, num_steps: int | None, guidance_scale: float | None) -> Any:
    """A generative decoder's own solver with what was given; None for decoders that have none."""
    given = {"num_steps": num_steps, "guidance_scale": guidance_scale}
    given = {key: value for key, value in given.items() if value is not None}
    if not given or not tokenizer.is_generative:
        return None
    return replace(tokenizer.config.solver, **given)


def summary(record: Record) -> str:
    """The result with all tokens, in a line."""
    last, ar = record["counts"][-1], record["ar_probe"]
    parts = [f"{last['num_tokens']} tokens"]
    parts += [f"{last['bits']:.6g} bits"] if last["bits"] is not None else []
    parts += [f"{ar['bits_per_image']['mean']:.4g} AR bits"] if ar else []
    for key, form in (("psnr", "PSNR {:.2f} dB"), ("ssim", "SSIM {:.3f}"),
                      ("lpips", "LPIPS {:.3f}"), ("frechet", "Frechet {:.4g}"),
                      ("strict", "strict {:.3f}")):  # fmt: skip
        if last[key] is not None:
            parts.append(form.format(last[key]["mean"]))
    for label, probe in record["linear_probe"].items():
        parts.append(f"probe {label} {probe['counts'][str(last['num_tokens'])]['mean']:.3f}")
    return ", ".join(parts)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--num-tokens takes whole numbers separated by commas, such as 1,2,4; got {text!r}"
        ) from error


def _device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(found)


def _say(line: str) -> None:
    print(line, flush=True)
