"""Why a step cannot be translated. Each means that the engine and this stage disagree about the KV cache."""

from __future__ import annotations


class TranslationError(Exception):
    """Base of the errors below. Nothing was translated, and no map changed."""


class UnmappedBlock(TranslationError):
    """A step would read a block that this stage never wrote for that engine."""


class PoolFull(TranslationError):
    """The engine uses more blocks than it was granted here."""


class ForeignRequest(TranslationError):
    """A result names a request of another tenant."""
