"""A server with nothing but the URL of a store: cards and bundles come from a real S3 server, when they are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from personalq.bundle import MANIFEST, bundle_key, manifest_bytes, read_manifest
from personalq.repository import Repository
from personalq.repository.remote import Remote
from runtime.cache import take_cards
from tests.s3_server import BUCKET, s3_environment, s3_server

pytest.importorskip("obstore", reason="obstore is not installed: pip install 'personalq[store]'")


def test_a_cold_server_draws_from_an_s3_url_with_the_openai_client(
    repository: Path, serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'personalq[dev]'")
    with s3_server() as address:
        for name, value in s3_environment(address).items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/bundles-of/{tmp_path.name}"
        full = Repository.open(repository)
        for bundle in sorted((repository / "bundles").glob("*-taq")):
            manifest = read_manifest(bundle)
            parts = {"weights": manifest.checkpoint.id}
            renamed = manifest.model_copy(update={"key": bundle_key(parts), "key_parts": parts})
            (bundle / MANIFEST).write_bytes(manifest_bytes(renamed))
            Remote(url).publish(bundle, full.card(manifest.checkpoint.id))
        cold = Repository.open(tmp_path / "cold", create=True)
        assert take_cards(cold, Remote(url)) == 3
        with serve(cold.root, store=url, cache_mb=50.0) as server:
            assert not (cold.root / "cache").exists() or not list((cold.root / "cache").glob("bundles/*"))
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            assert {model.id for model in client.models.list()} == {"moss-mug", "rex", "luna"}
            made = client.images.generate(model="moss-mug", prompt="sks mug", response_format="b64_json")
            assert made.data and made.data[0].b64_json
            assert len(list((cold.root / "cache" / "bundles").iterdir())) == 1  # the others were not asked for
            client.images.generate(model="rex", prompt="sks dog")
            assert len(list((cold.root / "cache" / "bundles").iterdir())) == 2
            client.close()
