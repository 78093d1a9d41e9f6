"""The claims of Park et al., What Do Self-Supervised Vision Transformers Learn?, ICLR 2023, arXiv:2305.00729.

Every effect is written so that the paper claims it is above 0. `attributed` names the models the paper gives
the property to: a claim about CL must go beyond the untrained network in the CL model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from probekit.findings.contrast import Contrast, Nearer
from probekit.findings.finding import NotMeasured, Verdict
from probekit.findings.quantities import Above, LastLess, Quantity, Rank
from probekit.findings.spans import (
    BEST_LAYER,
    FIRST_THIRD,
    LAST_LAYER,
    LAST_THIRD,
    LATE_MINUS_EARLY,
)

if TYPE_CHECKING:
    from probekit.findings.evidence import Evidence, Subject

_HIGH_FREQUENCY = Quantity("fourier", inner=LastLess(0))
_HIGH_FREQUENCY_NO_DC = Quantity("fourier", inner=LastLess(1))
_ENTROPY_SHARE = Quantity("attention_entropy", "attention_entropy_share")
_NEARLY_UNIFORM = 0.95
_RANK_64 = 64  # of the spectra, "64th highest" in Fig. 7


class Collapse(Contrast):
    """A low NMI is one map for all queries, or attention that is equal over all keys. This one says which."""

    def evaluate(self, evidence: Evidence) -> Verdict:
        verdict = super().evaluate(evidence)
        models = {s.name: s for s in evidence.subjects}
        parts = [self._said(evidence, models, part) for part in verdict.parts]
        return replace(self._said(evidence, models, verdict), parts=tuple(parts))

    def _said(self, evidence: Evidence, models: Mapping[str, Subject], verdict: Verdict) -> Verdict:
        if verdict.effect is None:
            return verdict
        cl = next(models[name] for name in verdict.models if models[name].objective == "CL")
        try:
            share = evidence.effect([(cl, 1.0)], _ENTROPY_SHARE, self.over)
        except NotMeasured:
            said = "whether its maps are uniform or one for all queries is not measured (attention_entropy)"
        else:
            kind = "nearly uniform" if share.value >= _NEARLY_UNIFORM else "no uniform ones"
            said = f"its maps are {kind}: entropy {share.value:.3f} of the largest possible"
        return replace(verdict, reason=f"{verdict.reason}; {said}")


ATTENDS_FARTHER = Contrast(
    name="attends-farther",
    claim="Later layers of the CL model attend farther than those of the MIM model.",
    sentence=(
        '"CL trains self-attentions to capture longer-range global patterns than MIM, [...] especially in '
        'the later layers" (abstract; Fig. 3)'
    ),
    quantity=Quantity("attention_distance", "attention_distance_share"),
    higher="CL",
    than="MIM",
    over=LAST_THIRD,
)

NMI_COLLAPSES = Collapse(
    name="nmi-collapses",
    claim="In later layers, attention of the CL model depends less on the query than that of the MIM model.",
    sentence=(
        'CL "makes the self-attentions collapse into homogeneity for all query tokens and heads" (abstract; '
        "Fig. 4, NMI)"
    ),
    quantity="nmi",
    higher="MIM",
    than="CL",
    over=LAST_THIRD,
    attributed="CL",
)

HEADS_ALIKE = Contrast(
    name="heads-alike",
    claim="In later layers, heads of the CL model represent a token more alike than those of the MIM model.",
    sentence=(
        '"Such homogeneity of self-attention reduces the diversity of representations" (abstract; Fig. 5, '
        "cosine similarity between heads)"
    ),
    quantity="similarity_heads",
    higher="CL",
    than="MIM",
    over=LAST_THIRD,
)

DEPTHS_ALIKE = Contrast(
    name="depths-alike",
    claim="In later layers, attention changes the tokens of the CL model less than those of the MIM model.",
    sentence=(
        '"Such homogeneity of self-attention reduces the diversity of representations" (abstract; Fig. 5, '
        "cosine similarity before and after self-attention)"
    ),
    quantity="similarity_depths",
    higher="CL",
    than="MIM",
    over=LAST_THIRD,
)

TOKENS_ALIKE = Contrast(
    name="tokens-alike",
    claim="In later layers, tokens of an image are more alike in the CL model than in the MIM model.",
    sentence=(
        '"Such homogeneity of self-attention reduces the diversity of representations" (abstract; Fig. 5, '
        "cosine similarity between tokens)"
    ),
    quantity="similarity_tokens",
    higher="CL",
    than="MIM",
    over=LAST_THIRD,
)

TOKEN_VOLUME = Contrast(
    name="token-volume",
    claim="With depth, the MIM model spreads an image's tokens over more directions; the CL model less so.",
    sentence=(
        "CL changes the singular values of the token distribution little over depth, MIM raises them "
        "(section 3, paraphrased; Fig. 7, token level, relative to the second)"
    ),
    quantity=Quantity("spectrum_tokens", inner=Rank(_RANK_64, less=2)),
    higher="MIM",
    than="CL",
    over=LATE_MINUS_EARLY,
)

TOKEN_VOLUME_ABSOLUTE = Contrast(
    name="token-volume-absolute",
    claim="With depth, the volume of an image's tokens grows more in the MIM model than in the CL model.",
    sentence=(
        "As `token-volume`, with singular values that aren't taken relative to the second: the two readings "
        "of Fig. 7 can differ in sign"
    ),
    quantity=Quantity("spectrum_tokens", inner=Rank(_RANK_64)),
    higher="MIM",
    than="CL",
    over=LATE_MINUS_EARLY,
)

IMAGE_VOLUME = Contrast(
    name="image-volume",
    claim="With depth, the CL model spreads images over more directions; the MIM model less so.",
    sentence=(
        "CL raises the singular values of the distribution of images over depth, MIM does not (section 3, "
        "paraphrased; Fig. 7, image level, relative to the second)"
    ),
    quantity=Quantity("spectrum_images", inner=Rank(_RANK_64, less=2)),
    higher="CL",
    than="MIM",
    over=LATE_MINUS_EARLY,
)

LOW_FREQUENCY = Contrast(
    name="low-frequency",
    claim="In later layers, tokens of the CL model hold less high frequency than those of the MIM model.",
    sentence='"CL utilizes the low-frequency signals of the representations" (abstract; Fig. 9)',
    quantity=_HIGH_FREQUENCY,
    higher="MIM",
    than="CL",
    over=LAST_THIRD,
    attributed="CL",
)

HIGH_FREQUENCY = Contrast(
    name="high-frequency",
    claim="In later layers, tokens of the MIM model hold more high frequency than those of the CL model.",
    sentence='CL utilizes low frequencies, "but MIM utilizes high-frequencies" (abstract; Fig. 9)',
    quantity=_HIGH_FREQUENCY,
    higher="MIM",
    than="CL",
    over=LAST_THIRD,
)

LOW_FREQUENCY_NO_DC = Contrast(
    name="low-frequency-no-dc",
    claim="Their mean left out, later tokens of the CL model hold less high frequency than the MIM model's.",
    sentence=(
        "As `low-frequency`, relative to the lowest frequency above 0: the paper's curve falls with the mean "
        "of the tokens as with a lack of detail"
    ),
    quantity=_HIGH_FREQUENCY_NO_DC,
    higher="MIM",
    than="CL",
    over=LAST_THIRD,
    attributed="CL",
)

HIGH_FREQUENCY_NO_DC = Contrast(
    name="high-frequency-no-dc",
    claim="Their mean left out, later tokens of the MIM model hold more high frequency than the CL model's.",
    sentence="As `high-frequency`, relative to the lowest frequency above 0",
    quantity=_HIGH_FREQUENCY_NO_DC,
    higher="MIM",
    than="CL",
    over=LAST_THIRD,
)

SHAPE_BIASED = Contrast(
    name="shape-biased",
    claim="Where shape and texture disagree, the CL model goes by the shape more often than the MIM model.",
    sentence='"CL is more shape-oriented and MIM more texture-oriented" (abstract; Fig. 8a)',
    quantity="shape_bias",
    higher="CL",
    than="MIM",
    over=LAST_LAYER,
)

LOSES_TO_NOISE = Contrast(
    name="loses-to-noise",
    claim="High-frequency noise costs the MIM model more accuracy than the CL model.",
    sentence=(
        "MIM's accuracy drops more than CL's under high-frequency noise (section 3, paraphrased; Fig. 8b, "
        "here bands from 0.5 pi upwards)"
    ),
    quantity=Quantity("frequency_robustness", inner=Above(0.5)),
    higher="MIM",
    than="CL",
    over=LAST_LAYER,
)

SEPARATES_LAST = Contrast(
    name="separates-last",
    claim="At the last layer, a linear probe on the CL model is more accurate than one on the MIM model.",
    sentence=(
        '"This CL property helps ViTs linearly separate images in their representation spaces" (abstract; '
        "Fig. 11)"
    ),
    quantity="linear_probe",
    higher="CL",
    than="MIM",
    over=LAST_LAYER,
)

PEAKS_LATER = Contrast(
    name="peaks-later",
    claim="The CL model is best for a linear probe at a later layer than the MIM model.",
    sentence=(
        "Linear probing of CL is best at the end, of MIM in the middle (section 4, paraphrased; Fig. 11)"
    ),
    quantity="linear_probe",
    higher="CL",
    than="MIM",
    over=BEST_LAYER,
)

LATER_LAYERS_MATTER = Contrast(
    name="later-layers-matter",
    claim="From early to late layers, a linear probe gains more on the CL model than on the MIM model.",
    sentence=(
        '"CL plays a crucial role in the later layers, while MIM mainly focuses on the early layers" '
        "(abstract; Fig. 11)"
    ),
    quantity="linear_probe",
    higher="CL",
    than="MIM",
    over=LATE_MINUS_EARLY,
    attributed=("CL", "MIM"),
)


def _hybrid(name: str, what: str, quantity: Quantity | str) -> tuple[Nearer, Nearer]:
    """Nearer to MIM than to CL in the first third, and the other way round in the last."""
    sentence = (
        '"CL and MIM can complement each other": the hybrid is like MIM in early and like CL in later layers '
        "(abstract and section 5, paraphrased; Fig. 12)"
    )
    early = Nearer(
        name=f"hybrid-{name}-early",
        claim=f"In early layers, the hybrid model is nearer to the MIM than to the CL model in {what}.",
        sentence=sentence,
        quantity=quantity,
        of="hybrid",
        to="MIM",
        than="CL",
        over=FIRST_THIRD,
    )
    return early, Nearer(
        name=f"hybrid-{name}-late",
        claim=f"In later layers, the hybrid model is nearer to the CL than to the MIM model in {what}.",
        sentence=sentence,
        quantity=quantity,
        of="hybrid",
        to="CL",
        than="MIM",
        over=LAST_THIRD,
    )


HYBRID_PROBE_EARLY, HYBRID_PROBE_LATE = _hybrid("probe", "linear probing", "linear_probe")
HYBRID_NMI_EARLY, HYBRID_NMI_LATE = _hybrid("nmi", "NMI", "nmi")
HYBRID_FOURIER_EARLY, HYBRID_FOURIER_LATE = _hybrid("fourier", "frequency", _HIGH_FREQUENCY)
