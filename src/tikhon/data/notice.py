"""One thing that a person should be told about a table."""

from __future__ import annotations


class Notice(str):
    """A sentence, with the kind of thing that it tells: a page sorts and translates by the kind.

    >>> told = Notice("leak", "'paid' alone predicts the target")
    >>> told.kind, told
    ('leak', "'paid' alone predicts the target")
    """

    __slots__ = ("kind",)

    kind: str

    def __new__(cls, kind: str, text: str) -> Notice:
        """The sentence `text` of a kind."""
        told = super().__new__(cls, text)
        told.kind = kind
        return told

    def __reduce__(self) -> tuple[type[Notice], tuple[str, str]]:
        return Notice, (self.kind, str(self))

    def to_dict(self) -> dict[str, str]:
        """Plain values."""
        return {"kind": self.kind, "text": str(self)}
