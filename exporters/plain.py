"""A spec that quantises nothing, made from a family's graphs alone: the FP16 or FP32 reference bundle without calibration."""

from personalq.errors import SpecError
from personalq.rows import KeptTokens, RowLayer, pack_layers
from personalq.spec import LayerSpec, Provenance, RowsSpec, Spec, SpecFile

from .graphs.family import Family
from .graphs.passes.layers import find_layers, split_gemms

STORAGES = {"fp32": "float32", "fp16": "float16"}


def unquantised_spec(family: Family, checkpoint: str, weights_sha256: str, name: str) -> SpecFile:
    """The spec 'fp16' or 'fp32' of a checkpoint: every layer stays float, stored in that type."""
    if name not in STORAGES:
        raise SpecError(f"spec: must be one of {', '.join(STORAGES)} or a file, got {name!r}; calibrate the checkpoint")
    unet = family.graph("unet")
    split_gemms(unet)
    layers = {
        layer: LayerSpec(op=found.op, weight="float", activation="float", reason="reference: nothing is quantised")
        for layer, found in find_layers(unet).items()
    }
    spec = Spec(
        name=name,
        policy=name,
        bits=name,
        checkpoint=checkpoint,
        family=family.key,
        storage=STORAGES[name],
        layers=layers,
        rows=RowsSpec(kept=KeptTokens(slots=0), layers=tuple(row_layers(family))),
        provenance=Provenance(checkpoint_sha256=weights_sha256),
    )
    return SpecFile(spec, {})


def row_layers(family: Family) -> list[RowLayer]:
    """Every cross-attention layer's slice of the packed rows, in the order the row encoder puts them side by side."""
    model = family.graph("text_rows")
    names = {id(found.node): found for found in find_layers(model).values()}
    packed = model.graph.outputs[0].producer()
    assert packed is not None and packed.op_type == "Concat"
    keys = [names[id(value.producer())] for value in packed.inputs[::2]]
    return pack_layers([(key.name.removesuffix(".to_k"), int(key.weight.shape[0])) for key in keys])
