"""HTML templates (Jinja) that lie next to the modules that render them."""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


@cache
def template(package: str, name: str) -> Template:
    """Return a template of a package, such as `page.html` of `lift_ray.reporting`; it may include those of `lift_ray.reporting`.

    Every value is escaped: class names and error texts come from outside. A value that is missing is an error, not an empty
    string.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("lift_ray.reporting", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # a browser's JSON.parse refuses NaN
    return environment.get_template(name)
