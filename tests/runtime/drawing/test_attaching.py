"""Pictures of attached checkpoints, in FP32, beside diffusers with the same files loaded: one kind each, strengths, stacks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.adapters import export_adapter
from exporters.export import export_base
from exporters.request import reference_spec
from personalq.errors import EngineError, PersonalQError
from personalq.numerics import psnr_db
from personalq.repository import Repository
from runtime.drawing.attaching import Chosen, open_adapter
from runtime.drawing.choosing import Asked, what_draws
from runtime.drawing.pipeline import Pipeline
from runtime.engines.ort import OrtEngine
from runtime.store import Store
from tests.conftest import tiny_pipeline
from tests.repositories import add_family

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

EQUAL_DB = 55.0  # pictures of 8 bits in which nothing but single steps of a pixel differ
STEPS, GUIDANCE = 4, 3.0
NOISE = np.random.default_rng(4).standard_normal((4, 8, 8)).astype(np.float32)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [
    *ATTENTION,
    "proj_in",
    "proj_out",
    "net.0.proj",
    "net.2",
    "conv1",
    "conv2",
    "time_emb_proj",
    "conv_shortcut",
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, traces: Path) -> Repository:
    """bases/tiny; LoRAs 'rex' (attention and text encoder), 'look' (every layer); embedding 'mug'; Custom Diffusion 'cab'."""
    root = tmp_path_factory.mktemp("attaching") / "repo"
    shutil.copytree(tiny_base, root / "bases" / "tiny")
    (root / "bases" / "tiny" / "personalq.json").write_text(json.dumps({"steps": STEPS, "guidance": GUIDANCE}))
    add_family(root, "tiny", traces)
    write_lora(checkpoint(root, "rex", "lora", "sks"), 4, ATTENTION, seed=1, with_text=True)
    write_lora(checkpoint(root, "look", "lora", "blueprint"), 3, EVERYWHERE, seed=2)
    write_embedding(checkpoint(root, "mug", "textual_inversion", "<mug>"))
    write_custom_diffusion(checkpoint(root, "cab", "custom_diffusion", "<cab>"))
    return Repository.open(root)


@pytest.fixture(scope="module")
def engine(repository: Repository) -> OrtEngine:
    return OrtEngine(export_base(repository, "tiny", reference_spec(repository, "tiny", "fp32")).bundle, threads=1)


def checkpoint(root: Path, name: str, kind: str, trigger: str) -> Path:
    folder = root / "checkpoints" / name
    folder.mkdir(parents=True)
    card = {"id": name, "name": name, "kind": kind, "base": "tiny", "trigger": [trigger], "class_noun": "dog"}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def write_lora(folder: Path, rank: int, targets: list[str], seed: int, *, with_text: bool = False) -> None:
    """A random LoRA as diffusers saves it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_pipeline()
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    found = get_peft_model_state_dict(pipe.unet)
    # of convolutions, diffusers would drop names that it has converted itself
    layers = {"unet_lora_layers": found if "conv1" in targets else convert_state_dict_to_diffusers(found)}
    if with_text:
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        pipe.text_encoder.add_adapter(config)
        found = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder))
        layers["text_encoder_lora_layers"] = found
    StableDiffusionPipeline.save_lora_weights(folder, **{name: quieter(value) for name, value in layers.items()})


def quieter(layers: dict[str, Any]) -> dict[str, Any]:
    """Smaller changes: at peft's random size the picture of a random UNet is noise without structure."""
    return {name: value * 0.3 if ".lora_B." in name or ".lora.up" in name else value for name, value in layers.items()}


def write_embedding(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(
        {"<mug>": np.random.default_rng(5).standard_normal((2, 32)).astype(np.float32)}, folder / "mug.safetensors"
    )


def write_custom_diffusion(folder: Path) -> None:
    """K and V of every cross-attention, near the base's own, and a token."""
    from safetensors.numpy import save_file

    random, pipe = np.random.default_rng(6), tiny_pipeline()
    # an empty tensor: load_attn_procs takes it for a processor that was left as it was
    tensors = {name: np.zeros(0, np.float32) for name in pipe.unet.attn_processors if "attn1" in name}
    for name, value in pipe.unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            layer, _, end = name.rpartition(".to_")
            moved = value.numpy() * (1 + 0.2 * random.standard_normal(value.shape))
            tensors[f"{layer}.processor.to_{end[0]}_custom_diffusion.weight"] = moved.astype(np.float32)
    save_file(tensors, folder / "pytorch_custom_diffusion_weights.safetensors")
    vectors = random.standard_normal((1, 32)).astype(np.float32)
    save_file({"<cab>": vectors}, folder / "<cab>.safetensors")


def by_diffusers(repository: Repository, prompt: str, *loras: tuple[str, float]) -> np.ndarray[Any, Any]:
    """The picture with LoRAs loaded and set by `set_adapters`; none: of the checkpoint's own files, as its loader takes them."""
    from calibration.model.independent import load_by_diffusers, open_base, quiet_libraries
    from personalq.repository.settings import read_settings

    if not loras:
        name = prompt.split()[0]
        return drawn(load_by_diffusers(repository, repository.card(name)), prompt.split(maxsplit=1)[1])
    base_dir = repository.whole("tiny").base_dir
    with quiet_libraries():
        pipe = open_base(base_dir, read_settings(base_dir), {})
        for name, _ in loras:
            pipe.load_lora_weights(repository.checkpoint_dir(name), adapter_name=name)
        pipe.set_adapters([name for name, _ in loras], [weight for _, weight in loras])
    return drawn(pipe, prompt)


def drawn(pipe: Any, prompt: str) -> np.ndarray[Any, Any]:
    made = pipe(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(NOISE)[None],
        output_type="np",
    )
    return np.rint(made.images[0] * 255).astype(np.uint8)


def chosen(repository: Repository, *asked: tuple[str, float]) -> list[Chosen]:
    return [Chosen(open_adapter(export_adapter(repository, name).bundle), by) for name, by in asked]


@pytest.mark.parametrize("name", ["rex", "look", "mug", "cab"])
def test_a_checkpoint_of_each_kind_draws_what_diffusers_draws(
    repository: Repository, engine: OrtEngine, name: str
) -> None:
    prompt = f"a photo of {repository.card(name).trigger[0]} dog on the beach"
    ours = Pipeline(engine, chosen(repository, (name, 1.0))).image(prompt, noise=NOISE)
    assert psnr_db(by_diffusers(repository, f"{name} {prompt}"), ours, peak=255) >= EQUAL_DB
    plain = Pipeline(engine).image(prompt, noise=NOISE)
    assert psnr_db(plain, ours, peak=255) < EQUAL_DB - 10  # it is not the base's picture


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("name", ["rex", "look"])
def test_a_strength_is_that_of_set_adapters(
    repository: Repository, engine: OrtEngine, name: str, strength: float
) -> None:
    prompt = "a photo of sks dog in the snow"
    ours = Pipeline(engine, chosen(repository, (name, strength))).image(prompt, noise=NOISE)
    assert psnr_db(by_diffusers(repository, prompt, (name, strength)), ours, peak=255) >= EQUAL_DB


@pytest.mark.parametrize(
    "stack", [(("rex", 1.0), ("look", 1.0)), (("look", 0.5), ("rex", 1.5)), (("rex", 0.8), ("look", -0.4))]
)
def test_stacked_adapters_are_those_of_set_adapters(
    repository: Repository, engine: OrtEngine, stack: tuple[tuple[str, float], ...]
) -> None:
    prompt = "a photo of sks dog, blueprint"
    ours = Pipeline(engine, chosen(repository, *stack)).image(prompt, noise=NOISE)
    assert psnr_db(by_diffusers(repository, prompt, *stack), ours, peak=255) >= EQUAL_DB


def test_one_adapter_serves_engines_of_every_precision(repository: Repository, engine: OrtEngine) -> None:
    other = OrtEngine(export_base(repository, "tiny", reference_spec(repository, "tiny", "fp16")).bundle, threads=1)
    assert other.bundle != engine.bundle
    adapters = chosen(repository, ("rex", 0.8))
    pictures = [Pipeline(one, adapters).image("a photo of sks dog", noise=NOISE) for one in (engine, other)]
    assert psnr_db(*pictures, peak=255) > 45
    assert chosen(repository, ("rex", 0.8))[0].opened.folder == adapters[0].opened.folder
    shutil.rmtree(other.bundle)  # the other tests' base has one engine


def test_tokens_of_two_adapters_draw_together(repository: Repository, engine: OrtEngine) -> None:
    """Both tokens, K and V of one: diffusers loads one file after the other."""
    from calibration.model.independent import load_by_diffusers

    prompt = "a photo of <cab> and <mug> dog"
    pipe = load_by_diffusers(repository, repository.card("cab"))
    pipe.load_textual_inversion(repository.checkpoint_dir("mug"), weight_name="mug.safetensors")
    ours = Pipeline(engine, chosen(repository, ("cab", 1.0), ("mug", 1.0))).image(prompt, noise=NOISE)
    assert psnr_db(drawn(pipe, prompt), ours, peak=255) >= EQUAL_DB


def test_a_file_that_was_never_added_draws_as_the_checkpoint(repository: Repository, engine: OrtEngine) -> None:
    (file,) = repository.checkpoint_dir("rex").glob("*.safetensors")
    found = what_draws(repository, Store(repository.root), [Asked(str(file), 0.7)])
    assert found.form == "attached" and found.found.bundle == engine.bundle
    prompt = "a photo of sks dog"
    ours = Pipeline(engine, found.chosen).image(prompt, noise=NOISE)
    theirs = Pipeline(engine, chosen(repository, ("rex", 0.7))).image(prompt, noise=NOISE)
    assert np.array_equal(ours, theirs)


def test_a_checkpoint_that_was_never_exported_is_attached_as_it_lies(repository: Repository, engine: OrtEngine) -> None:
    found = what_draws(repository, Store(repository.root), [Asked("look", 1.0)], on="tiny")
    assert [one.id for one in found.chosen] == ["look"]


def test_the_tokenizer_of_the_pictures_knows_the_added_tokens(repository: Repository, engine: OrtEngine) -> None:
    pipeline = Pipeline(engine, chosen(repository, ("mug", 1.0)))
    first = engine.manifest.adapters.first_added_id if engine.manifest.adapters else 0
    assert pipeline.tokenizer.token_ids("<mug>") == (first, first + 1)
    assert pipeline.manifest.checkpoint.id == "mug" and pipeline.manifest.steps == STEPS


def test_two_adapters_of_one_token_are_refused(repository: Repository, engine: OrtEngine) -> None:
    with pytest.raises(EngineError, match="token '<mug>': must be of one adapter, got mug and mug"):
        Pipeline(engine, chosen(repository, ("mug", 1.0), ("mug", 1.0)))


def test_an_adapter_of_another_family_or_other_weights_is_refused(repository: Repository, engine: OrtEngine) -> None:
    (one,) = chosen(repository, ("rex", 1.0))
    manifest = one.opened.manifest
    for change, message in (
        ({"family": "f" * 64}, "rex: must be of the family of base 'tiny'"),
        ({"base_sha256": "0" * 64}, "rex: must be made for the weights of base 'tiny'"),
    ):
        other = Chosen(type(one.opened)(manifest.model_copy(update=change), one.opened.adapter))
        with pytest.raises(EngineError) as error:
            Pipeline(engine, [other])
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    other = Chosen(type(one.opened)(manifest.model_copy(update={"base_sha256": "0" * 64}), one.opened.adapter))
    assert "made for 'tiny', drawn on 'tiny'" in Pipeline(engine, [other], on_any_base=True).wearing.warnings[0]


def test_a_merged_engine_takes_no_adapters(repository: Repository) -> None:
    from exporters.export import export_checkpoint

    merged = export_checkpoint(repository, "rex", reference_spec(repository, "rex", "fp32"))
    with pytest.raises(EngineError, match="must take adapters, got the engine of 'rex' alone"):
        Pipeline(OrtEngine(merged.bundle, threads=1), chosen(repository, ("look", 1.0)))


def test_a_missing_file_and_a_strength_out_of_range_are_one_line(repository: Repository) -> None:
    from runtime.drawing.choosing import read_asked

    for act in (
        lambda: what_draws(repository, Store(repository.root), [Asked("none.safetensors")]),
        lambda: read_asked("rex:99"),
        lambda: what_draws(repository, Store(repository.root), [Asked("nobody")]),
    ):
        with pytest.raises(PersonalQError) as error:
            act()
        assert "\n" not in str(error.value)
