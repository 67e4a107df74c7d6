"""Objectives of other methods on the same kernels: functions of the losses of a mixed batch, each a few lines.

    losses = row_losses(logits, targets)                       # or sample_losses, linear_row_losses
    npo(losses, forget_mask, reference).backward()

Every function f(l_1, .., l_N) of the losses has the gradient sum_i (df/dl_i) dl_i/dz, so autograd on the vector of N
losses gives the row weights and one weighted backward of the row kernel does the rest. All take losses [N], float, and
forget_mask [N] bool (True: forget), give a 0-d tensor to minimise, and count an empty group as 0; counts [N] bool
leaves out what is False (masked tokens, samples without a loss). `retain_weight` multiplies the mean loss of the
retained entries. What an entry is, the sample or the token, is said with each. What the mean over the forget entries
is taken of stands alone as `..._values`, for who has entries of one group only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nabla_tau.arguments import numbers_checked
from nabla_tau.objective import masked_mean


def _groups(forget_mask: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    retain_mask = ~forget_mask
    return (forget_mask, retain_mask) if counts is None else (forget_mask & counts, retain_mask & counts)


@numbers_checked
def grad_diff(
    losses: Tensor,
    forget_mask: Tensor,
    *,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """-forget_weight mean_f l + retain_weight mean_r l: GradDiff (Maini et al. 2024, TOFU, arXiv 2401.06121)."""
    forget, retain = _groups(forget_mask, counts)
    return retain_weight * masked_mean(losses, retain) - forget_weight * masked_mean(losses, forget)


@numbers_checked
def neg_grad_plus(losses: Tensor, forget_mask: Tensor, *, alpha: float = 0.95, counts: Tensor | None = None) -> Tensor:
    """alpha mean_r l - (1 - alpha) mean_f l: NegGrad+ (Kurmanji et al. 2023, arXiv 2302.09880)."""
    return grad_diff(losses, forget_mask, forget_weight=1 - alpha, retain_weight=alpha, counts=counts)


@numbers_checked
def npo_values(losses: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(-beta log(pi/pi_ref)) of entries [N], as in `npo`."""
    return 2 / beta * F.softplus(beta * (reference.detach() - losses))


@numbers_checked
def npo(
    losses: Tensor,
    forget_mask: Tensor,
    reference: Tensor,
    *,
    beta: float = 0.1,
    retain_weight: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """-(2/beta) mean_f log sigmoid(-beta log(pi/pi_ref)) + retain_weight mean_r l: NPO (Zhang et al. 2024, arXiv
    2404.05868).

    losses and reference [N]: -log pi of a whole sample, the sum over its tokens, by the model and by the original one;
    the latter without gradient.
    """
    forget, retain = _groups(forget_mask, counts)
    return masked_mean(npo_values(losses, reference, beta), forget) + retain_weight * masked_mean(losses, retain)


@numbers_checked
def sim_npo_values(losses: Tensor, beta: float, delta: float) -> Tensor:
    """-(2/beta) log sigmoid(beta (l - delta)) of entries [N], as in `sim_npo`."""
    return 2 / beta * F.softplus(-beta * (losses - delta))


@numbers_checked
def sim_npo(
    losses: Tensor,
    forget_mask: Tensor,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    forget_weight: float = 0.125,
    retain_weight: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """-(2/beta) forget_weight mean_f log sigmoid(beta (l - delta)) + retain_weight mean_r l: SimNPO (Fan et al. 2024,
    arXiv 2410.07163). An entry is a sample, its loss the mean over its tokens; no reference model."""
    forget, retain = _groups(forget_mask, counts)
    saturating = masked_mean(sim_npo_values(losses, beta, delta), forget)
    return forget_weight * saturating + retain_weight * masked_mean(losses, retain)


@numbers_checked
def wga_values(losses: Tensor, beta: float) -> Tensor:
    """-p^beta l of entries [N], as in `wga`."""
    return -(-beta * losses.detach()).exp() * losses


@numbers_checked
def wga(
    losses: Tensor,
    forget_mask: Tensor,
    *,
    beta: float = 1.0,
    retain_weight: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """-mean_f p^beta l + retain_weight mean_r l with p = e^-l held constant: WGA (Wang et al. 2025, arXiv 2502.19301).

    An entry is a token: what is already unlikely is not pushed further.
    """
    forget, retain = _groups(forget_mask, counts)
    return retain_weight * masked_mean(losses, retain) + masked_mean(wga_values(losses, beta), forget)


@numbers_checked
def sat_imp_values(losses: Tensor, beta1: float, beta2: float) -> Tensor:
    """-p^beta1 (1 - p)^beta2 l of entries [N], as in `sat_imp`."""
    held = losses.detach()
    # 1 - p without the subtraction, which is 0 for a memorised token.
    return -(-beta1 * held).exp() * (-torch.expm1(-held)) ** beta2 * losses


@numbers_checked
def sat_imp(
    losses: Tensor,
    forget_mask: Tensor,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    retain_weight: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """-mean_f p^beta1 (1 - p)^beta2 l + retain_weight mean_r l with p = e^-l held constant: SatImp (Yang et al. 2025,
    arXiv 2505.11953). An entry is a token."""
    forget, retain = _groups(forget_mask, counts)
    return retain_weight * masked_mean(losses, retain) + masked_mean(sat_imp_values(losses, beta1, beta2), forget)


@numbers_checked
def adaptive_weights(losses: Tensor, exponent: float) -> Tensor:
    """l^-exponent of entries [N], without gradient: the coefficients of `sfr_on` but for their sum."""
    # A loss that underflowed to 0 would take all the weight as infinity over infinity.
    return losses.detach().clamp(min=torch.finfo(losses.dtype).tiny) ** -exponent


@numbers_checked
def sfr_on(
    losses: Tensor,
    forget_mask: Tensor,
    *,
    forget_weight: float = 1.0,
    exponent: float = 0.5,
    retain_weight: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """-forget_weight sum_f e_i l_i + retain_weight mean_r l with e_i = l_i^-exponent / sum_f l_j^-exponent held
    constant: the adaptive coefficients of SFR-on (Huang et al. 2024, arXiv 2409.19732). An entry is a sample.

    The least-forgotten samples weigh most. SFR-on itself takes its two parts in separate steps: forget_weight=0 or
    retain_weight=0 leaves one out.
    """
    forget, retain = _groups(forget_mask, counts)
    raw = torch.where(forget, adaptive_weights(losses, exponent), 0.0)
    weights = raw / raw.sum().clamp(min=torch.finfo(losses.dtype).tiny)
    ascent = torch.where(forget, weights * losses, 0.0).sum()
    return retain_weight * masked_mean(losses, retain) - forget_weight * ascent
