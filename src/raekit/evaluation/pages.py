"""Write HTML pages that need no other file."""

from pathlib import Path
from typing import Any

import jinja2

from raekit.files import whole


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template with `values` and write it to `path`.

    Args:
        path: the HTML file.
        template: the name of a template in `raekit/assets`.
        values: the values of the template. A missing value is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raekit", "assets"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template(template).render(**values)
    with whole(path) as partial:
        partial.write_text(html, "utf-8", "backslashreplace")
