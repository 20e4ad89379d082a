"""Where images come from: rendered scenes, folders, Hugging Face datasets; as uint8 [3, H, W].

Reading order: `ImageSource`, `load_images` (training and held-out ones of a config), `fit_image`.
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
from rewards.shapes.grammar import SKILLS, sample_scene, split
from rewards.shapes.render import render
from rewards.shapes.vocabulary import IMAGE_SIZE

if TYPE_CHECKING:
    from PIL.Image import Image

    from flowrl.tokenizer.schema import DataSection

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_SHAPES_IMAGES = 20_000
_SPLIT_SEED = 0  # of what is held out: the same for every run, so that runs can be compared


class ImageSource(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def read(self, index: int, size: tuple[int, int], place: tuple[float, float]) -> Tensor:
        """Uint8 [3, H, W] of one image, resized to (H, W) and cut at the place, see `fit_image`."""


@dataclass(frozen=True)
class Tensors:
    """Images that are in memory, uint8 [N, 3, H, W], of the size that is asked for."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, size: tuple[int, int], place: tuple[float, float]) -> Tensor:
        """As `ImageSource.read`."""
        return self.images[index]


@dataclass(frozen=True)
class Files:
    """Image files."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, size: tuple[int, int], place: tuple[float, float]) -> Tensor:
        """As `ImageSource.read`."""
        return read_image(self.files[index], size, place)


@dataclass(frozen=True)
class Rows:
    """Rows of a Hugging Face dataset.

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

    def read(self, index: int, size: tuple[int, int], place: tuple[float, float]) -> Tensor:
        """As `ImageSource.read`."""
        image = self.rows[int(self.numbers[index])][self.column]
        if image is None:
            raise DataError(f"row {self.numbers[index]}: column '{self.column}' has no image")
        return fit_image(image, size, place)


def load_images(
    data: DataSection, size: tuple[int, int], *, seed: int, num_held_out: int, where: str
) -> tuple[ImageSource, ImageSource]:
    """The images that are trained on, and others that are not.

    Args:
        data: the config's section.
        size: height and width.
        seed: of the scenes that are rendered for training.
        num_held_out: images that are measured.
        where: names the config's file in errors.

    Raises:
        ConfigError: the source does not exist or holds too few images.
        MissingDependency: a dataset is named, and `datasets` is not installed.
    """
    if data.source == "shapes":
        return _shapes(data, size, seed=seed, num_held_out=num_held_out, where=where)
    if num_held_out > data.held_out:
        raise ConfigError(
            f"{where}: eval.num_images={num_held_out}, but only data.held_out={data.held_out} "
            "images are held out; raise data.held_out"
        )
    source = Path(data.source)
    files = image_files(source) if source.is_dir() else ()
    rows = None if files else _dataset(data, where)
    total = len(files) if files else len(rows)
    if total <= data.held_out:
        raise ConfigError(
            f"{where}: data.source={data.source} holds {total} images, and data.held_out="
            f"{data.held_out} of them are not trained on; lower data.held_out"
        )
    rng = np.random.default_rng(_SPLIT_SEED)
    order = rng.permutation(total)
    held_out, trained = order[: data.held_out][:num_held_out], order[data.held_out :]
    trained = trained[: data.num_images]
    if files:
        return Files(tuple(files[i] for i in trained)), Files(tuple(files[i] for i in held_out))
    return Rows(rows, data.image_column, trained), Rows(rows, data.image_column, held_out)


def image_files(folder: Path) -> tuple[Path, ...]:
    """The image files below a folder, sorted; hidden ones are left out."""
    found = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    names = sorted(f.relative_to(folder) for f in found)
    return tuple(folder / f for f in names if not any(p.startswith(".") for p in f.parts))


def read_image(file: Path, size: tuple[int, int], place: tuple[float, float]) -> Tensor:
    """Uint8 [3, H, W] of a file, see `fit_image`.

    Raises:
        DataError: it does not exist, or is no image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return fit_image(image, size, place)
    except OSError as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error


def fit_image(
    image: Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> Tensor:
    """Uint8 [3, H, W]: turned as its EXIF says, RGB, resized (bicubic, anti-aliased) and cut.

    Args:
        image: of any size and mode; transparency is dropped.
        size: H and W. The image is scaled until it just covers them.
        place: of the cut among those there are, (row, column) in [0, 1]; 0.5 = centre.
    """
    from PIL import Image, ImageOps

    rgb = ImageOps.exif_transpose(image).convert("RGB")
    height, width = size
    scale = max(height / rgb.height, width / rgb.width)
    covering = (max(width, round(rgb.width * scale)), max(height, round(rgb.height * scale)))
    if covering != rgb.size:
        rgb = rgb.resize(covering, Image.Resampling.BICUBIC)
    left = round((covering[0] - width) * place[1])
    top = round((covering[1] - height) * place[0])
    pixels = np.asarray(rgb.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


# --------------------------------------------------------------------------- the Shapes world


def render_scenes(num: int, size: int, *, seed: int, held_out: bool) -> Tensor:
    """Scenes of all skills, uint8 [num, 3, size, size]: 64 x 64, averaged over areas if smaller.

    Held-out ones show combinations that training never shows.
    """
    rng = np.random.default_rng(derive_seed(seed, "scenes", str(held_out)))
    pools = [split(skill, held_out=held_out) for skill in SKILLS]
    images = torch.empty(num, 3, size, size, dtype=torch.uint8)
    for index in range(num):
        pool = pools[rng.integers(len(pools))]
        scene = sample_scene(pool[rng.integers(len(pool))], rng)
        image = torch.from_numpy(render(scene, rng))
        if size != IMAGE_SIZE:
            image = F.interpolate(image[None], size=(size, size), mode="area")[0]
        images[index] = (image * 255).round().to(torch.uint8)
    return images


def _shapes(
    data: DataSection, size: tuple[int, int], *, seed: int, num_held_out: int, where: str
) -> tuple[ImageSource, ImageSource]:
    height, width = size
    if height != width or height > IMAGE_SIZE:
        raise ConfigError(
            f"{where}: data.source=shapes renders squares of at most {IMAGE_SIZE} pixels, but the "
            f"tokenizer takes {height} x {width}; set tokenizer.args.image_size={IMAGE_SIZE}"
        )
    num = data.num_images or _SHAPES_IMAGES
    trained = render_scenes(num, height, seed=seed, held_out=False)
    held_out = render_scenes(num_held_out, height, seed=_SPLIT_SEED, held_out=True)
    return Tensors(trained), Tensors(held_out)


# --------------------------------------------------------------------------- datasets


def _dataset(data: DataSection, where: str) -> Any:
    """The rows of a Hugging Face dataset, its column decoding to images."""
    key = f"{where}: data.source={data.source}"
    path = Path(data.source)
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


def stack(source: ImageSource, size: tuple[int, int]) -> Tensor:
    """All images of a source, cut at the centre, uint8 [N, 3, H, W]."""
    if isinstance(source, Tensors):
        return source.images
    return torch.stack([source.read(index, size, (0.5, 0.5)) for index in range(len(source))])


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Uint8 images as float32 in [0, 1] on a device."""
    return images.to(device, non_blocking=True).float() / 255
