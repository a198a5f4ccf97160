"""Load a folder that `export --layout optimum` wrote with the real optimum, and draw. Runs in optimum's own environment.

    python draw.py FOLDER CASE.npz PICTURE.npy

CASE: prompt, steps, guidance, noise (4,h,w) float32. PICTURE: (H,W,3) float32 in 0..255. Prints the pipeline's class.
Nothing but FOLDER is given to from_pretrained.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np


def main(folder: Path, case_file: Path, picture: Path) -> None:
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline, ORTStableDiffusionXLPipeline

    case = np.load(case_file)
    is_sdxl = "XL" in json.loads((folder / "model_index.json").read_text())["_class_name"]
    kind = ORTStableDiffusionXLPipeline if is_sdxl else ORTStableDiffusionPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    height, width = (side * pipe.vae_scale_factor for side in case["noise"].shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = pipe(
            str(case["prompt"]),
            num_inference_steps=int(case["steps"]),
            guidance_scale=float(case["guidance"]),
            latents=torch.from_numpy(case["noise"])[None],
            height=height,
            width=width,
            output_type="np",
        ).images[0]
    np.save(picture, np.asarray(drawn, np.float32) * 255)
    print(type(pipe).__name__)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
