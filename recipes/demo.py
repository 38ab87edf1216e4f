"""`make demo`: from nothing to a distilled tiny Flux, by the commands that a person would type.

python -m recipes.demo [--dir runs/demo] [--only assets|teacher]
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from recipes.cli import main as scfm
from recipes.tiny import SIZE, caption, write_classifier, write_digits, write_pipeline

_PAPER = ("method.step_gain=none", "ema.restart_every=none")


def main() -> None:
    """Make what is missing, train, sample, evaluate, report. A second run goes on where the first stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--only",
        choices=("assets", "teacher"),
        help="stop once digits, tiny pipeline and caches are made, or the teacher is trained too",
    )
    parser.add_argument("--vae-steps", type=int, default=300)
    parser.add_argument("--paths-per-prompt", type=int, default=720, help="stored paths of the teacher (default 720)")
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="a model of the 8 x 8 scans themselves, without a VAE (give another --dir)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for all trainings, e.g. train.steps=20"
    )
    arguments = parser.parse_args()
    began, root = time.perf_counter(), arguments.dir
    size = 8 if arguments.pixels else SIZE
    make_assets(root, None if arguments.pixels else arguments.vae_steps, size)
    if arguments.only == "assets":
        return
    paths = [f"data.path={root / 'digits_cache'}", f"data.resolution=[{size},{size}]"]
    pretrain = [f"run.dir={root / 'pretrain'}", f"model.path={root / 'tiny_flux'}", *paths, *arguments.overrides]
    _run("train", "tiny_pretrain.yaml", *pretrain)
    if not (root / "teacher").is_dir():  # it appears when it is complete
        _run("export", root / "pretrain", "--merged", root / "teacher")
    if arguments.only:
        return
    paths += [f"model.path={root / 'teacher'}", f"evaluate.features_path={root / 'classifier'}", *arguments.overrides]
    stored = root / "paths_many"
    _run(  # at once if it has them, and refuses those of another teacher
        "data", "generate", root / "prompts.txt", "--output", stored, "--model", root / "teacher", "--trajectories",
        "--per-prompt", arguments.paths_per_prompt, *_cached(size), "--batch-size", 100, "--shift", 3,
    )  # fmt: skip
    for name, recipe, extra in (
        ("paper_recipe", "tiny_distill.yaml", _PAPER),
        ("distill", "tiny_distill.yaml", ()),
        ("trajectories", "tiny_trajectories.yaml", (f"data.path={stored}",)),
    ):
        _run("train", recipe, f"run.dir={root / name}", *paths, *extra)
        _run("evaluate", root / name, f"data.path={root / 'digits_cache'}")  # the same prompts and real digits for all
    for steps in (1, 2, 3, 4):
        _run("sample", root / "trajectories", "--steps", steps)
    _run("report", root / "trajectories", "--compare", root / "distill", "--compare", root / "paper_recipe")
    _summary(root, (time.perf_counter() - began) / 60)


def make_assets(root: Path, vae_steps: int | None, size: int = SIZE) -> None:
    """Digits, tiny pipeline, classifier, caches of all digits and of ten, prompts in `root`; what is complete stays."""
    if not (root / "classifier.json").is_file():
        print("making the digits, a tiny Flux pipeline of the real classes, and a digit classifier", flush=True)
        for name in ("digits", "tiny_flux", "classifier", "digits_cache", "digits_10", "digits_10_cache"):
            shutil.rmtree(root / name, ignore_errors=True)
        write_digits(root / "digits", size=size)
        write_digits(root / "digits_10", count=10, size=size)
        (root / "prompts.txt").write_text("".join(f"{caption(digit)}\n" for digit in range(10)))
        write_pipeline(root / "tiny_flux", vae_steps=vae_steps)
        accuracy = write_classifier(root / "classifier")
        print(f"the classifier reads {accuracy:.1%} of held-out digits")
        (root / "classifier.json").write_text(json.dumps({"accuracy": accuracy}) + "\n")
    for name in ("digits", "digits_10"):
        if not (root / f"{name}_cache" / "manifest.json").is_file():
            _run(
                "data", "encode", root / name, "--output", root / f"{name}_cache", "--model", root / "tiny_flux",
                *_cached(size), "--batch-size", 64,
            )  # fmt: skip


def _cached(size: int) -> tuple[object, ...]:
    """How texts and latents are stored."""
    return "--resolution", size, size, "--text-length", 8, "--keep-padding", "--dtype", "float32"


def _run(*words: object) -> None:
    command = [str(word) for word in words]
    print(f"\n$ scfm {' '.join(command)}", flush=True)
    code = scfm(command)
    if code:
        raise SystemExit(code)


def _summary(root: Path, minutes: float) -> None:
    columns = {"paper_recipe": "paper recipe", "distill": "step-scaled", "trajectories": "stored paths"}
    results = [json.loads((root / name / "evaluation.json").read_text()) for name in columns]
    values = [results[0]["base"], *(result["student"] for result in results)]
    print("\nFrechet distance to the teacher's own 32-step samples")
    print(f"{'steps':>8}" + "".join(f"{title:>14}" for title in ("undistilled", *columns.values())))
    for steps in values[0]:
        print(f"{steps:>8}" + "".join(f"{rows[steps]['fid_teacher']:14.3f}" for rows in values))
    best = root / "trajectories"
    print(
        f"\ndone in {minutes:.1f} minutes. Look at:\n  {best / 'report.html'}\n  {best / 'samples' / 'evaluation.png'}"
    )


if __name__ == "__main__":
    main()
