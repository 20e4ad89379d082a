"""The model card: a README.md beside the artefact, in the form that the Hub reads.

It says what was run, what came of it on held-out prompts, and how diffusers draws with it. Reading
order: `write_card`, then a function per section in the order of the page.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flowrl import __version__
from flowrl.config import Config
from flowrl.strict import escape
from flowrl.train.runfiles import JSON

if TYPE_CHECKING:
    from flowrl.methods.spec import Method

CARD = "README.md"
_MAX_IMAGES = 8
_WIDTH = 192  # pixels; small images are shown larger than they are


def write_card(
    run: Path, config: Config, method: Method, *, step: int, folder: Path | None = None
) -> Path:
    """Writes `README.md` beside an artefact, and the sample images that it shows into `images`.

    Args:
        run: the run's folder, whose `eval` holds the evaluations; without one the card says so.
        config: the run's.
        method: as it ran.
        step: training steps done; evaluations of later steps belong to a discarded continuation.
        folder: the artefact's; None = `run/final`.

    Returns:
        The card.
    """
    folder = folder or run / "final"
    folder.mkdir(parents=True, exist_ok=True)
    evals = _evaluations(run / "eval", step)
    language = "bash" if config.eval.num_steps is None else "python"
    sections = [
        _front_matter(config, method),
        _introduction(config, method, step),
        _scores(evals),
        _samples(evals, run / "eval", folder / "images"),
        f"## Use\n\n```{language}\n{usage(config, prompt=_prompt(evals))}```",
        _method(config, method),
        _settings(config),
    ]
    path = folder / CARD
    path.write_text("\n\n".join(s for s in sections if s) + "\n", encoding="utf-8")
    return path


def usage(config: Config, *, prompt: str, folder: Path = Path()) -> str:
    """Python that draws one image with the artefact, sampled as the run's evaluation was.

    It needs flowrl only to find an embedded base model. Of a token model it is a line of shell.

    Args:
        config: the run's.
        prompt: what to draw.
        folder: the artefact's, from where the code is run.
    """
    model = config.model
    if config.eval.num_steps is None:
        options = f"--guidance-scale {_guidance(config):g}"
        return f"flowrl sample {_folder(folder)} {_quoted(prompt)} {options}\n"
    scheduler, schedule = _schedule(config)
    sides = (("height", model.height), ("width", model.width))
    size = "".join(f"    {name}={side},\n" for name, side in sides if side is not None)
    return (
        "import torch\nfrom diffusers import DiffusionPipeline\n"
        f"{_loading(config, folder)}{scheduler}"
        f"image = pipe(\n    {_quoted(prompt)},\n{schedule}"
        f"    guidance_scale={_guidance(config):g},\n"
        f"    max_sequence_length={model.max_sequence_length},\n"
        f"{size}"
        "    generator=torch.Generator().manual_seed(0),\n"
        ').images[0]\nimage.save("image.png")\n'
    )


def _folder(folder: Path) -> str:
    """Of the whole model, as a command takes it."""
    whole = folder / "pipeline"
    return str(whole) if whole.is_absolute() else f"./{whole}"


def _loading(config: Config, folder: Path) -> str:
    """Lines that make `pipe`."""
    model = config.model
    start = "pipe = DiffusionPipeline.from_pretrained"
    if model.tuning == "full":
        whole = _quoted(str(folder / "pipeline"))
        return f"\n{start}({whole}, dtype=torch.{model.dtype})\n"
    base, imports = _quoted(model.id), ""
    if _is_local(model.id):
        base = _quoted(str(Path(model.id).resolve()))
    elif "/" not in model.id:
        base = f"resolve_model({base})"
        imports = "from flowrl.sources import resolve_model  # finds flowrl's embedded model\n"
    revision = f", revision={_quoted(model.revision)}" if model.revision else ""
    load = f"{start}(\n    {base}{revision}, dtype=torch.{model.dtype}\n)\n"
    return f"{imports}\n{load}pipe.load_lora_weights({_quoted(str(folder))})\n"


def _schedule(config: Config) -> tuple[str, str]:
    """(lines that set up the scheduler, arguments of the call) that give the run's sigmas."""
    steps, args = config.eval.num_steps, config.model.args
    lines, given = "", f"    num_inference_steps={steps},\n"
    if args.get("shift") is not None:
        lines = (
            "pipe.scheduler = pipe.scheduler.from_config("
            f"pipe.scheduler.config, shift={args['shift']:g}, use_dynamic_shifting=False)\n"
        )
    if args.get("schedule") == "linear":
        # The scheduler shifts the sigmas that it is given, once.
        given += f"    sigmas=torch.linspace(1, 0, {steps + 1})[:-1].tolist(),\n"
    return lines, given


def _front_matter(config: Config, method: Method) -> str:
    """What the Hub indexes. The licence is the base model's affair, so it is not stated."""
    model = config.model
    data: JSON = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["flowrl", "reinforcement-learning", method.name],
    }
    if model.tuning == "lora":
        data["tags"].append("lora")
    if "/" in model.id and not _is_local(model.id):
        relation = "adapter" if model.tuning == "lora" else "finetune"
        data = {"base_model": model.id, "base_model_relation": relation} | data
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _introduction(config: Config, method: Method, step: int) -> str:
    artefact = "a LoRA" if config.model.tuning == "lora" else "all weights"
    rewards = " + ".join(
        f"`{r.name}`" if r.weight == 1 else f"{r.weight:g} x `{r.name}`" for r in config.rewards
    )
    taught = f"rewarded by {rewards}" if rewards else "taught by its choices"
    samples = f"{config.data.num_groups} prompts x {config.data.group_size} samples"
    return (
        f"# {config.run.name}\n\n"
        f"`{config.model.id}`, aligned by reinforcement learning with {method.paper} "
        f"(`{method.name}` of flowrl {__version__}): {artefact} of the transformer, {step} steps "
        f"of {samples} on `{config.data.train}`, {taught}. The base model's licence "
        "and limits apply."
    )


def _scores(evals: Sequence[JSON]) -> str:
    """Held-out means before and after: overall, per skill, per reward, diversity."""
    if not evals:
        return "## Scores\n\nThe run was not evaluated."
    first, last = evals[0], evals[-1]
    rows = [("score", first.get("score"), last.get("score"))]
    for section, title in (("skills", "skill"), ("rewards", "reward")):
        before, after = first.get(section, {}), last.get(section, {})
        rows += [(f"{title} `{name}`", before.get(name), value) for name, value in after.items()]
    rows.append(("diversity", first.get("diversity"), last.get("diversity")))
    table = [f"| {name} | {_number(old)} | {_number(new)} |" for name, old, new in rows]
    return "\n".join(
        [
            "## Scores",
            "",
            f"On {last['num_samples']} held-out samples, "
            + (f"{last['num_steps']} sampler steps, " if last["num_steps"] else "")
            + f"guidance {last['guidance_scale']:g}, the same noise every time "
            f"(seed {last['seed']}). Diversity is the mean distance of two images of one prompt.",
            "",
            f"| | before, step {first['step']} | after, step {last['step']} |",
            "|---|---|---|",
            *table,
        ]
    )


def _samples(evals: Sequence[JSON], source: Path, target: Path) -> str:
    """A table of images of the same prompts and noise before and after; copies them to `target`."""
    if not evals:
        return ""
    after = evals[-1].get("samples", [])[:_MAX_IMAGES]
    before = evals[0].get("samples", [])[:_MAX_IMAGES]
    if [each["prompt"] for each in before] != [each["prompt"] for each in after]:
        before = []
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    rows = []
    for index, sample in enumerate(after):
        old = _copy(source, before[index]["file"], target, f"before_{index}") if before else ""
        new = _copy(source, sample["file"], target, f"after_{index}")
        rows.append(f"| {_cell(sample['prompt'])} | {old} | {new} |")
    return "\n".join(["## Samples", "", "| prompt | before | after |", "|---|---|---|", *rows])


def _copy(source: Path, file: str, target: Path, name: str) -> str:
    """Copies an image; returns the tag that shows it."""
    copied = target / f"{name}{Path(file).suffix}"
    shutil.copyfile(source / file, copied)
    return f'<img src="{target.name}/{copied.name}" width="{_WIDTH}">'


def _method(config: Config, method: Method) -> str:
    rows = [
        *method.describe(),
        ("learning rate", f"{config.optim.lr:g}, {config.optim.schedule}"),
        ("guidance in rollout and training", f"{config.model.guidance_scale:g}"),
        ("updates per rollout", str(config.optim.updates_per_rollout)),
    ]
    if config.model.tuning == "lora":
        lora = config.model.lora
        rows.append(("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}"))
    if config.optim.ema_decay is not None:
        rows.append(("weights", f"moving average, decay {config.optim.ema_decay:g}"))
    table = [f"| {_cell(name)} | {_cell(text)} |" for name, text in rows]
    return "\n".join(["## Method", "", "| | |", "|---|---|", *table])


def _settings(config: Config) -> str:
    changed = escape(config.model_dump(mode="json", exclude_defaults=True))
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    return (
        "## Configuration\n\nWhat differs from the defaults; `flowrl train` repeats the run with "
        f"it.\n\n```yaml\n{text}```"
    )


def _evaluations(folder: Path, step: int) -> list[JSON]:
    """The run's evaluations in the order of steps, up to `step`."""
    read = [json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("step_*.json")]
    return sorted((e for e in read if e["step"] <= step), key=lambda each: int(each["step"]))


def _prompt(evals: Sequence[JSON]) -> str:
    samples = evals[-1].get("samples") if evals else None
    return str(samples[0]["prompt"]) if samples else "a red square"


def _guidance(config: Config) -> float:
    """Of the evaluation."""
    own = config.eval.guidance_scale
    return config.model.guidance_scale if own is None else own


def _is_local(model: str) -> bool:
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _quoted(text: str) -> str:
    """The text as Python would write it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _cell(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "\\|").replace("\n", " ")
