"""Files of images and of clips: found in folders, read at a tokenizer's shape, written as PNG.

A clip is an animated GIF, PNG or WebP, a video, or a folder of numbered stills. A sample's shape is
(3, H, W) of an image and (F, 3, H, W) of a clip. Reading order: `sample_files`, `read_sample`,
`fit_image`, `write_png`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowrl.errors import DataError, MissingDependency

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = tuple[int, ...]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
CLIPS = (".gif", ".png", ".apng", ".webp", *VIDEOS)
_FRAME_MS = 125  # how long a frame of a written clip is shown


def kind(shape: Shape) -> str:
    """What a sample is called: "image" or "clip"."""
    return "clip" if len(shape) == 4 else "image"


def expected(shape: Shape) -> str:
    """The files that hold samples of a shape, in words."""
    if len(shape) == 3:
        return f"images ({', '.join(IMAGES)})"
    return f"clips ({', '.join(CLIPS)}, or folders of numbered stills)"


def sample_files(folder: Path, shape: Shape) -> tuple[Path, ...]:
    """The images or clips below a folder, sorted; hidden ones are left out.

    Of clips, a folder of stills whose names all end in a number is one.
    """
    suffixes = IMAGES if len(shape) == 3 else {*IMAGES, *CLIPS}
    found = sorted(
        file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in suffixes
    )
    files = [folder / f for f in found if not any(part.startswith(".") for part in f.parts)]
    if len(shape) == 3:
        return tuple(files)
    reels = {parent for parent in {file.parent for file in files} if _numbered_stills(parent)}
    clips = (file.parent if file.parent in reels else file for file in files)
    return tuple(
        clip for clip in dict.fromkeys(clips) if clip in reels or clip.suffix.lower() in CLIPS
    )


def read_sample(file: Path, shape: Shape, place: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Uint8 [*shape] of a file, see `fit_image`; of a clip all frames are cut alike.

    Of a clip's N frames those in the middle of F equal parts are taken; of an animation that is
    read as an image, the first.

    Raises:
        DataError: it does not exist, is of another kind, or holds fewer frames than F.
        MissingDependency: a video, and PyAV is not installed.
    """
    from PIL import Image

    size = (shape[-2], shape[-1])
    try:
        if len(shape) == 3:
            with Image.open(file) as image:
                return fit_image(image, size, place)
        return torch.stack([fit_image(each, size, place) for each in _frames(file, shape[0])])
    except (OSError, EOFError, SyntaxError) as error:
        what = "an image" if len(shape) == 3 else f"a clip of {shape[0]} frames"
        raise DataError(f"{file} cannot be read as {what}: {error}") from error


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


def write_png(frames: Tensor, file: Path) -> None:
    """Writes frames uint8 [F, H, W, 3]: one is a plain PNG, several are an animated one."""
    from PIL import Image

    first, *others = (Image.fromarray(frame.numpy()) for frame in frames)
    # Pillow would write equal neighbours as one frame, were they not blended differently; without
    # transparency both ways of blending are the same.
    blend = [number % 2 for number in range(len(frames))]
    how: dict[str, Any] = {
        "save_all": True,
        "append_images": others,
        "duration": _FRAME_MS,
        "blend": blend,
    }
    first.save(file, **(how if others else {}))


# --------------------------------------------------------------------------- frames


def _frames(file: Path, num: int) -> Iterator[Image]:
    """So many frames of a clip, evenly spread."""
    from PIL import Image

    if file.is_dir():
        stills = _numbered_stills(file)
        for index in _spread(num, len(stills), file):
            with Image.open(stills[index]) as image:
                yield image
    elif file.suffix.lower() in VIDEOS:
        yield from _video_frames(file, num)
    else:
        with Image.open(file) as image:
            # A PNG may hold a picture for viewers that do not animate, before its frames.
            skipped = int(image.info.get("default_image", False))
            for index in _spread(num, getattr(image, "n_frames", 1) - skipped, file):
                image.seek(skipped + index)
                yield image


def _spread(num: int, total: int, file: Path) -> list[int]:
    """The frames in the middle of `num` equal parts of `total`."""
    if total < num:
        raise DataError(
            f"{file} has {total} frame{'s' if total != 1 else ''}, and the tokenizer takes clips "
            f"of {num}; leave it out, or use a tokenizer of fewer frames (num_frames)"
        )
    return [(2 * part + 1) * total // (2 * num) for part in range(num)]


def _numbered_stills(folder: Path) -> tuple[Path, ...]:
    """The frames of a folder in the order of their numbers; none where other images lie there."""
    from PIL import Image

    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGES and f.name[0] != "."]
    numbers = {file: re.search(r"\d+$", file.stem) for file in files}
    if not files or not all(numbers.values()):
        return ()
    stills = sorted(files, key=lambda file: (int(numbers[file].group()), file.name))  # type: ignore[union-attr]
    try:
        with Image.open(stills[0]) as image:
            return () if getattr(image, "is_animated", False) else tuple(stills)
    except OSError:  # whoever reads it says so
        return tuple(stills)


def _video_frames(file: Path, num: int) -> Iterator[Image]:
    """Frames of a video, as stored: turned as no player would turn them."""
    try:
        import av
    except ImportError as error:
        raise MissingDependency(
            f"{file} is a video, which needs the package av (PyAV); run pip install -e '.[video]', "
            "or make an animated PNG, GIF or WebP of it"
        ) from error
    try:
        wanted = _spread(num, _num_video_frames(file), file)
        with av.open(str(file)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    yield frame.to_image()
    except (av.FFmpegError, IndexError) as error:  # IndexError: there is sound only
        raise OSError(error) from error


@cache  # containers do not all say it, and counting is as slow as reading
def _num_video_frames(file: Path) -> int:
    import av

    with av.open(str(file)) as container:
        return sum(1 for _ in container.decode(video=0))
