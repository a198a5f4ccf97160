"""Which form each checkpoint of a run takes, and which bases need an engine first. Reads headers, makes nothing."""

from collections.abc import Sequence

from personalq.errors import PersonalQError
from personalq.repository import Repository
from personalq.repository.forms import Form, form_of

from .work import Work


def form_for(work: Work, repository: Repository, checkpoint_id: str) -> Form:
    """The form of one checkpoint; a run that names a spec, and no form, means engines of their own."""
    if work.spec and work.form == "auto":
        return Form("merged", "--spec was given, which is of an engine of its own")
    return form_of(repository.whole(checkpoint_id), work.form)


def bases_of(work: Work, repository: Repository, ids: Sequence[str]) -> list[str]:
    """The bases that some checkpoint is attached to, each once. An unreadable checkpoint fails later, in its own task."""
    found: dict[str, None] = {}
    for one in ids:
        try:
            base = repository.card(one).base
            if base not in found and base in repository.bases() and form_for(work, repository, one).name == "attached":
                found[base] = None
        except PersonalQError:
            continue
    return list(found)
