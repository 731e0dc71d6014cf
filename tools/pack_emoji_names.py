"""Write the names of the emoji into the package, from the PyPI package `emoji` (the short names of Unicode's CLDR).

    pip install emoji
    python tools/pack_emoji_names.py

The result is a text file with a line "CODEPOINTS NAME" for each emoji of the built-in images, sorted.
"""

from pathlib import Path

from emoji import EMOJI_DATA  # pyright: ignore[reportMissingImports]

from raekit.data.sources.base import parse_address
from raekit.data.sources.emoji import NAMES, Emoji, code_points

ASSETS = Path(__file__).parents[1] / "src/raekit/assets/emoji/data"

if __name__ == "__main__":
    names: dict[str, str] = {}
    for characters, about in EMOJI_DATA.items():
        points = "-".join(f"{ord(character):04x}" for character in characters if character != "\ufe0f")
        names.setdefault(points, about["en"].strip(":").replace("_", " "))
    wanted = sorted({code_points(file) for file in Emoji(parse_address("emoji"), "all").files})
    lines = (f"{points} {names[points]}\n" for points in wanted)
    (ASSETS / NAMES).write_text("".join(lines), encoding="utf-8")
