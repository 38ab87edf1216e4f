"""A family beside diffusers' own pipeline of the same folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfm_core.flow.sampler import euler_sample
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.protocol import ModelFamily


class Pair:
    """Our family and diffusers' pipeline of a folder, both in `dtype` on the CPU."""

    def __init__(self, folder: Path, dtype: torch.dtype, text_length: int) -> None:
        import diffusers

        self.text_length = text_length
        self.family = open_family(str(folder))
        self.encoders = TextEncoders(self.family, text_length, dtype, "cpu")
        self.network = self.family.load_network(dtype, "cpu")
        self.vae = Autoencoder(self.family, dtype, "cpu")
        self.pipe: Any = getattr(diffusers, self.family.pipeline).from_pretrained(folder, torch_dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)

    def images(self, prompts: list[str], noise: Tensor, guidance: float, steps: int, shift: float) -> Tensor:
        """Our sampler's images in [0, 1] of latents `noise`."""
        cond = self.encoders.encode(prompts, guidance)
        return self.vae.decode(
            euler_sample(
                lambda x, sigma: self.family.velocity(self.network, x, sigma, cond), noise, sigma_grid(steps, shift)
            )
        )

    def passes(self, **call: Any) -> tuple[Any, list[tuple[float, tuple, dict[str, Any], Any]]]:
        """The pipeline's result for a call, and each pass of its network: sigma, arguments, keyword arguments, output."""
        seen: list[tuple[float, tuple, dict[str, Any], Any]] = []
        scheduler = self.pipe.scheduler

        def note(network: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            seen.append((float(scheduler.sigmas[scheduler.step_index or 0]), args, kwargs, output[0]))

        hook = self.pipe.transformer.register_forward_hook(note, with_kwargs=True)
        try:
            return self.pipe(**call, max_sequence_length=self.text_length), seen
        finally:
            hook.remove()


def velocity_on_meta(family: ModelFamily, network: nn.Module) -> Tensor:
    """One pass of a network on the meta device, for an image of 512 x 512 pixels and captions of 20 and 77 tokens."""
    with torch.device("meta"):
        cond = Conditioning(
            fields={name: torch.empty(2, *shape) for name, shape in family.shapes(77).items()}, lengths=(20, 77)
        )
        return family.predict(network, torch.empty(2, *family.latent_shape(512, 512)), torch.empty(2), cond)


def assert_rows_are_as_alone(
    pair: Pair, captions: Sequence[str], x: Tensor, guidance: float
) -> tuple[Conditioning, Tensor, Tensor]:
    """The velocity of each row of a batch is that of its caption alone; `pair` is in fp32.

    Returns:
        conditioning, sigma and velocity of the batch.
    """
    cond, sigma = pair.encoders.encode(list(captions), guidance), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        together = pair.family.velocity(pair.network, x, sigma, cond)
        for row, caption in enumerate(captions):
            part, alone = slice(row, row + 1), pair.encoders.encode([caption], guidance)
            velocity = pair.family.velocity(pair.network, x[part], sigma[part], alone)
            torch.testing.assert_close(together[part], velocity, rtol=1e-4, atol=5e-5)
    return cond, sigma, together
