"""Z-Image's network on tensors [B, ...] instead of lists of samples."""

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor

from scfm_core.readback import to_device


class ZImageNetwork(ZImageTransformer2DModel):
    """diffusers' weights and blocks with another forward.

    diffusers joins the tokens of all samples to one row for the embedders, but an adapter has a strength per sample: the first
    axis must be the batch. It also pads, embeds and masks sample by sample, with some 30 small kernels each.

    A caption is padded to a multiple of 32 with a learned token that the other tokens see. Positions depend on this length:
    captions have (1 .. length, 0, 0), the image has (length + 1, row, column).
    """

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, lengths: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        """The network's output, [B, C, H, W], whose sign is opposite to a velocity's.

        Args:
            latents: [B, C, H, W], in the network's dtype, as is `text`.
            timestep: 1 - sigma, fp32 [B].
            text: [B, L, D].
            lengths: real tokens of each caption.
        """
        batch, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        padded = [_padded(length) for length in lengths]
        text_lengths, text_ends = (to_device(torch.tensor(ends), latents.device) for ends in (lengths, padded))
        patches = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
        image = self.all_x_embedder["2-1"](patches.flatten(3).flatten(1, 2))
        image_pad = self.x_pad_token.to(image.dtype).expand(batch, -rows * columns % SEQ_MULTI_OF, -1)
        image = torch.cat([image, image_pad], 1)
        caption = self.cap_embedder(F.pad(text, (0, 0, 0, max(padded) - text.shape[1])))
        places = torch.arange(max(padded), device=text.device)
        is_pad = (places >= text_lengths[:, None])[..., None]
        caption = torch.where(is_pad, self.cap_pad_token.to(caption.dtype), caption)

        image_ids = torch.zeros(batch, image.shape[1], 3, dtype=torch.int64, device=latents.device)
        cells = torch.arange(rows * columns, device=latents.device)
        image_ids[:, : len(cells), 0] = text_ends[:, None] + 1
        image_ids[:, : len(cells), 1], image_ids[:, : len(cells), 2] = cells // columns, cells % columns
        caption_ids = F.pad(places[:, None] + 1, (0, 2)).expand(batch, -1, -1)
        image_rope, caption_rope = (
            self.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]) for ids in (image_ids, caption_ids)
        )
        image_mask = caption_mask = None
        if len(set(padded)) > 1:
            caption_mask = places < text_ends[:, None]
            image_mask = F.pad(caption_mask, (image.shape[1], 0), value=True)

        embedder = self.t_embedder
        frequencies = embedder.timestep_embedding(self.t_scale * timestep, embedder.frequency_embedding_size)
        modulation = embedder.mlp(frequencies.to(latents.dtype)).to(latents.dtype)
        for block in self.noise_refiner:
            image = block(image, None, image_rope, modulation)
        for block in self.context_refiner:
            caption = block(caption, caption_mask, caption_rope)
        tokens, rope = torch.cat([image, caption], 1), torch.cat([image_rope, caption_rope], 1)
        for block in self.layers:
            tokens = block(tokens, image_mask, rope, modulation)
        patches = self.all_final_layer["2-1"](tokens[:, : len(cells)], c=modulation)
        patches = patches.reshape(batch, rows, columns, 2, 2, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def _padded(length: int) -> int:
    return length + -length % SEQ_MULTI_OF
