"""PNG files with the settings that an image was made with."""

import json
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ADVICE = "Choose another folder with --output"
"""If the folder of `scfm sample` cannot be written."""


def save_image(target: Path | BinaryIO, image: Image.Image, settings: dict[str, Any]) -> None:
    """Write an image with its settings, as PNG."""
    info = PngInfo()
    # The first is for programs. The second has the form that viewers of generated images show (Stable Diffusion web UI).
    info.add_itxt("scfm", json.dumps(settings, ensure_ascii=False))
    info.add_itxt("parameters", _readable(settings))
    image.save(target, format="png", pnginfo=info)


def _readable(settings: dict[str, Any]) -> str:
    rows = {
        "Steps": settings["steps"],
        "Sampler": "Euler",
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
        "LoRA strength": settings["strength"],
        "Shift": settings["shift"],
    }
    return f"{settings['prompt']}\n" + ", ".join(f"{name}: {value}" for name, value in rows.items())


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in the metadata of an image of `scfm sample`; None if the file has none."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.info["scfm"])
    except (OSError, KeyError, ValueError):
        return None
    return found if isinstance(found, dict) else None
