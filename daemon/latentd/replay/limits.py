"""The journal's rules from the configuration. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from latentd.errors import LabelInvalid


@dataclass(frozen=True)
class JournalLimits:
    """holdout_every: 0 keeps nothing out; duplicate_cosine above 1 finds exact duplicates only."""

    budget_bytes: int
    duplicate_cosine: float
    holdout_every: int
    holdout_per_class: int
    max_label_chars: int
    seed: int = 0

    def check_label(self, label: str) -> None:
        """Raises LabelInvalid when the label is empty, too long, or holds characters that can't be shown."""
        if not label.strip() or len(label) > self.max_label_chars:
            raise LabelInvalid(f"a label has 1 to {self.max_label_chars} characters; this one has {len(label.strip())}")
        if not label.isprintable() or label != label.strip():
            raise LabelInvalid("a label may not hold control characters, nor begin or end with spaces")
