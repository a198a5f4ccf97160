"""Named failures. Each text is one line: where: what must be, what was got, how to fix it."""

from __future__ import annotations


class PersonalQError(Exception):
    """A failure that a person can act on. The command line prints its text as one line and exits with 1."""


class CardError(PersonalQError):
    """A card, or the text it was read from, is not usable."""


class RepositoryError(PersonalQError):
    """A repository folder, an id in it, or a source that should be added to it is not usable."""


class SpecError(PersonalQError):
    """A TAQ spec is not valid, or does not fit its checkpoint."""


class BundleError(PersonalQError):
    """A bundle or one of its files is missing, changed or not understood."""


class ParityError(PersonalQError):
    """An exported graph does not compute what the checkpoint computes."""


class EngineError(PersonalQError):
    """An engine cannot be made, loaded or run on this device."""


class CheckinError(PersonalQError):
    """A request, its answers or the Check-in index is not usable."""


class PromptError(PersonalQError):
    """A prompt is not usable, for example because its trigger does not fit into the text encoder."""


class FleetError(PersonalQError):
    """The machines of a run over many checkpoints cannot be reached, or its store cannot be used."""


class MissingExtraError(PersonalQError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'personalq[{extra}]'")
        self.package = package
        self.extra = extra
