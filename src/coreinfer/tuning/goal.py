"""What is asked for: a quality budget to keep at the fewest bytes, or a byte budget to use best."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import fmean

from coreinfer.errors import UserError, require_ratio
from coreinfer.evaluation.continuations import Quality, standard_error

_FORM = re.compile(r"\s*(kl|ppl|agreement)\s*(<=|>=)\s*(\+?)\s*(\d*\.?\d+(?:e[+-]?\d+)?)\s*(%?)\s*")
_EXAMPLES = "write 'kl<=0.05', 'ppl<=+2%' or 'agreement>=0.9'"


@dataclass(frozen=True)
class Measured:
    """A mean with its standard error over the prompts."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Goal:
    """The loss that is kept small, and the limit of it or of the bytes.

    The loss is KL to dense decoding (`kl`, nats), the relative rise of the perplexity over the
    dense one (`ppl`: 0.02 is +2 %), or the share of tokens whose likeliest is not the dense one
    (`agreement`).

    Attributes:
        metric: "kl", "ppl" or "agreement".
        limit: of the loss; None where the bytes are limited.
        share: of the dense MLP's bytes that may be read; None where the loss is limited.
    """

    metric: str = "kl"
    limit: float | None = None
    share: float | None = None

    @classmethod
    def of_budget(cls, text: str) -> Goal:
        """ "kl<=0.05", "ppl<=+2%" or "agreement>=0.9".

        Raises:
            UserError: if it is none of these, or no setting could ever be within it.
        """
        match = _FORM.fullmatch(text.lower())
        if match is None:
            raise UserError(f"{text!r} is no budget; {_EXAMPLES}")
        metric, relation, plus, digits, percent = match.groups()
        value = float(digits)
        wanted = ">=" if metric == "agreement" else "<="
        if relation != wanted:
            raise UserError(f"{text!r} bounds {metric} from the wrong side; {_EXAMPLES}")
        if bool(percent) != (metric == "ppl"):
            raise UserError(f"{text!r}: ppl is bounded in percent over dense alone; {_EXAMPLES}")
        if plus and metric != "ppl":
            raise UserError(f"{text!r}: a + belongs to ppl alone; {_EXAMPLES}")
        if metric == "agreement":
            return cls(metric, limit=1.0 - require_ratio("agreement", value))
        if not 0 < value < math.inf:
            raise UserError(f"{metric} must be above 0, got {text!r}: nothing sparse would be left")
        return cls(metric, limit=value / 100 if percent else value)

    @classmethod
    def of_bytes(cls, share: float) -> Goal:
        """As little KL as can be at this share of the dense MLP's bytes.

        Raises:
            UserError: if it is not above 0 and below 1.
        """
        if not 0 < share < 1:
            raise UserError(f"bytes must be above 0 and below 1, all of the MLPs', got {share:g}")
        return cls(share=share)

    def loss(self, quality: Quality, dense: Quality) -> Measured:
        """Of a setting, beside the dense results of the same prompts."""
        if self.metric == "kl":
            return Measured(fmean(quality.kl), standard_error(quality.kl))
        if self.metric == "agreement":
            return Measured(1.0 - fmean(quality.agreement), standard_error(quality.agreement))
        rises = [a - b for a, b in zip(quality.nll, dense.nll, strict=True)]
        ratio = math.exp(fmean(rises))
        return Measured(ratio - 1.0, ratio * standard_error(rises))  # the delta method

    def describe_loss(self, loss: Measured) -> str:
        """In the words in which it was asked for."""
        if self.metric == "ppl":
            return f"ppl {100 * loss.mean:+.2f} ± {100 * loss.error:.2f} %"
        if self.metric == "agreement":
            return f"agreement {1 - loss.mean:.4f} ± {loss.error:.4f}"
        return f"kl {loss.mean:.4f} ± {loss.error:.4f}"

    def __str__(self) -> str:
        if self.share is not None:
            return f"bytes <= {self.share:g} of the dense MLPs'"
        assert self.limit is not None
        if self.metric == "ppl":
            return f"ppl <= +{100 * self.limit:g} %"
        if self.metric == "agreement":
            return f"agreement >= {1 - self.limit:g}"
        return f"kl <= {self.limit:g}"
