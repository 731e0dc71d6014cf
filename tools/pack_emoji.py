"""Pack the emoji images into the zip archive of the package. The same images give the same bytes.

    python tools/pack_emoji.py emoji64.zip

The argument is a zip archive of files `emoji64/CLASS/{noto,fluent3d}-CODEPOINTS.webp`. The result is a zip archive of
files `CLASS/{noto,fluent3d}-CODEPOINTS.webp`, sorted by name and stored without further compression.
"""

import sys
import zipfile
from pathlib import Path

PACKED = Path(__file__).parents[1] / "src/raekit/assets/emoji/data/emoji64.zip"


def pack(archive: Path, packed: Path) -> None:
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(name for name in source.namelist() if name.endswith(".webp")):
            entry = zipfile.ZipInfo(name.removeprefix("emoji64/"))  # dated 1980-01-01
            entry.create_system = 3  # Unix, wherever this runs
            entry.external_attr = 0o644 << 16
            target.writestr(entry, source.read(name))


if __name__ == "__main__":
    pack(Path(sys.argv[1]), PACKED)
