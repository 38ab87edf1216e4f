"""Facts on published models, for the names, headers and cards of what was made from them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model on the hub."""

    name: str
    """A short name, for names of files."""
    architecture: str
    """Its name in the metadata of kohya's trainers (`modelspec.architecture`), which other tools read."""
    version: str
    """Its name as a base model of an adapter (`ss_base_model_version`)."""
    license: str = "other"
    """The hub's identifier of its licence."""
    license_name: str | None = None
    """The name of a licence that has no identifier."""


PUBLISHED: dict[str, Published] = {
    "black-forest-labs/FLUX.1-dev": Published(
        name="flux-dev", architecture="flux-1-dev", version="flux1", license_name="flux-1-dev-non-commercial-license"
    ),
    "black-forest-labs/FLUX.2-dev": Published(
        name="flux2-dev", architecture="Flux.2-dev", version="flux2", license_name="flux-non-commercial-license"
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": Published(
        name="flux2-klein-base-4b", architecture="Flux.2-klein-4b", version="flux2_klein_4b", license="apache-2.0"
    ),
    "black-forest-labs/FLUX.2-klein-base-9B": Published(
        name="flux2-klein-base-9b",
        architecture="Flux.2-klein-9b",
        version="flux2_klein_9b",
        license_name="flux-non-commercial-license",
    ),
    "stabilityai/stable-diffusion-3.5-large": Published(
        name="sd3.5-large",
        architecture="stable-diffusion-3-5-large",
        version="sd3_5-large",
        license_name="stabilityai-ai-community",
    ),
    "stabilityai/stable-diffusion-3.5-medium": Published(
        name="sd3.5-medium",
        architecture="stable-diffusion-3-5-medium",
        version="sd3_5-medium",
        license_name="stabilityai-ai-community",
    ),
    "Qwen/Qwen-Image": Published(
        name="qwen-image", architecture="Qwen-Image", version="qwen_image", license="apache-2.0"
    ),
    "Qwen/Qwen-Image-2512": Published(
        name="qwen-image-2512", architecture="Qwen-Image", version="qwen_image", license="apache-2.0"
    ),
    "Tongyi-MAI/Z-Image": Published(name="z-image", architecture="Z-Image", version="zimage", license="apache-2.0"),
    "Tongyi-MAI/Z-Image-Turbo": Published(
        name="z-image-turbo", architecture="Z-Image", version="zimage", license="apache-2.0"
    ),
    "krea/Krea-2-Raw": Published(
        name="krea2-raw", architecture="Krea-2", version="krea2", license_name="krea-2-community-license"
    ),
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": Published(
        name="sana-1600m-512px", architecture="Sana", version="sana", license_name="nvidia-nscl-v2-custom"
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Published(
        name="sana-1600m-1024px", architecture="Sana", version="sana", license_name="nvidia-nscl-v2-custom"
    ),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": Published(
        name="sana1.5-1.6b-1024px", architecture="Sana", version="sana", license_name="nvidia-nscl-v2-custom"
    ),
    "lodestones/Chroma1-HD": Published(
        name="chroma1-hd", architecture="chroma", version="chroma", license="apache-2.0"
    ),
}
"""By hub id: the keys of the families' `known`. A model that is missing has the names of its family's file, and licence `other`."""
