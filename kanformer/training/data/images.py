"""Images as datasets gives them when it does not open them: bytes or a path."""

from __future__ import annotations

import io
from typing import Any

from kanformer.errors import DataError


def open_image(value: str | dict[str, Any], source: str) -> Any:
    """A PIL image in RGB.

    Args:
        value: a path, or {"bytes", "path"} of which one may be None.
        source: of the data, for messages.

    Raises:
        DataError: no such file, one that is cut short, or no image.
    """
    from PIL import Image

    path, content = (value, None) if isinstance(value, str) else (value.get("path"), value.get("bytes"))
    try:
        with Image.open(io.BytesIO(content) if content is not None else path) as image:  # type: ignore[arg-type]
            return image.convert("RGB")
    except Exception as error:  # PIL's readers raise whatever the damage leads them to
        got = " ".join(str(error).split())[:200]
        raise DataError("read the image", subject=path or source, got=got, hint="Replace it or take it out of the data.") from error
