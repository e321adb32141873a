"""lift_ray: searches for the way to fine-tune CLIP that serves the rare classes, on a Ray cluster or a laptop."""

__version__ = "0.1.0"
