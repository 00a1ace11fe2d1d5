"""What a label may be: checked and normalised once, at the border.

Pure functions; labels end up in file names, terminals and web pages, so nothing invisible gets in.
"""

from __future__ import annotations

import unicodedata

from latentd.errors import LabelInvalid

UNKNOWN = "unknown"  # the decision of a classify answer that trusts no label


def clean_label(raw: str, max_chars: int) -> str:
    """The label in Unicode normal form C, without the white space around it. Raises LabelInvalid."""
    if len(raw) > 4 * max_chars:  # before normalising: nobody pays for the size of a hostile label
        raise LabelInvalid(f"The label has {len(raw)} characters; the longest may have {max_chars}.")
    label = unicodedata.normalize("NFC", raw.strip())
    if not label:
        raise LabelInvalid("The label is empty.")
    if len(label) > max_chars:
        raise LabelInvalid(f"The label has {len(label)} characters; the longest may have {max_chars}.")
    if not label.isprintable():
        raise LabelInvalid(f"The label {label!a} holds control characters, or others that can't be seen.")
    if label == UNKNOWN:
        raise LabelInvalid('"unknown" can\'t be taught: it is what latentd answers when it trusts no label.')
    return label
