"""A style LoRA and a shortcut adapter together, measured on the demo's digits.

python -m recipes.style [--demo runs/demo] [--dir runs/style] [section.key=value ...]

`make demo` comes first. The style is slanted handwriting; a LoRA learns it by plain flow matching on the demo's teacher. Then two
students are compared with the styled teacher. One is the demo's step-scaled adapter, which never saw the LoRA and is used together
with it. The other is distilled on the styled teacher (`model.adapters`). The same command again continues what was stopped.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image

from recipes.cli import main as scfm
from recipes.figures import read_evaluation
from scfm_core.wording import number

STEPS = (1, 2, 4, 8)
SLANT = 0.35
"""Pixels to the right for each pixel up."""
_TRAIN = ("train.steps=600", "train.lr=2e-3", "sample.every=0", "sample.teacher_steps=0")
"""Of both trainings; steps and rate are those of the demo's students."""
_LORA = ("method.flow_fraction=1", "method.teacher_fraction=0", "method.step_gain=none", "method.shift=[1,3]")
"""Plain flow matching with an adapter."""
_STUDENT = ("ema.slow=0.998",)
"""As the demo's step-scaled student."""
_EVALUATE = (f"evaluate.steps={list(STEPS)}", "evaluate.noise_floor=true")
ROWS = {"apart": "both adapters, trained apart", "styled": "distilled on the styled teacher", "base": "undistilled"}


def main() -> None:
    """Make what is missing, train, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--dir", type=Path, default=Path("runs/style"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all trainings and evaluations")
    arguments = parser.parse_args()
    demo, root, more = arguments.demo, arguments.dir, arguments.overrides
    teacher = demo / "short_teacher"
    for folder in (teacher, demo / "distill"):
        if not folder.is_dir():
            raise SystemExit(f"there is no {folder}: run `make demo` first")
    slant(demo / "digits", root / "digits")
    _scfm(
        "data", "encode", root / "digits", "--output", root / "cache", "--model", teacher, "--resolution", 16, 16,
        "--text-length", 8, "--dtype", "float32", "--batch-size", 64,
    )  # fmt: skip

    def train(name: str, *words: str) -> Path:
        features = f"evaluate.features_path={demo / 'classifier'}"
        _scfm(
            "train",
            "tiny_distill.yaml",
            f"run.dir={root / name}",
            f"model.path={teacher}",
            features,
            *_TRAIN,
            *words,
            *more,
        )
        return root / name

    on_style = f"data.path={root / 'cache'}"
    lora = train("lora", on_style, *_LORA)
    style = f"model.adapters=[{{path: {lora / 'adapter'}, weight: 1.0}}]"
    apart = root / "apart"
    if not apart.is_dir():  # a copy, since the demo's own evaluation stays
        shutil.copytree(demo / "distill", apart)
    styled = train("styled", on_style, style, *_STUDENT)
    for run in (styled, apart):  # both from the same noise, compared with the same images of the styled teacher
        keep = f"evaluate.keep={root / 'teacher_images'}"
        _scfm("evaluate", run, on_style, style, keep, *_EVALUATE, *more)
    (root / "style.md").write_text(table(root), encoding="utf-8")
    print(table(root))


def slant(source: Path, target: Path) -> None:
    """Write the digits of `source` in slanted handwriting, with the same captions."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.png")):
        with Image.open(path) as image:
            moved = SLANT * image.height / 2
            affine = (1, SLANT, -moved, 0, 1, 0)  # of the place in `source` for a place in `target`
            image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC).save(
                target / path.name
            )
    shutil.copy(source / "metadata.jsonl", target)


def table(root: Path) -> str:
    """The Frechet distances to the styled teacher, as a table in Markdown."""
    results = {name: read_evaluation(root / name / "evaluation.json") or {} for name in ("apart", "styled")}
    of = {
        "apart": results["apart"]["student"],
        "styled": results["styled"]["student"],
        "base": results["styled"]["base"],
    }
    lines = ["| steps | " + " | ".join(ROWS.values()) + " |", "|---" * (1 + len(ROWS)) + "|"]
    lines += [
        f"| {steps} | " + " | ".join(number(of[name][str(steps)]["fid_teacher"]) for name in ROWS) + " |"
        for steps in STEPS
    ]
    floor = next(iter(results["styled"]["teacher"].values()))["fid_floor"]
    return (
        "\n".join([*lines, "", f"Two independent sets of the styled teacher's images differ by {number(floor)}."])
        + "\n"
    )


def _scfm(*words: object) -> None:
    command = [str(word) for word in words]
    print(f"\n$ scfm {' '.join(command)}", flush=True)
    if code := scfm(command):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
