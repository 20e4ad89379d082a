"""An image as 8 bit PNG and back, for the wire; a broken file is a ValueError with the reason."""

from __future__ import annotations

from io import BytesIO

import torch
from torch import Tensor


def pack(image: Tensor) -> bytes:
    """The PNG of an image [3, H, W] in [0, 1]; no bytes for one that is not finite."""
    from rewards.simple import pil_images

    buffer = BytesIO()
    if image.isfinite().all():
        pil_images(image[None])[0].save(buffer, format="PNG")
    return buffer.getvalue()


def unpack(data: bytes, size: tuple[int, ...]) -> Tensor:
    """The image, float32 [3, H, W], of a PNG of `size` (H, W).

    Raises:
        ValueError: it is no PNG, or of another size or mode; ends a sentence that names it.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            found = (image.height, image.width)
            if found == size and image.mode == "RGB":  # before it is unpacked
                levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                return levels.reshape(*size, 3).permute(2, 0, 1).float() / 255
            mode = image.mode
    except Exception as error:  # a broken file raises whatever its broken chunk leads to
        raise ValueError(f"is not a PNG: {type(error).__name__}: {error}") from error
    raise ValueError(f"must be RGB of {size[0]} x {size[1]}, got {mode} of {found[0]} x {found[1]}")
