"""What `flowrl tokenizer eval` and `flowrl tokenizer report` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from flowrl.tokenizer.evaluation.evaluate import Evaluation, Record, Settings
    from flowrl.tokenizer.evaluation.features import FeatureNetwork
    from flowrl.tokenizer.evaluation.perceptual import Lpips


@dataclass(frozen=True)
class EvalOptions:
    """What `flowrl tokenizer eval` was told.

    Attributes:
        data: "shapes", a folder of images or clips, or a Hugging Face data set of images.
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
    """

    data: str
    out: Path
    name: str | None
    num_images: int
    num_train: int
    num_tokens: str | None
    num_steps: int | None
    guidance_scale: float | None
    features: str
    lpips: str | None
    lpips_backbone: str | None
    ar_steps: int
    batch_size: int
    seed: int


def evaluate_all(sources: Sequence[str], options: EvalOptions) -> None:
    """Measures tokenizers one after the other; each gets a folder in OUT, replaced if it is there.

    Args:
        sources: folders of tokenizers, of their runs, or Hub ids.
        options: how.

    Raises:
        ConfigError: a source, a name or a number that does not fit.
    """
    names = [options.name] if options.name is not None else [name_of(each) for each in sources]
    if len(set(names)) < len(sources):
        raise ConfigError(
            f"{len(sources)} tokenizers would be called {', '.join(names)}; evaluate them one by "
            "one, with --name"
        )
    counts = None if options.num_tokens is None else _numbers(options.num_tokens)
    from flowrl.tokenizer.evaluation.ar_probe import ArSettings
    from flowrl.tokenizer.evaluation.evaluate import Settings
    from flowrl.tokenizer.evaluation.features import load_features
    from flowrl.tokenizer.evaluation.page import file_name, write_evaluation
    from flowrl.tokenizer.evaluation.perceptual import load_lpips

    device = _device()
    features = load_features(options.features, device=device)
    lpips = None
    if options.lpips is not None:
        lpips = load_lpips(options.lpips, options.lpips_backbone, device=device)
    ar = ArSettings(steps=options.ar_steps) if options.ar_steps else None
    settings = Settings(counts=counts, batch_size=options.batch_size, seed=options.seed, ar=ar)
    for source, title in zip(sources, names, strict=True):
        result = _evaluated(source, options, features, lpips, settings, device)
        file = write_evaluation(result, options.out / file_name(title), name=title, source=source)
        _say(f"{title}: {summary(result.record)}")
        _say(str(file))


def _evaluated(
    source: str,
    options: EvalOptions,
    features: FeatureNetwork,
    lpips: Lpips | None,
    settings: Settings,
    device: str,
) -> Evaluation:
    from flowrl.commands.tokenizer_tools import load_tokenizer
    from flowrl.tokenizer.evaluation.evaluate import evaluate
    from flowrl.tokenizer.evaluation.samples import load_samples

    tokenizer = load_tokenizer(source)[0].to(device)
    held_out, train = load_samples(
        options.data,
        tokenizer.sample_shape,
        num_held_out=options.num_images,
        num_train=options.num_train,
        seed=options.seed,
    )
    solver = solver_of(tokenizer, options.num_steps, options.guidance_scale)
    settings = replace(settings, solver=solver)
    return evaluate(tokenizer, held_out, train, features=features, lpips=lpips, settings=settings)


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
