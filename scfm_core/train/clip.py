"""CLIP models from local folders: embeddings of images, and how well images fit their prompts."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scfm_core.errors import UserError

_PROCESSOR_FILES = (
    "preprocessor_config.json tokenizer_config.json tokenizer.json vocab.json merges.txt special_tokens_map.json"
)


class LocalCLIP:
    """A CLIPModel of transformers with its processor. Nothing is downloaded.

    Args:
        path: the folder.
        setting: the key that names it, for messages.
        hub_id: the model that is meant, for messages.
        processor_id: the model whose processor it has, if its own folder on the hub has none.
        device: for the network.

    Raises:
        UserError: if the folder is not a complete CLIP model.
    """

    def __init__(
        self, path: str, setting: str, device: torch.device, *, hub_id: str, processor_id: str | None = None
    ) -> None:
        folder = Path(path).expanduser()
        get = f"Nothing is downloaded here: `hf download {hub_id} --local-dir {path}`"
        if processor_id is not None:
            get += f", and its processor, `hf download {processor_id} {_PROCESSOR_FILES} --local-dir {path}`"
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{setting}: {path!r} is not the folder of a model of transformers ({error}). {get}"
            ) from error
        if kind != "clip":
            raise UserError(f"{setting}: {path!r} holds a model of type {kind!r}, not a CLIP model. {get}")
        from transformers import CLIPModel, CLIPProcessor

        try:
            # Safetensors if there are any. OpenAI's own repositories have a pickle, which is read without running code of it.
            self._model, found = CLIPModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, weights_only=True
            )
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a missing or damaged file: OSError, ValueError, SafetensorError, TypeError, ...
            raise UserError(f"{setting}: {path!r} is not a complete CLIP model ({error}). {get}") from error
        if found["missing_keys"]:
            raise UserError(
                f"{setting}: the weights in {path!r} lack {len(found['missing_keys'])} tensors of a CLIP model, such as "
                f"{min(found['missing_keys'])}. {get}"
            )
        self._model = self._model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings of length 1 of images uint8 [N, 3, H, W]; fp64 [N, D] on the CPU."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        return _unit(self._model.get_image_features(**inputs))

    @torch.no_grad()
    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine of each image, uint8 [N, 3, H, W], and its prompt; fp64 [N] on the CPU. Long prompts are cut."""
        length = self._model.config.text_config.max_position_embeddings
        inputs = self._processor(
            text=list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(self._device)
        return (self.embed(images) * _unit(self._model.get_text_features(**inputs))).sum(1)

    @property
    def logit_scale(self) -> float:
        """The factor of a cosine in the model's training."""
        return float(self._model.logit_scale.detach().exp())


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.double(), dim=1).cpu()
