"""The loss of the student."""

from torch import Tensor

from scfm_core.scfm.plan import ShortcutPlan


def scfm_loss(prediction: Tensor, target: Tensor, plan: ShortcutPlan) -> Tensor:
    """Mean squared error in velocity space (paper, Eq. 22), a scalar in fp32.

    Args:
        prediction: the student's velocity at `plan.sigma_start`, [B, ...], any dtype.
        target: from `scfm_target`, fp32 [B, ...].
        plan: the rows' plan; only its length is checked.
    """
    if prediction.shape != target.shape or len(plan) != len(target):
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and a plan of {len(plan)} rows differ"
        )
    return (prediction.to(target.dtype) - target).square().mean()
