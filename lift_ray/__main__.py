"""python -m lift_ray: all verbs."""

from lift_ray.cli import main
from lift_ray.errors import run_and_exit

run_and_exit(main)
