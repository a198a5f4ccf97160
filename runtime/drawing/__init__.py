"""From a prompt to a picture: schedule, samplers, pipeline, image files."""
