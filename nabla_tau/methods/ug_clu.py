"""UG-CLU: one request to learn some samples and to unlearn others. A stream of them: `nabla_tau.requests`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nabla_tau import fingerprint
from nabla_tau.functional import check_labels
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.sfr_on import SFRon
from nabla_tau.methods.stages import Drawn, Stage, Term
from nabla_tau.sources import as_source


@dataclass(frozen=True)
class UGCLU(SFRon):
    """Unified gradient-based continual learning and unlearning (Huang et al. 2025, arXiv 2505.15178), which brings the
    model's outputs near those of a model trained on what remains (R, `retain`) and is to be learned (L, `learn`), and
    not on what is to be unlearned (U, `forget`):

        min p_R KL_R(wanted || model) + p_L KL_L(wanted || model) + p_U KL_U(wanted || model)

    p: shares of the samples. On R and L the wanted model's outputs are taken to be the labels, so that its KL is the
    cross-entropy; on U they are not known, and the loss is raised as SFR-on raises it. The geometry is SFR-on's too:

        fast steps   min -p_U forget_alpha c sum_U e_i l_i / (p_L + p_U), then min p_L learn_alpha mean_L l / (p_L +
                     p_U), both masked by the Fisher information of L and U together against that of R, and clipped
        slow steps   min mean_R l

    The objective, fast and slow weights, adaptive coefficients and the mask are the paper's, of which only the abstract
    and summaries could be read. Ours are two fast steps instead of one (clipped together, whichever gradient is larger
    leaves nothing of the other), the weight of the learn loss, which unlike the ascent does not fade, and the published
    settings of SFR-on as defaults. Without `learn` it is SFR-on.

    learn: data like those of `unlearn`; None where there is nothing to learn. only_learns: `forget` is the data to
    learn, where there is nothing to unlearn. Raises TypeError and ValueError for data that cannot be read, and
    ValueError for `learn` beside only_learns.
    """

    learn: Any = field(default=None, repr=False)
    only_learns: bool = False
    learn_alpha: float = 1.0
    name: str = "ug-clu"
    learn_fingerprint: str | None = field(default=None, init=False)  # of what is learned, by which a run is known

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn is None:
            return
        if self.only_learns:
            raise ValueError("only_learns=True says that forget is what is to be learned: leave learn away")
        source = as_source(self.learn, "learn")
        object.__setattr__(self, "learn", source)
        object.__setattr__(self, "learn_fingerprint", fingerprint.of_source(source, source.targets()))

    def stages(self, setup: Setup) -> list[Stage]:
        learn = setup.source("forget") if self.only_learns else self.learn
        if learn is None:
            return super().stages(setup)
        labels = learn.targets()
        if setup.job.data.task == "classification" and labels is not None:
            try:
                check_labels(labels, setup.classes(self.name))
            except ValueError as error:
                raise ValueError(f"learn: {error}") from None
        unlearn = [] if self.only_learns else [setup.source("forget")]
        mask = self.saliency(setup, learn, *unlearn)
        share = learn.count / sum(source.count for source in (learn, *unlearn))

        def learning(drawn: Drawn, c: float) -> Term:
            return Term("learn_term", drawn.batch, weight=share * self.learn_alpha)

        fast = {"forget": self.unlearning(setup, 1 - share)} if unlearn else {}
        return [self.fast_and_slow(setup, mask, fast | {"learn": learning}, learn)]
