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
