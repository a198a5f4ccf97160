"""The gallery: a drawn world, a small Stable Diffusion trained on it, and personalised checkpoints over that base."""
