"""Level (a): is this bundle what its key says? Hashes, manifest, spec and goldens against one another; no graph is opened."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from personalq.bundle import SPEC, Manifest, bundle_key, check_files, file_sha256, inside
from personalq.errors import PersonalQError
from personalq.goldens import GOLDEN
from personalq.repository.settings import Settings
from personalq.spec import read_spec
from personalq.weights.header import read_header
from personalq.weights.models import read_token_ids

from ..check import Check, none_of
from ..subject import Sources


def files_intact(bundle: Path, manifest: Manifest) -> Check:
    """Every file is there and has the manifest's sha256. When it fails nothing else is looked at."""
    return none_of("files intact", check_files(bundle, manifest))


def consistent(bundle: Path, manifest: Manifest, sources: Sources) -> Iterator[Check]:
    """The key is the hash of its parts, and each part matches the contents of the bundle."""
    parts = manifest.key_parts
    yield none_of("key is the hash of its parts", _differs({"key": (manifest.key, bundle_key(parts))}))
    golden = inside(bundle, GOLDEN)
    if golden.is_file():
        found = {"sha256": (parts.get("reference", ""), file_sha256(golden))}
        made_for = read_header(golden).metadata.get("checkpoint_sha256", "")
        found["checkpoint_sha256"] = (manifest.checkpoint.sha256, made_for)
        yield none_of("goldens are those of the key", _differs(found, GOLDEN))
    yield _spec_check(bundle, manifest)
    yield none_of(
        "checkpoint is that of the key",
        _differs({"checkpoint.sha256": (parts.get("weights", ""), manifest.checkpoint.sha256)}),
    )
    if sources.weights_sha256 is not None:
        now = sources.weights_sha256()
        problem = (
            [f"{manifest.checkpoint.id}: its weights changed since the export; run 'personalq export' again"]
            if now != manifest.checkpoint.sha256
            else []
        )
        yield none_of("checkpoint is as it was exported", problem)
    if sources.settings is not None:
        yield none_of("scheduler is the checkpoint's", scheduler_differs(manifest.scheduler, sources.settings))
        yield none_of("tokenizers are the checkpoint's", list(_tokenizers_differ(bundle, sources.settings)))


def scheduler_differs(ours: Mapping[str, Any], settings: Settings) -> list[str]:
    """The fields in which a manifest's scheduler is not the one that the checkpoint, or its base, ships now."""
    theirs = settings.scheduler.settings
    return [
        f"manifest.json: scheduler.{name}: must be {theirs.get(name)!r}, got {ours.get(name)!r}; export the checkpoint again"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _tokenizers_differ(bundle: Path, settings: Settings) -> Iterator[str]:
    """Each tokenizer of the bundle that gives a word of the checkpoint's tokenizer another id; it may know more words."""
    for name, folder in settings.tokenizers.items():
        ours, theirs = read_token_ids(bundle, f"{name}.json"), read_token_ids(folder)
        odd = next((token for token, number in theirs.items() if ours.get(token) != number), None)
        if odd is not None:
            got = ours.get(odd, "none")
            yield f"{name}.json: id of {odd!r} must be {theirs[odd]}, got {got}; export the checkpoint again"


def _spec_check(bundle: Path, manifest: Manifest) -> Check:
    """spec.json is the one in the key, and the manifest repeats what it decides about rows."""
    name = "spec is that of the key"
    try:
        spec_file = read_spec(inside(bundle, SPEC))
    except PersonalQError as error:
        return none_of(name, [str(error)])
    content = spec_file.content_sha256()
    found = {
        "spec": (manifest.key_parts.get("spec", ""), content),
        "manifest.spec.sha256": (manifest.spec.sha256, content),
        "family": (manifest.family, spec_file.spec.family),
    }
    problems = _differs(found, SPEC)
    kept = manifest.rows.kept
    if kept != spec_file.spec.rows.kept:
        theirs, mine = (json.dumps(value.model_dump(mode="json")) for value in (spec_file.spec.rows.kept, kept))
        problems.append(f"rows.kept: must be the spec's {theirs}, got {mine}; export again")
    if manifest.rows.layers != spec_file.spec.rows.layers:
        problems.append("rows.layers: must be the spec's, got others; export again")
    return none_of(name, problems)


def _differs(pairs: dict[str, tuple[str, str]], where: str = "manifest.json") -> list[str]:
    return hashes_differ({f"{where}: {field}:": pair for field, pair in pairs.items()})


def hashes_differ(pairs: Mapping[str, tuple[str, str]]) -> list[str]:
    """One line for each (wanted, found) that is not equal. pairs: what the line begins with -> two hashes."""
    return [
        f"{where} must be {wanted[:12]}..., got {found[:12] or 'nothing'}...; export the checkpoint again"
        for where, (wanted, found) in pairs.items()
        if wanted != found
    ]
