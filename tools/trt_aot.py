#!/usr/bin/env python3
"""Compile an ONNX file with the real TensorRT-for-RTX builder for named GPU architectures, on a machine without a GPU.

    python tools/trt_aot.py MODEL.onnx --sm sm86,sm89,sm120 [--shape sample=2x4x64x64]... [--json FILE] [--out FILE]
    python tools/trt_aot.py --self-check

The libraries come with the wheel onnxruntime-ep-nv-tensorrt-rtx-cu13 (see trt_abi.py). What is compiled is what the user's
GPU runs, up to the choice of kernels, which happens there: the report says which data type every layer has, not its speed.

Exit status: 0 built, 1 the parser refused the graph, 2 the builder did, 3 could not set up, 4 the library crashed (the work
runs in a child process). Reading the layers: `gemm` is a matrix product, `correlation` a convolution, `runtime_fusion` a
product fused with dequantisation, `kgen` a generated kernel.
"""

from __future__ import annotations

import argparse
import collections
import ctypes as C
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from typing import Any

import trt_abi as abi

BITS = {"Float": 32, "Half": 16, "Int8": 8, "Int32": 32, "Bool": 8, "UInt8": 8, "FP8": 8, "BFloat16": 16, "Int64": 64}
BITS |= {"Int4": 4, "FP4": 4}
EXIT = {"built": 0, "parsed": 0, "parse refused": 1, "build refused": 2, "not set up": 3, "crashed": 4}
LINE = re.compile(
    r"Name: (.*?), LayerType: (\w*), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[(.*?)\], TacticName: (.*)$"
)


class Messages:
    """What the library says: errors and warnings, its own list of engine layers, its memory totals."""

    def __init__(self, level: int) -> None:
        self.level, self.kept, self.layers, self.totals = level, [], "", []

    def __call__(self, severity: int, text: str) -> None:
        if severity <= abi.SEVERITIES.index("warning"):
            self.kept.append({"severity": abi.SEVERITIES[severity], "text": text})
        if text.startswith("Layers:\n"):
            self.layers = text
        elif text.startswith("Total ") and text.endswith(" bytes"):
            self.totals.append(text)
        if severity <= self.level:
            print(f"[{abi.SEVERITIES[severity]}] {text}")


def engine_layers(text: str) -> list[dict[str, Any]]:
    """The builder's verbose layer list -> one dict per layer: name, type, data types and dims, ONNX nodes fused into it."""
    found = []
    for line in text.split("\n"):
        match = LINE.match(line)
        if match is None:
            continue
        parts = [
            [
                (dtype, [int(side) for side in sides.split(",") if side])
                for sides, dtype in re.findall(r"Dimensions: \[([-\d,]*)\].*?Datatype: ([^,]+)", match[group])
            ]
            for group in (3, 4, 5)
        ]
        nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", match[6])
        found.append(
            {"name": match[1], "type": match[2], "inputs": parts[0], "constants": parts[1], "outputs": parts[2]}
            | {"onnx": nodes}
        )
    return found


def signature(layer: dict[str, Any]) -> str:
    """e.g. 'gemm Int8 [weights Int8] -> Half'."""
    big = [one for one in layer["constants"] if math.prod(one[1]) >= 256]
    kinds = ["+".join(sorted({dtype for dtype, _ in part})) for part in (layer["inputs"], big, layer["outputs"])]
    weights = f" [weights {kinds[1]}]" if kinds[1] else ""
    return f"{layer['type']} {kinds[0] or '-'}{weights} -> {kinds[2] or '-'}"


def summarise(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Layers by signature, and bytes of constants by data type."""
    signatures = collections.Counter(signature(one) for one in layers if one["type"] not in ("signal", "wait"))
    size: collections.Counter[str] = collections.Counter()
    for one in layers:
        for dtype, sides in one["constants"]:
            size[dtype] += math.prod(sides) * BITS.get(dtype, 0) // 8
    return {"engine_precision": dict(sorted(signatures.items())), "constant_bytes": dict(size), "engine": layers}


def parse(library: abi.Library, builder: abi.Object, logger: abi.Logger, model: str) -> tuple[abi.Object, list[Any]]:
    """(network, parser errors)."""
    network = builder.make("network", "createNetworkV2", (abi.U32, abi.STRONGLY_TYPED))
    parser = library.parser(network, logger)
    path = os.fsencode(os.path.abspath(model))
    accepted = parser.call("parseFromFile", abi.BOOL, (abi.TEXT, path), (abi.I32, 2))
    errors = []
    for index in range(parser.call("getNbErrors", abi.I32)):
        error = parser.make("error", "getError", (abi.I32, index))
        text = "\n".join(line for line in error.text("desc").split("\n") if abi.NO_DRIVER not in line)
        errors.append({"op": error.text("nodeOperator"), "node": error.text("nodeName"), "text": text})
    if not accepted and not errors:
        errors.append({"op": "", "node": "", "text": "the parser gave no reason"})
    return network, errors


def set_profile(builder: abi.Object, config: abi.Object, network: abi.Object, shapes: dict[str, list[int]]) -> None:
    """One static shape for every dynamic input: as given, else 1 for every open side. Raises ValueError."""
    count = network.call("getNbInputs", abi.I32)
    inputs = [abi.tensor(network.call("getInput", abi.POINTER, (abi.I32, i))) for i in range(count)]
    dynamic = [one for one in inputs if -1 in one["dims"]]
    if not dynamic:
        return
    profile = builder.make("profile", "createOptimizationProfile")
    for one in dynamic:
        sides = shapes.get(one["name"]) or [1 if side < 0 else side for side in one["dims"]]
        dims = abi.Dims.of(sides)
        for which in range(3):  # min, opt, max
            by_reference = (C.POINTER(abi.Dims), C.byref(dims))
            name = (abi.TEXT, one["name"].encode())
            if not profile.call("setDimensions", abi.BOOL, name, (abi.I32, which), by_reference):
                raise ValueError(f"{one['name']}: the builder refuses shape {sides}")
    config.call("addOptimizationProfile", abi.I32, (abi.POINTER, profile.pointer))


def configure(builder: abi.Object, options: argparse.Namespace) -> abi.Object:
    """The builder's config. Raises ValueError for an architecture that the library does not know."""
    if options.threads:
        builder.call("setMaxThreads", abi.BOOL, (abi.I32, options.threads))
    config = builder.make("config", "createBuilderConfig")
    architectures = [int(re.sub(r"\D", "", one)) for one in options.sm.split(",")]
    if not abi.set_architectures(config, architectures):
        raise ValueError(f"--sm: the library refuses {options.sm}; sm75, sm80, sm86, sm89, sm120, sm121 are known")
    if options.weight_streaming:
        config.call("setFlag", None, (abi.I32, abi.FLAG_WEIGHT_STREAMING))
    if options.opt_level >= 0:
        config.call("setBuilderOptimizationLevel", None, (abi.I32, options.opt_level))
    if options.workspace_mb:
        size = (abi.SIZE, options.workspace_mb << 20)
        config.call("setMemoryPoolLimit", None, (abi.I32, abi.WORKSPACE), size)
    config.call("setProfilingVerbosity", None, (abi.I32, abi.DETAILED))
    return config


def build(options: argparse.Namespace, report: dict[str, Any]) -> str:
    """Do the work in this process; return the result, a key of EXIT."""
    library, messages = abi.Library(options.lib), Messages(abi.SEVERITIES.index(options.log))
    report["tensorrt_rtx"] = ".".join(map(str, library.version))
    if not (library.is_known or options.any_version):
        print(f"TensorRT for RTX {report['tensorrt_rtx']}: table positions are not verified; --any-version to try")
        return "not set up"
    logger = abi.Logger(messages)
    if options.self_check:
        wrong = abi.self_check(library, logger)
        print(f"TensorRT for RTX {report['tensorrt_rtx']}: " + (f"wrong: {', '.join(wrong)}" if wrong else "ok"))
        return "not set up" if wrong else "built"
    builder = library.builder(logger)
    config = configure(builder, options)
    started = time.perf_counter()
    network, errors = parse(library, builder, logger, options.model)
    report |= {"errors": errors, "parse_s": round(time.perf_counter() - started, 2), "messages": messages.kept}
    for error in errors:
        print(f"parser: {error['op']} {error['node']}: {error['text']}")
    if errors or options.parse_only:
        return "parse refused" if errors else "parsed"
    sides = (one.rsplit("=", 1) for one in options.shape)
    set_profile(builder, config, network, {name: [int(v) for v in re.findall(r"\d+", text)] for name, text in sides})
    started = time.perf_counter()
    pointers = (abi.POINTER, network.pointer), (abi.POINTER, config.pointer)
    pointer = builder.call("buildSerializedNetwork", abi.POINTER, *pointers)
    report["build_s"] = round(time.perf_counter() - started, 2)
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if not pointer:
        return "build refused"
    memory = abi.Object("memory", pointer)
    report["engine_bytes"] = memory.call("size", abi.SIZE)
    report |= summarise(engine_layers(messages.layers)) | {"totals": messages.totals}
    if options.out:
        with open(options.out, "wb") as file:
            file.write((C.c_char * report["engine_bytes"]).from_address(memory.call("data", abi.POINTER)))
    return "built"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--self-check", action="store_true", help="check the table positions by reading values back")
    parser.add_argument("--sm", default="sm89", help="architectures, separated by commas")
    parser.add_argument("--lib", default="", help="folder of the two libraries; default: $TRT_RTX_DIR or the wheel")
    parser.add_argument("--shape", action="append", default=[], help="NAME=1x4x64x64, for inputs with open sides")
    parser.add_argument("--out", default="", help="write the engine here")
    parser.add_argument("--json", default="", help="write everything found here")
    parser.add_argument("--find", default="", help="print the ONNX nodes of engine layers whose line matches")
    parser.add_argument("--parse-only", action="store_true")
    parser.add_argument("--log", default="error", choices=abi.SEVERITIES[1:])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--opt-level", type=int, default=-1)
    parser.add_argument("--workspace-mb", type=int, default=0)
    parser.add_argument("--weight-streaming", action="store_true")
    parser.add_argument("--any-version", action="store_true", help="use a library whose table was not verified")
    parser.add_argument("--no-child", action="store_true", help="work in this very process")
    return parser.parse_args()


def show(report: dict[str, Any], find: str) -> None:
    if "engine" not in report:
        return
    print(f"engine: {report['engine_bytes'] / 1e6:.1f} MB, {len(report['engine'])} layers, {report['build_s']} s")
    for line, number in report["engine_precision"].items():
        print(f"  {number:5d} x {line}")
    print("  constants: " + ", ".join(f"{dtype} {size}" for dtype, size in report["constant_bytes"].items()))
    for layer in report["engine"]:
        if find and re.search(find, signature(layer)):
            print(f"  found {signature(layer)}: {', '.join(layer['onnx']) or layer['name']}")


def write(report: dict[str, Any], path: str) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(report, file, indent=1)


def main() -> int:
    options = arguments()
    if not options.self_check and not os.path.isfile(options.model):
        print(f"no such file: {options.model!r}", file=sys.stderr)
        return EXIT["not set up"]
    if not options.no_child:
        code = subprocess.call([sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--no-child"])
        if code >= 0:
            return code
        print(f"result: crashed in the library, signal {-code}")
        write({"model": options.model, "result": "crashed", "signal": -code}, options.json)
        return EXIT["crashed"]
    report: dict[str, Any] = {"model": os.path.abspath(options.model), "sm": options.sm}
    try:
        report["result"] = build(options, report)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        report["result"] = "not set up"
    show(report, options.find)
    print(f"result: {report['result']}")
    write(report, options.json)
    sys.stdout.flush()
    os._exit(EXIT[report["result"]])  # the library's destructors have no order worth finding out


if __name__ == "__main__":
    sys.exit(main())
