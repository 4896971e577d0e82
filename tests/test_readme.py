"""README names what is there: its map of the rooms, and a link to every page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_page_is_linked():
    pages = sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))
    assert [page for page in pages if f"({page})" not in README] == []


def test_every_room_is_on_the_map_and_every_name_on_it_is_there():
    (drawn,) = re.findall(r"^```text\n(gpt_jax/.*?)^```", README, re.MULTILINE | re.DOTALL)
    places = re.findall(r"^( *)(\w+)/ ", drawn, re.MULTILINE)
    package, named = "", set()
    for indent, name in places:
        package = package if indent else name
        named.add(f"{package}/{name}" if indent else name)
    missing = [name for name in named if not (ROOT / name).is_dir()]
    rooms = {f"{file.parent.parent.name}/{file.parent.name}" for file in ROOT.glob("*/*/__init__.py")}
    rooms = {room for room in rooms if room.startswith(("gpt_jax/", "vk_kernels/"))}
    assert (missing, sorted(rooms - named)) == ([], [])
