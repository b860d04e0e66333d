"""Why a step cannot be translated. Each means that the engine and this stage disagree about the KV cache."""

from __future__ import annotations


class TranslationError(Exception):
    """Base of the errors below. Nothing was translated, and no map changed."""


class UnmappedBlock(TranslationError):
    """A step would read a block that this stage never wrote for that engine."""


class PoolFull(TranslationError):
    """The engine uses more blocks than it was granted here."""


class SlotsBusy(PoolFull):
    """Replicas are just being written where the step needs room. None is placed before it has it, so try again soon."""


class NotServed(TranslationError):
    """A step came for an instance that this stage does not serve as a guest, or no longer."""


class ForeignRequest(TranslationError):
    """A result names a request of another tenant."""
