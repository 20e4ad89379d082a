"""Where images and clips come from: rendered scenes, folders, Hugging Face datasets; as uint8.

A sample has the tokenizer's shape, (3, H, W) or, of a clip, (F, 3, H, W). Reading order:
`ImageSource`, `load_images` (training and held-out ones of a config), `draw_scene`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError, DataError, MissingDependency, closest
from flowrl.tokenizer.files import Shape, expected, fit_image, kind, read_sample, sample_files
from rewards.shapes.clips import render_clip
from rewards.shapes.grammar import SKILLS, sample_scene, split
from rewards.shapes.render import Scene, render
from rewards.shapes.vocabulary import IMAGE_SIZE

if TYPE_CHECKING:
    from flowrl.tokenizer.schema import DataSection

_SHAPES_IMAGES = 20_000
_SHOWN_FRAMES, _GAP = 4, 2  # of a clip's picture; pixels of white behind it
_SPLIT_SEED = 0  # of what is held out: the same for every run, so that runs can be compared


class ImageSource(Protocol):
    """Images or clips by number."""

    def __len__(self) -> int: ...

    def read(self, index: int, shape: Shape, place: tuple[float, float]) -> Tensor:
        """Uint8 [*shape] of one, resized to (H, W) and cut at the place, see `fit_image`."""


@dataclass(frozen=True)
class Tensors:
    """Images or clips in memory, uint8 [N, *shape], of the shape that is asked for."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, shape: Shape, place: tuple[float, float]) -> Tensor:
        """As `ImageSource.read`."""
        return self.images[index]


@dataclass(frozen=True)
class Files:
    """Files of images or clips."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, shape: Shape, place: tuple[float, float]) -> Tensor:
        """As `ImageSource.read`."""
        return read_sample(self.files[index], shape, place)


@dataclass(frozen=True)
class Rows:
    """Rows of a Hugging Face dataset, which are images.

    Attributes:
        rows: the dataset, whose column decodes to PIL images.
        column: its name.
        numbers: the rows that count.
    """

    rows: Any
    column: str
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int, shape: Shape, place: tuple[float, float]) -> Tensor:
        """As `ImageSource.read`."""
        image = self.rows[int(self.numbers[index])][self.column]
        if image is None:
            raise DataError(f"row {self.numbers[index]}: column '{self.column}' has no image")
        return fit_image(image, (shape[-2], shape[-1]), place)


def load_images(
    data: DataSection, shape: Shape, *, seed: int, num_held_out: int, where: str
) -> tuple[ImageSource, ImageSource]:
    """The images or clips that are trained on, and others that are not.

    Args:
        data: the config's section.
        shape: of a sample.
        seed: of the scenes that are rendered for training.
        num_held_out: samples that are measured.
        where: names the config's file in errors.

    Raises:
        ConfigError: the source does not exist, holds too few, or has no clips.
        MissingDependency: a dataset is named, and `datasets` is not installed.
    """
    if data.source == "shapes":
        return _shapes(data, shape, seed=seed, num_held_out=num_held_out, where=where)
    if num_held_out > data.held_out:
        raise ConfigError(
            f"{where}: eval.num_images={num_held_out}, but only data.held_out={data.held_out} "
            f"{kind(shape)}s are held out; raise data.held_out"
        )
    source = Path(data.source)
    files = sample_files(source, shape) if source.is_dir() else ()
    rows = None if files else _dataset(data, shape, where)
    total = len(files) if files else len(rows)
    if total <= data.held_out:
        raise ConfigError(
            f"{where}: data.source={data.source} holds {total} {kind(shape)}s, and "
            f"data.held_out={data.held_out} of them are not trained on; lower data.held_out"
        )
    rng = np.random.default_rng(_SPLIT_SEED)
    order = rng.permutation(total)
    held_out, trained = order[: data.held_out][:num_held_out], order[data.held_out :]
    trained = trained[: data.num_images]
    if files:
        return Files(tuple(files[i] for i in trained)), Files(tuple(files[i] for i in held_out))
    return Rows(rows, data.image_column, trained), Rows(rows, data.image_column, held_out)


# --------------------------------------------------------------------------- the Shapes world


def render_scenes(num: int, shape: Shape, *, seed: int, held_out: bool) -> Tensor:
    """Scenes of all skills, uint8 [num, *shape]; held-out ones show combinations of their own."""
    rng = np.random.default_rng(derive_seed(seed, "scenes", str(held_out)))
    pools = [split(skill, held_out=held_out) for skill in SKILLS]
    images = torch.empty(num, *shape, dtype=torch.uint8)
    for index in range(num):
        pool = pools[rng.integers(len(pools))]
        scene = sample_scene(pool[rng.integers(len(pool))], rng)
        images[index] = draw_scene(scene, shape, rng)
    return images


def draw_scene(scene: Scene, shape: Shape, rng: np.random.Generator) -> Tensor:
    """Uint8 [*shape] of a scene, of a clip in motion: 64 x 64, averaged over areas if smaller."""
    pixels = render_clip(scene, shape[0], rng) if len(shape) == 4 else render(scene, rng)[None]
    frames = torch.from_numpy(pixels)
    if shape[-1] != IMAGE_SIZE:
        frames = F.interpolate(frames, size=tuple(shape[-2:]), mode="area")
    return (frames * 255).round().to(torch.uint8).view(*shape)


def shapes_fit(shape: Shape) -> bool:
    """Whether scenes can be drawn so: squares of at most 64 pixels."""
    return shape[-2] == shape[-1] <= IMAGE_SIZE


def _shapes(
    data: DataSection, shape: Shape, *, seed: int, num_held_out: int, where: str
) -> tuple[ImageSource, ImageSource]:
    if not shapes_fit(shape):
        raise ConfigError(
            f"{where}: data.source=shapes renders squares of at most {IMAGE_SIZE} pixels, but the "
            f"tokenizer takes {shape[-2]} x {shape[-1]}; set tokenizer.args.image_size={IMAGE_SIZE}"
        )
    num = data.num_images or _SHAPES_IMAGES
    trained = render_scenes(num, shape, seed=seed, held_out=False)
    held_out = render_scenes(num_held_out, shape, seed=_SPLIT_SEED, held_out=True)
    return Tensors(trained), Tensors(held_out)


# --------------------------------------------------------------------------- datasets


def _dataset(data: DataSection, shape: Shape, where: str) -> Any:
    """The rows of a Hugging Face dataset, its column decoding to images."""
    key = f"{where}: data.source={data.source}"
    path = Path(data.source)
    if len(shape) == 4:
        found = "holds none" if path.is_dir() else "is no such folder"
        raise ConfigError(
            f"{key} {found}: the tokenizer takes {list(shape)}, so name 'shapes' or a folder of "
            f"{expected(shape)}; Hugging Face datasets are read as images only"
        )
    looks_local = data.source.startswith((".", "/", "~")) or data.source.count("/") > 1
    if looks_local and not path.is_dir():
        raise ConfigError(f"{key}: there is no such folder")
    try:
        import datasets
    except ImportError as error:
        kind = "holds no image files, so it is read as" if path.is_dir() else "is taken for"
        raise MissingDependency(
            f"{key} {kind} a Hugging Face dataset, which needs the package datasets; run "
            "pip install -e '.[datasets]', or name 'shapes' or a folder of images"
        ) from error
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                if data.split not in found:
                    raise ConfigError(
                        f"{where}: data.split={data.split}; {closest(data.split, found)}"
                    )
                found = found[data.split]
        else:
            found = datasets.load_dataset(data.source, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{key}, data.split={data.split}: {error}") from error
    column = data.image_column
    if column not in found.column_names:
        raise ConfigError(
            f"{where}: data.image_column={column}; {closest(column, found.column_names)}"
        )
    return found.cast_column(column, datasets.Image())


# --------------------------------------------------------------------------- for evaluation


def stack(source: ImageSource, shape: Shape) -> Tensor:
    """All samples of a source, cut at the centre, uint8 [N, *shape]."""
    if isinstance(source, Tensors):
        return source.images
    return torch.stack([source.read(index, shape, (0.5, 0.5)) for index in range(len(source))])


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Uint8 images as float32 in [0, 1] on a device."""
    return images.to(device, non_blocking=True).float() / 255


def as_pictures(samples: Tensor) -> Tensor:
    """Images [N, 3, H, W] as they are; of clips up to four frames side by side, parted by white.

    Args:
        samples: float [N, *shape] in [0, 1].
    """
    if samples.ndim == 4:
        return samples
    num = min(_SHOWN_FRAMES, samples.shape[1])
    at = torch.linspace(0, samples.shape[1] - 1, num).round().long()
    row = samples[:, at].permute(0, 2, 3, 1, 4).flatten(3)  # [N, 3, H, F * W]
    return F.pad(row, (0, _GAP), value=1.0)
