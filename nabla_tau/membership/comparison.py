"""Which samples an audit may compare: members with non-members of the same kind, and nothing else.

An attack that sets forgotten samples of one class against unseen samples of all classes detects the class, not
membership. So where the forget set holds only some classes, non-members are taken from those classes alone; and where
whole classes were removed, a model is not asked for them when its test accuracy is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nabla_tau.arguments import numbers_checked

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Samples to use. members: [F] over the forget set; nonmembers, test, unseen_removed: [U] over the unseen set.

    test: where test accuracy is counted; unseen_removed: unseen samples of the removed classes. `classes` are those
    compared (None: no restriction), `removed` those removed, `notes` what a reader must know about the choice.
    """

    members: Mask
    nonmembers: Mask
    test: Mask
    unseen_removed: Mask
    classes: tuple[int, ...] | None
    removed: tuple[int, ...]
    notes: tuple[str, ...]


@numbers_checked
def choose_comparison(
    forget_targets: NDArray[np.int64] | None,
    unseen_targets: NDArray[np.int64] | None,
    *,
    n_forget: int,
    n_unseen: int,
    removed: Sequence[int] = (),
) -> Comparison:
    """Choose the samples to compare from the targets ([n_forget], [n_unseen]; None where samples have no one class).

    Forgotten samples of a class without unseen samples are left out, with a note. ValueError when no class of the
    forget set has unseen samples: there is then nothing that the attack could rightly be compared with.
    """
    everything, every_unseen = np.ones(n_forget, bool), np.ones(n_unseen, bool)
    if forget_targets is None or unseen_targets is None:
        nothing = np.zeros(n_unseen, bool)
        return Comparison(everything, every_unseen, every_unseen, nothing, None, (), ())
    nonmembers = np.isin(unseen_targets, forget_targets)
    members = np.isin(forget_targets, unseen_targets)
    if not nonmembers.any():
        raise ValueError(
            f"the forget set holds classes {_listed(np.unique(forget_targets))}, and the unseen set no sample of them "
            f"(its classes: {_listed(np.unique(unseen_targets))}); unseen samples of the forgotten classes are needed"
        )
    notes = []
    if not members.all():
        missing = np.unique(forget_targets[~members])
        notes.append(
            f"{int((~members).sum())} forgotten samples of classes {_listed(missing)} have no unseen samples of their "
            "class and are left out of the attack."
        )
    restricted = not nonmembers.all()
    classes = np.unique(unseen_targets[nonmembers])
    if restricted:
        notes.append(
            f"The forget set holds {classes.size} of the classes ({_listed(classes)}), so the attack compares with the "
            f"{int(nonmembers.sum())} unseen samples of these classes only."
        )
    if _mix_differs(forget_targets[members], unseen_targets[nonmembers]):
        notes.append(
            "Forgotten and unseen samples differ in how often each class occurs, which an attack can pick up without "
            "any memory of the samples: trust the gap to a retrained model, not the distance from 0.5."
        )
    unseen_removed = np.isin(unseen_targets, np.asarray(removed, dtype=np.int64))
    return Comparison(
        members=members,
        nonmembers=nonmembers,
        test=~unseen_removed,
        unseen_removed=unseen_removed,
        classes=tuple(classes.tolist()) if restricted else None,
        removed=tuple(int(c) for c in removed),
        notes=tuple(notes),
    )


def _mix_differs(forget: NDArray[np.int64], unseen: NDArray[np.int64]) -> bool:
    """Whether class frequencies differ by more than a tenth (total variation) and by more than chance."""
    classes, index = np.unique(np.concatenate([forget, unseen]), return_inverse=True)
    if classes.size < 2:
        return False
    counts = np.stack([np.bincount(part, minlength=classes.size) for part in np.split(index, [forget.size])])
    share = counts / counts.sum(1, keepdims=True)
    if np.abs(share[0] - share[1]).sum() / 2 <= 0.1:
        return False
    from scipy.stats import chi2_contingency

    return bool(chi2_contingency(counts).pvalue < 1e-3)


def _listed(classes: NDArray[np.int64], limit: int = 8) -> str:
    shown = ", ".join(str(c) for c in classes[:limit])
    return shown if classes.size <= limit else f"{shown}, ... ({classes.size} in all)"
