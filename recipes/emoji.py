"""`scfm data emoji`: the benchmark with rich prompts, from a font to a trained teacher.

It draws the images, trains a small VAE and a classifier on them, and writes a pipeline of the real classes: `FluxTransformer2DModel`,
`AutoencoderKL`, CLIP, T5. Then it calls the commands that a person would type, for the caches and for the teacher. Each part is
made once; the same command again continues.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.emoji_classifier import accuracy_of, train_classifier
from recipes.emoji_images import SIZE, Drawn, Font, draw, pairs, words, write_images, write_prompts
from recipes.tiny import SHIFT, tiny_clip, tiny_t5
from scfm_core.errors import UserError
from scfm_core.files import permit_reading
from scfm_core.models.initial import zero_modulation
from scfm_core.train.parse import load_config, to_plain, with_absolute_paths
from scfm_core.train.resume import changed_keys

TEXT_LENGTH = 8
"""Tokens of the longest caption: three words of the glyph, four of the ground, one for the end."""
_COPIES, _HELD_OUT_COPIES = 8, 4
"""Images of a pair."""
_VAE_STEPS, _CLASSIFIER_STEPS = 6000, 2500
_CHANNELS = 16
"""Of the latents. With a compression of 4 x 4, an image is 64 numbers for each of 16 tokens."""
_TEXT_WIDTH = 64
_SHEET_STEPS = 32
_RECIPE = "tiny_emoji_pretrain.yaml"


def make(
    root: Path,
    overrides: list[str],
    *,
    font: Path | None,
    execute: Callable[[list[str]], int],
    only_assets: bool = False,
) -> None:
    """Make what is missing in `root`: `train` and `held_out` (images), `tiny_flux`, `classifier`, caches, `pretrain`, `teacher`.

    Args:
        root: folder of everything.
        overrides: of the teacher's training.
        font: NotoColorEmoji.ttf; None: where Linux distributions put it.
        execute: runs an `scfm` command line.
        only_assets: stop before the teacher.

    Raises:
        UserError: if the font is missing, or a command failed.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "assets.json").is_file():
        _make_assets(root, Font(font))
    for name, copies in (("train", _COPIES), ("held_out", _HELD_OUT_COPIES)):
        _run(execute, "data", "encode", root / name, "-o", root / f"{name}_cache", "--model", root / "tiny_flux",
             "--resolution", SIZE, SIZE, "--text-length", TEXT_LENGTH, "--dtype", "float32", "--batch-size", 16 * copies)  # fmt: skip
    if only_assets:
        return
    run, teacher = root / "pretrain", root / "teacher"
    settings = [f"run.dir={run}", f"model.path={root / 'tiny_flux'}", f"data.path={root / 'train_cache'}", *overrides]
    if not teacher.is_dir():  # it appears when it is complete
        _run(execute, "train", _RECIPE, *settings)
        _run(execute, "export", run, "--merged", teacher)
    elif overrides:
        _check_teacher(run, settings, [word.partition("=")[0] for word in overrides])
    if not (root / "emoji.png").is_file():
        write_sheet(root)


def _check_teacher(run: Path, settings: list[str], named: list[str]) -> None:
    """UserError if the teacher was trained with other values of the keys `named`. Its run may be gone: then nobody knows."""
    if not (run / "config.yaml").is_file():
        return
    wanted, made = load_config(_RECIPE, settings), load_config(run / "config.yaml", stored=True)
    before, now = (to_plain(with_absolute_paths(config)) for config in (made, wanted))
    changed = {
        key: pair
        for key, pair in changed_keys(before, now).items()
        if f"{key}.".startswith(tuple(f"{name}." for name in named))
    }
    if changed:
        lines = "".join(f"\n  {key}: {old} then, {new} now" for key, (old, new) in changed.items())
        raise UserError(
            f"the teacher in {run.parent} is complete, and was trained with other settings:{lines}\nChoose another folder with --output, or "
            f"leave these settings out"
        )


def _run(execute: Callable[[list[str]], int], *parts: object) -> None:
    command = [str(part) for part in parts]
    print(f"\n$ scfm {' '.join(command)}", flush=True)
    code = execute(command)
    if code > 128:
        raise SystemExit(code)  # stopped by a signal, which the command has said
    if code:
        raise UserError(f"this command ended with code {code}: scfm {' '.join(command)}. The same command continues")


def _make_assets(root: Path, font: Font) -> None:
    """Images, prompts, pipeline and classifier; `assets.json`, with what was measured, is written last."""
    seen, held_out = pairs(held_out=False), pairs(held_out=True)
    train, test = draw(font, seen, _COPIES), draw(font, held_out, _HELD_OUT_COPIES)
    print(f"{len(train.pairs):,} images of {len(seen):,} pairs, and {len(test.pairs):,} of {len(held_out)} others")
    _once(root / "train", lambda folder: write_images(folder, train))
    _once(root / "held_out", lambda folder: write_images(folder, test))
    write_prompts(root / "prompts.txt", seen)
    write_prompts(root / "held_out.txt", held_out)
    measured: dict[str, Any] = {}
    _once(root / "classifier", lambda folder: _write_classifier(folder, train, test))
    _once(root / "tiny_flux", lambda folder: write_pipeline(folder, train.images, vae_steps=_VAE_STEPS))
    measured["classifier"] = json.loads((root / "classifier" / "accuracy.json").read_text(encoding="utf-8"))
    measured["vae_psnr"] = _psnr(root / "tiny_flux", test.images)
    print(f"on pairs that no image of training shows: {measured}")
    (root / "assets.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def _once(folder: Path, make: Callable[[Path], Any]) -> None:
    """Make a folder, unless it exists. It appears when it is complete."""
    if folder.exists():
        return
    print(f"making {folder.name}", flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(folder)


def _write_classifier(folder: Path, train: Drawn, test: Drawn) -> None:
    classifier = train_classifier(train, _CLASSIFIER_STEPS)
    folder.mkdir()
    classifier.save(folder)
    (folder / "accuracy.json").write_text(json.dumps(accuracy_of(classifier, test)) + "\n", encoding="utf-8")


def write_pipeline(folder: Path, images: Tensor, *, vae_steps: int, seed: int = 0) -> None:
    """A complete `FluxPipeline` folder: a trained small VAE, a fresh transformer, fixed random text encoders.

    Args:
        folder: where.
        images: for the VAE, uint8 [N, 3, SIZE, SIZE].
        vae_steps: its training steps.
        seed: of every initialisation.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocabulary = words()
        clip_tokenizer, clip = tiny_clip(folder, width=_TEXT_WIDTH, words=vocabulary)
        t5_tokenizer, t5 = tiny_t5(vocabulary, width=_TEXT_WIDTH)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * _CHANNELS,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=_TEXT_WIDTH,
            pooled_projection_dim=_TEXT_WIDTH,
            guidance_embeds=False,  # a model without guidance, as Flux.1-schnell: the teacher needs one stage
            axes_dims_rope=(8, 12, 12),
        )
        zero_modulation(transformer)
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
            vae=_train_vae(images, vae_steps),
            text_encoder=clip,
            tokenizer=clip_tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
            transformer=transformer,
        ).save_pretrained(folder)
    permit_reading(folder)


def _train_vae(images: Tensor, steps: int) -> Any:
    """A VAE with 4x compression; latents scaled to unit variance."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=_CHANNELS,
        norm_num_groups=1,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    rate = 3e-3
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(2, steps), pct_start=0.1)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (16,))] / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, batch) + 1e-6 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parts = images[:2048].split(256)
        latents = torch.cat([vae.encode(part / 127.5 - 1).latent_dist.mode() for part in parts])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae.eval()


@torch.no_grad()
def _psnr(model: Path, images: Tensor) -> float:
    """Of the VAE's reconstructions, in dB."""
    from diffusers import AutoencoderKL

    vae, errors = AutoencoderKL.from_pretrained(model / "vae"), []
    for part in images.split(256):
        batch = part / 127.5 - 1
        errors.append((vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1) - batch).square())
    return float(10 * torch.log10(4 / torch.cat(errors).mean()))


def write_sheet(root: Path, *, columns: int = 12, rows: int = 4) -> None:
    """`root / emoji.png`: images of held-out pairs from the font above images of the teacher, from one prompt in each column."""
    from PIL import Image

    from scfm_core.api import load

    every = pairs(held_out=True)
    chosen = [(number * len(every) // columns + number) % len(every) for number in range(columns)]
    captions = [every[number].caption for number in chosen]
    files = [f"{copy * len(every) + number:05d}.png" for copy in range(2) for number in chosen]
    cells: list[Image.Image] = [Image.open(root / "held_out" / file) for file in files]
    model = load(root / "pretrain")
    for row in range(rows):
        cells += model.sample(captions, steps=_SHEET_STEPS, seed=row * columns)
    cell, gap = 2 * SIZE, SIZE // 4
    sheet = Image.new("RGB", (columns * cell, (2 + rows) * cell + gap), "white")
    for number, image in enumerate(cells):
        row, column = divmod(number, columns)
        large = image.resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(large, (column * cell, row * cell + gap * (row >= 2)))
    sheet.save(root / "emoji.png", optimize=True)
