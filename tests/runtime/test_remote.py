"""A store at a URL, in a folder and on a real S3 server: published once and whole, fetched with every byte checked."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.adapters import ADAPTER, AdapterManifest
from personalq.bundle import (
    MANIFEST,
    CheckpointEntry,
    FileEntry,
    SpecEntry,
    bundle_key,
    file_sha256,
    manifest_bytes,
    read_manifest,
)
from personalq.cards.card import Card
from personalq.errors import BundleError, EngineError, FleetError, MissingExtraError
from personalq.repository import Repository
from personalq.repository.remote import ATTACHED, Remote
from personalq.weights.adapter import Adapter, Branch
from runtime.cache import BundleCache, take_cards
from runtime.store import Store, open_store
from tests.s3_server import BUCKET, s3_environment, s3_server

pytest.importorskip("obstore", reason="obstore is not installed: pip install 'personalq[store]'")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    for name, value in s3_environment(request.getfixturevalue("s3")).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


def make(folder: Path, make_bundle: Any, checkpoint: str, policy: str = "taq") -> Path:
    """A bundle of a checkpoint, in a folder of its key's name as an export leaves it."""
    made = make_bundle(f"{folder.name}/bundles/{checkpoint.replace('/', '-')}-{policy}")
    manifest = read_manifest(made)
    parts = {"weights": checkpoint, "spec": policy}
    entry = CheckpointEntry(id=checkpoint, name=checkpoint, kind="lora", base="tiny", trigger=("sks",), sha256="0")
    spec = SpecEntry(name=policy, policy=policy, bits="w8a8", sha256="0", storage="float16")
    fields = {"key": bundle_key(parts), "key_parts": parts, "checkpoint": entry, "spec": spec}
    (made / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update=fields)))
    return made.rename(made.with_name(fields["key"]))


BASE_SHA = "b" * 64


def make_base(folder: Path, make_bundle: Any, policy: str = "taq") -> Path:
    """An engine of a base, for adapters of weights BASE_SHA."""
    bundle = make(folder, make_bundle, f"base-{policy}", policy)
    manifest = read_manifest(bundle)
    parts = {"weights": BASE_SHA, "spec": policy}
    entry = manifest.checkpoint.model_copy(update={"id": "tiny", "name": "tiny"})
    fields = {"key": bundle_key(parts), "key_parts": parts, "kind": "base", "checkpoint": entry}
    (bundle / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update=fields)))
    return bundle.rename(bundle.with_name(fields["key"]))


def make_adapter(folder: Path, checkpoint: str) -> Path:
    """A checkpoint's adapter, in a folder of its key's name."""
    parts = {"delta": checkpoint, "base": BASE_SHA}
    bundle = folder / "bundles" / bundle_key(parts)
    bundle.mkdir(parents=True)
    half = np.ones((8, 2), np.float16), np.ones((2, 4), np.float16)
    (bundle / ADAPTER).write_bytes(Adapter({"unet": {"layer": Branch(*half)}}).to_bytes())
    file = bundle / ADAPTER
    manifest = AdapterManifest(
        key=bundle.name,
        key_parts=parts,
        checkpoint=CheckpointEntry(id=checkpoint, name=checkpoint, kind="lora", base="tiny", sha256="0"),
        base_sha256=BASE_SHA,
        family="f",
        exporter_version="1",
        scheduler={},
        files={ADAPTER: FileEntry(sha256=file_sha256(file), bytes=file.stat().st_size)},
    )
    (bundle / MANIFEST).write_bytes(manifest_bytes(manifest))
    return bundle


def card(checkpoint: str) -> Card:
    return Card(id=checkpoint, kind="lora", base="tiny", trigger=["sks"], class_noun="mug")


def files_of(bundle: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in bundle.iterdir() if file.is_file()}


def cache_of(url: str, place: Path, limit: int = 1 << 30) -> BundleCache:
    return BundleCache(Remote(url), place, limit)


def test_what_was_published_comes_back_byte_for_byte_and_is_published_once(
    url: str, make_bundle: Any, tmp_path: Path
) -> None:
    bundle = make(tmp_path / "repo", make_bundle, "me/dog")
    assert Remote(url).publish(bundle, card("me/dog")) is True
    assert Remote(url).publish(bundle, card("me/dog")) is False
    assert Remote(url).ids() == ["me/dog"] and Remote(url).has(bundle.name) and not Remote(url).has("0" * 64)
    cache = cache_of(url, tmp_path / "cache")
    found = cache.find("me/dog")
    assert found is not None and not found.exists()  # nothing is fetched before an engine is loaded
    assert cache.manifest(found).checkpoint.id == "me/dog"
    cache.ensure(found)
    assert files_of(found) == files_of(bundle)
    assert cache.find("nobody") is None


def test_equal_files_of_two_bundles_are_one_object(url: str, make_bundle: Any, tmp_path: Path) -> None:
    import obstore
    from obstore.store import from_url

    bundles = [make(tmp_path / "repo", make_bundle, name) for name in ("dog", "cat")]
    for bundle in bundles:
        Remote(url).publish(bundle, card(read_manifest(bundle).checkpoint.id))
    objects = [one["path"] for page in obstore.list(from_url(url), "files") for one in page]
    assert len(objects) == len({e.sha256 for b in bundles for e in read_manifest(b).files.values()})


def test_a_reference_does_not_take_the_place_of_a_quantised_bundle(url: str, make_bundle: Any, tmp_path: Path) -> None:
    remote = Remote(url)
    reference, quantised = (make(tmp_path / "repo", make_bundle, "dog", policy) for policy in ("fp16", "taq"))
    for bundle, best in ((reference, reference), (quantised, quantised), (reference, quantised)):
        remote.publish(bundle, card("dog"))
        listed = remote.listed("dog")
        assert listed is not None and listed.key == best.name


def test_two_publishers_of_one_bundle_leave_one_whole(url: str, make_bundle: Any, tmp_path: Path) -> None:
    bundle, won = make(tmp_path / "repo", make_bundle, "dog"), []
    threads = [threading.Thread(target=lambda: won.append(Remote(url).publish(bundle, card("dog")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]
    cache = cache_of(url, tmp_path / "cache")
    cache.ensure(tmp_path / "cache" / "bundles" / bundle.name)
    assert files_of(tmp_path / "cache" / "bundles" / bundle.name) == files_of(bundle)


def test_changed_bytes_in_the_store_are_refused_and_nothing_is_left(url: str, make_bundle: Any, tmp_path: Path) -> None:
    import obstore
    from obstore.store import from_url

    bundle = make(tmp_path / "repo", make_bundle, "dog")
    Remote(url).publish(bundle, card("dog"))
    digest = read_manifest(bundle).files["tokenizer.json"].sha256
    obstore.put(from_url(url), f"files/{digest}", b"another file")
    cache = cache_of(url, tmp_path / "cache")
    with pytest.raises(
        BundleError, match=rf"files/{digest}: must have the bytes of its name, got 12 others; remove it"
    ):
        cache.ensure(tmp_path / "cache" / "bundles" / bundle.name)
    assert list((tmp_path / "cache" / "bundles").iterdir()) == []
    obstore.delete(from_url(url), f"files/{digest}")
    with pytest.raises(BundleError, match=rf"must hold files/{digest}, got nothing; publish it with 'export --store'$"):
        cache.ensure(tmp_path / "cache" / "bundles" / bundle.name)
    Remote(url).publish(bundle, card("dog"))  # brings back what is missing
    cache.ensure(tmp_path / "cache" / "bundles" / bundle.name)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".hidden"])
def test_a_manifest_that_leads_out_of_its_bundle_is_refused(make_bundle: Any, tmp_path: Path, name: str) -> None:
    url = f"file://{tmp_path}/store"
    bundle = make(tmp_path / "repo", make_bundle, "dog")
    Remote(url).publish(bundle, card("dog"))
    file = tmp_path / "store" / "bundles" / f"{bundle.name}.json"
    content = json.loads(file.read_text())
    content["files"][name] = content["files"]["tokenizer.json"]
    file.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="file names must be plain, got"):
        Remote(url).fetch(bundle.name, tmp_path / "fetched")
    file.write_text(json.dumps({**content, "key_parts": {"weights": "others"}}))
    with pytest.raises(BundleError, match="must be of the key in its name, got another; publish the bundle again"):
        Remote(url).manifest(bundle.name)
    file.write_text("{")
    with pytest.raises(BundleError, match="must be a manifest, got another file"):
        Remote(url).manifest(bundle.name)


def test_a_spoiled_bundle_is_not_published(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make(tmp_path / "repo", make_bundle, "dog")
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: bytes differ from the manifest's sha256; export"):
        Remote(f"file://{tmp_path}/store").publish(bundle, card("dog"))
    assert not (tmp_path / "store" / "bundles").exists()  # no manifest: nobody sees half of it


def test_beyond_the_limit_the_longest_unused_bundle_goes(make_bundle: Any, tmp_path: Path) -> None:
    url, names = f"file://{tmp_path}/store", ("dog", "cat", "mug")
    bundles = [make(tmp_path / "repo", make_bundle, name) for name in names]
    for bundle, name in zip(bundles, names, strict=True):
        Remote(url).publish(bundle, card(name))
    size = sum(file.stat().st_size for file in bundles[0].iterdir())
    cache = cache_of(url, tmp_path / "cache", int(2.5 * size))
    dog, cat, mug = (cache.find(name) for name in names)
    assert dog and cat and mug
    for bundle in (dog, cat):
        cache.ensure(bundle)
    os.utime(tmp_path / "cache" / "used" / cat.name, (1, 1))
    cache.find("dog")
    cache.ensure(mug)
    assert dog.is_dir() and mug.is_dir() and not cat.exists()
    assert cache.used_bytes() <= cache.limit_bytes
    cache.ensure(cat)  # it comes back when it is wanted
    assert files_of(cat) == files_of(bundles[1])
    small = cache_of(url, tmp_path / "small", int(1.5 * size))
    together = [one for name in ("dog", "cat") if (one := small.find(name)) is not None]
    small.ensure(*together)  # an adapter and its base's engine: neither goes for the other, whatever the limit
    assert len(together) == 2 and all(one.is_dir() for one in together)
    with pytest.raises(
        EngineError, match=r"^cache: a bundle must fit the limit of 0 MB, got one of \d+ MB; raise --cache"
    ):
        cache_of(url, tmp_path / "other", 10).ensure(tmp_path / "other" / "bundles" / dog.name)


def test_an_adapter_and_its_bases_engine_are_published_and_fetched_like_any_bundle(
    url: str, make_bundle: Any, tmp_path: Path
) -> None:
    adapter, engine = make_adapter(tmp_path / "repo", "dog"), make_base(tmp_path / "repo", make_bundle)
    remote = Remote(url)
    assert remote.base(BASE_SHA) is None
    assert remote.publish(adapter, card("dog")) is True and remote.publish(adapter, card("dog")) is False
    assert remote.publish(engine, card("tiny")) is True
    assert remote.ids() == ["dog"] and remote.has(adapter.name) and remote.has(engine.name)
    listed, of_base = remote.listed("dog"), remote.base(BASE_SHA)
    assert listed is not None and (listed.key, listed.policy) == (adapter.name, ATTACHED)
    assert of_base is not None and (of_base.key, of_base.policy) == (engine.name, "taq")
    assert remote.manifest(adapter.name)[0].base_sha256 == BASE_SHA
    cache = cache_of(url, tmp_path / "cache")
    found, base = cache.find("dog"), cache.find_base(BASE_SHA)
    assert found is not None and base is not None and cache.find_base("c" * 64) is None
    assert isinstance(cache.any_manifest(found), AdapterManifest) and cache.manifest(base).kind == "base"
    with pytest.raises(BundleError, match=r"must be an engine, got an adapter; attach it to its base's$"):
        cache.manifest(found)
    for there, here in ((found, adapter), (base, engine)):
        cache.ensure(there)
        assert files_of(there) == files_of(here)
    assert isinstance(cache.any_manifest(found), AdapterManifest)


def test_the_form_that_was_published_last_is_the_best_but_no_reference(make_bundle: Any, tmp_path: Path) -> None:
    remote, place = Remote(f"file://{tmp_path}/store"), tmp_path / "repo"
    adapter, merged, reference = (
        make_adapter(place, "dog"),
        *(make(place, make_bundle, "dog", policy) for policy in ("taq", "fp16")),
    )
    for bundle, best in ((adapter, adapter), (merged, merged), (reference, merged), (adapter, adapter)):
        remote.publish(bundle, card("dog"))
        listed = remote.listed("dog")
        assert listed is not None and listed.key == best.name
    engines = [make_base(place, make_bundle, policy) for policy in ("taq", "fp32")]
    for engine in engines:
        remote.publish(engine, card("tiny"))
    of_base = remote.base(BASE_SHA)
    assert of_base is not None and of_base.key == engines[0].name


def test_a_spoiled_adapter_is_not_published(tmp_path: Path) -> None:
    bundle = make_adapter(tmp_path / "repo", "dog")
    (bundle / ADAPTER).write_bytes(b"other")
    with pytest.raises(BundleError, match=r"adapter\.safetensors: bytes differ from the manifest's sha256; export"):
        Remote(f"file://{tmp_path}/store").publish(bundle, card("dog"))
    assert not (tmp_path / "store" / "bundles").exists()


def test_a_bundle_here_comes_before_one_in_the_store(make_bundle: Any, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    Remote(url).publish(make(tmp_path / "other", make_bundle, "cat"), card("cat"))
    here = make(tmp_path / "repo", make_bundle, "dog")
    Remote(url).publish(make(tmp_path / "other", make_bundle, "dog", "minmax"), card("dog"))
    store = open_store(tmp_path / "repo", url, 100.0)
    assert store.find("dog").bundle == here
    assert store.drawable() == {"cat": False, "dog": False}
    found = store.find("cat").bundle
    assert not found.exists() and store.manifest(found).checkpoint.id == "cat"
    store.ensure(found)
    assert found.is_dir() and found.parent.parent == tmp_path / "repo" / "cache"
    with pytest.raises(EngineError, match="nobody: must have a bundle, got none"):
        store.find("nobody")
    assert Store(tmp_path / "repo").drawable() == {"dog": False}


def test_cards_of_a_store_are_taken_in_once_and_broken_ones_left_out(
    make_bundle: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/store"
    for name in ("dog", "cat"):
        Remote(url).publish(make(tmp_path / "other", make_bundle, name), card(name))
    (tmp_path / "store" / "checkpoints" / "bad.json").write_text('{"card": "{", "key": "k", "policy": "taq"}')
    (tmp_path / "store" / "checkpoints" / "worse.json").write_text("[]")
    repository = Repository.open(tmp_path / "repo", create=True)
    assert take_cards(repository, Remote(url)) == 2
    assert [one.id for one in repository.cards()] == ["cat", "dog"]
    assert "worse.json: must name a card and a bundle" in caplog.text
    assert take_cards(repository, Remote(url)) == 0


def test_what_does_not_answer_is_one_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("personalq.repository.remote._RETRIES", {"max_retries": 0})
    with pytest.raises(FleetError, match=r"^s3://nothing: must be a store that answers, got '.*'; check URL") as caught:
        Remote("s3://nothing").ids()
    assert "secret-of-the-test" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FleetError, match=r"^nope://x: must be a store that answers, got 'Generic URL error"):
        Remote("nope://x")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError, match=r"^obstore is not installed; run: pip install 'personalq\[store\]'$"):
        Remote("file:///tmp")


def test_a_publisher_that_is_killed_leaves_nothing_that_a_reader_sees(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make(tmp_path / "repo", make_bundle, "dog")
    url = f"file://{tmp_path}/store"
    code = (
        "import os, sys; from pathlib import Path; from personalq.cards.card import Card;"
        "from personalq.repository.remote import Remote;"
        "remote = Remote(sys.argv[2]); put = remote._put_file; seen = [];"
        "remote._put_file = lambda *a: (put(*a), seen.append(1), len(seen) > 2 and os.kill(os.getpid(), 9));"
        "remote.publish(Path(sys.argv[1]), Card(id='dog', kind='lora', base='tiny', trigger=['sks']))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(bundle), url], cwd=Path(__file__).parents[2], check=False)
    assert ran.returncode == -9
    assert Remote(url).ids() == [] and not Remote(url).has(bundle.name)
    assert Remote(url).publish(bundle, card("dog")) is True
    Remote(url).fetch(bundle.name, tmp_path / "fetched")
    assert file_sha256(tmp_path / "fetched" / "tokenizer.json") == file_sha256(bundle / "tokenizer.json")
