"""Teacher, student and the two EMAs behind one interface: as adapters over a shared base, or as full copies."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scfm_core.models.adapters import LoRABank, LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily, dtype_of
from scfm_core.progress import beat


class ShortcutModel(ABC):
    """The networks of a run. The trainer, the sampler and the evaluation call this."""

    family: ModelFamily

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """The distinct modules. A key is the first role that the module serves."""

    @abstractmethod
    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trained weights (`student`) or an EMA's (`ema_fast`, `ema_slow`), fp32, by canonical name."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the trained weights by canonical name, also when an engine has sharded them."""

    @abstractmethod
    def velocity(
        self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor, *, for_target: bool = False
    ) -> Tensor:
        """The velocity of a role.

        Args:
            role: `student`, `ema_fast`, `ema_slow` or `teacher`.
            x: noised latents, [B, C, H, W].
            sigma: fp32 [B].
            cond: B rows.
            strength: of the adapter, fp32 [B]; 0 is the teacher. Role `teacher` ignores it. On the CPU: full weights read it,
                and a read from a GPU would wait for the GPU's queue.
            for_target: a pass without gradient for the target, which may run in fp8.

        Returns:
            [B, C, H, W].
        """

    def student_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor) -> Tensor:
        """The trained network."""
        return self.velocity("student", x, sigma, cond, strength)

    def near_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor) -> Tensor:
        """First half of the target: the teacher where strength is 0, the fast EMA elsewhere."""
        return self.velocity("ema_fast", x, sigma, cond, strength, for_target=True)

    def far_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor) -> Tensor:
        """Second half of the target: the slow EMA."""
        return self.velocity("ema_slow", x, sigma, cond, strength, for_target=True)


class LoRAModel(ShortcutModel):
    """One frozen base with a bank of adapters. All roles are forwards of the same module.

    Args:
        family: of the network.
        network: the pre-trained network; it is frozen, and adapted in place. If it is on the meta device, `bank.filling` makes the
            adapters' initial weights.
        config: of the adapters.
        seed: of the adapters' initial weights.
    """

    def __init__(self, family: ModelFamily, network: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
        self.family = family
        self.bank = LoRABank(network, config, seed)
        self._shapes = {name: tuple(factor.shape) for name, factor in self.bank.parameters("student").items()}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The single module of all roles."""
        return {"student": self.bank.network}

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """See `ShortcutModel`: an adapter's factors."""
        return self.bank.parameters(role)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `ShortcutModel`."""
        return self._shapes

    def velocity(
        self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor, *, for_target: bool = False
    ) -> Tensor:
        """See `ShortcutModel`. The result is in the network's dtype."""
        beat()
        if role == "teacher":
            self.bank.select(None)
        else:
            rows = strength.repeat(self.family.rows_per_sample(cond))
            self.bank.select(role, rows.to(x.device, non_blocking=True), in_fp8=for_target)
        return self.family.velocity(self.bank.network, x, sigma, cond)


class FullModel(ShortcutModel):
    """All weights are trained: student and EMAs are separate fp32 networks; the teacher, if any, is frozen.

    Only strengths 0 (teacher) and 1 exist; a near pass with both runs two sub-batches.

    Args:
        family: of the networks.
        networks: by role: `student`, `ema_fast`, `ema_slow`, and `teacher` for teacher rows. Sampling needs one of them.
        shapes: whole shapes of the trained weights by name.
        compute_dtype: of matrix products; autocast is used for trained networks of another dtype.
    """

    def __init__(
        self,
        family: ModelFamily,
        networks: Mapping[str, nn.Module],
        shapes: Mapping[str, tuple[int, ...]],
        compute_dtype: torch.dtype,
    ) -> None:
        self.family = family
        self.compute_dtype = compute_dtype
        self._shapes = dict(shapes)
        self._networks = dict(networks)
        trained = next(network for role, network in networks.items() if role != "teacher")
        self._mixed = dtype_of(trained) != compute_dtype

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By role."""
        return self._networks

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """See `ShortcutModel`: all weights of a network."""
        return dict(self._networks[role].named_parameters())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `ShortcutModel`."""
        return self._shapes

    def velocity(
        self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor, *, for_target: bool = False
    ) -> Tensor:
        """See `ShortcutModel`. Only strengths 0 and 1 are allowed.

        Raises:
            ValueError: for another strength, or strength 0 without a teacher.
        """
        if role == "teacher":
            return self._run("teacher", x, sigma, cond)
        strengths = strength.tolist()
        if not {0.0, 1.0}.issuperset(strengths):
            raise ValueError(
                "full weights support only strengths 0 and 1; step-scaled strengths need train.weights: lora"
            )
        is_near = role == "ema_fast" and for_target
        if not is_near and 0.0 not in strengths:
            return self._run(role, x, sigma, cond)
        if "teacher" not in self._networks:
            if 0.0 in strengths:
                raise ValueError("this model was built without a teacher, but some rows have strength 0")
            return self._run(role, x, sigma, cond)
        # Every process runs both networks, also if no row needs one of them: a sharded network gathers its weights
        # collectively. A network without rows runs on row 0, and its result is discarded.
        output = torch.empty_like(x)
        for name, value in (("teacher", 0.0), (role, 1.0)):
            rows = [row for row, own in enumerate(strengths) if own == value]
            on_host = torch.tensor(rows or [0])
            used = on_host.to(x.device, non_blocking=True)
            part = self._run(name, x[used], sigma[used], cond[on_host]).to(x.dtype)
            if rows:
                output = output.index_copy(0, used, part)
        return output

    def _run(self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        beat()
        network = self._networks[role]
        with torch.autocast(x.device.type, dtype=self.compute_dtype, enabled=self._mixed and role != "teacher"):
            return self.family.velocity(network, x, sigma, cond)
