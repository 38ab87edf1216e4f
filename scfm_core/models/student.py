"""Teacher, student, the two EMAs and a fake score behind one interface: as adapters over a shared base, or as full copies."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn

from scfm_core.flow.rows import put_rows, take_rows
from scfm_core.models.adapters import TRAINED, LoRABank, LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily, dtype_of
from scfm_core.progress import beat
from scfm_core.readback import to_device


class ShortcutModel(ABC):
    """The networks of a run. The trainer, the sampler and the evaluation call this."""

    family: ModelFamily
    reads_strengths: ClassVar[bool] = False
    """Whether passes read the strengths: a read from a GPU would wait for the GPU's queue, so they stay on the host."""
    trained: tuple[str, ...] = ("student",)
    """The roles that are trained: with distribution matching also `fake`, the score of the student's images."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """The distinct modules. A key is the first role that the module serves."""

    @abstractmethod
    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The weights of a role in `trained`, or an EMA's (`ema_fast`, `ema_slow`), fp32, by canonical name; the same names in all roles."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the weights of a trained role by canonical name, also when an engine has sharded them."""

    @abstractmethod
    def velocity(
        self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor, *, for_target: bool = False
    ) -> Tensor:
        """The velocity of a role.

        Args:
            role: `student`, `ema_fast`, `ema_slow`, `teacher`; `fake` if it is one of `trained`.
            x: noised latents, [B, C, H, W].
            sigma: fp32 [B].
            cond: B rows.
            strength: of the adapter, fp32 [B]; 0 is the teacher. Role `teacher` ignores it. It is on the device of `x`; on the
                host for full weights, which read it (`reads_strengths`).
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

    def teacher_velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor) -> Tensor:
        """First half of the target on teacher rows alone: the teacher, whatever the strength."""
        return self.velocity("teacher", x, sigma, cond, strength, for_target=True)

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
        with_fake: with a fake score.
    """

    def __init__(
        self, family: ModelFamily, network: nn.Module, config: LoRAConfig, seed: int = 0, *, with_fake: bool = False
    ) -> None:
        self.family = family
        self.bank = LoRABank(network, config, seed, with_fake=with_fake)
        self.trained = TRAINED if with_fake else ("student",)
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
        before = vars(self.bank.selection).copy()
        if role == "teacher":
            self.bank.select(None, in_fp8=for_target)
        else:
            rows = to_device(strength, x.device).repeat(self.family.rows_per_sample(cond))
            self.bank.select(role, rows, in_fp8=for_target)
        velocity = self.family.velocity(self.bank.network, x, sigma, cond)
        if not torch.is_grad_enabled():  # the backward of an earlier pass may still read its selection
            vars(self.bank.selection).update(before)
        return velocity


class FullModel(ShortcutModel):
    """All weights are trained: student and EMAs are separate fp32 networks; the teacher, if any, is frozen.

    Only strengths 0 (teacher) and 1 exist; a near pass with both runs two sub-batches.

    Args:
        family: of the networks.
        networks: by role: `student`, `ema_fast`, `ema_slow`, and `teacher` for teacher rows. Sampling needs one of them.
        shapes: whole shapes of the trained weights by name.
        compute_dtype: of matrix products; autocast is used for trained networks of another dtype.
        near_is_collective: a near pass enters teacher and fast EMA on every process, in this order, also without a row for one of
            them: weights of sharded networks are gathered collectively.
        lockstep: for micro-batches of one row; within it a near pass runs only the network of its row, which differs between the
            processes.
    """

    reads_strengths = True

    def __init__(
        self,
        family: ModelFamily,
        networks: Mapping[str, nn.Module],
        shapes: Mapping[str, tuple[int, ...]],
        compute_dtype: torch.dtype,
        *,
        near_is_collective: bool = False,
        lockstep: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.family = family
        self.compute_dtype = compute_dtype
        self._near_is_collective, self._lockstep = near_is_collective, lockstep
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
        rows = {
            name: [row for row, own in enumerate(strengths) if own == value]
            for name, value in (("teacher", 0.0), (role, 1.0))
        }
        if rows["teacher"] and "teacher" not in self._networks:
            raise ValueError("this model was built without a teacher, but some rows have strength 0")
        runs_both = self._near_is_collective and role == "ema_fast" and for_target
        needed = [name for name, own in rows.items() if own]
        if len(needed) == 1 and not runs_both:
            return self._run(needed[0], x, sigma, cond)
        if runs_both and self._lockstep is not None:
            [name] = needed
            with self._lockstep():
                return self._run(name, x, sigma, cond)
        output = x
        for name, own in rows.items():
            used = own or [0]  # a sharded network without rows runs on row 0, and its result is not used
            part = self._run(name, take_rows(x, used), take_rows(sigma, used), cond[used]).to(x.dtype)
            output = put_rows(output, own, part)
        return output

    def _run(self, role: str, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        beat()
        network = self._networks[role]
        with torch.autocast(x.device.type, dtype=self.compute_dtype, enabled=self._mixed and role != "teacher"):
            return self.family.velocity(network, x, sigma, cond)
