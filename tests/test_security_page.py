"""docs/security.md lists every field that leaves a server, every cause and every setting of the
link.
"""

import re
from pathlib import Path

from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link import handshakes, wire
from aurora_sglang_plugin.link import publisher as publish
from aurora_sglang_plugin.link.keys import make_keys

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text()


def section(title):
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], flags=re.M)[0]


def words(text):
    return set(re.findall(r"`([\w.]+)`", text))


def test_every_field_that_leaves_is_listed():
    text = section("What leaves the server")
    rows = {
        match[1]: words(match[2]) for match in re.finditer(r"^\| `(\w+)`.*?\| (.*) \|$", text, re.M)
    }
    assert set(rows) == set(wire.FRAMES)
    for kind, frames in wire.FRAMES.items():
        assert rows[kind] - {"plugin.capture.max_prompt_features"} == set(frames), kind
    header = text.split("Every message begins with a header:")[1].split("\n\n")[0]
    assert words(header) == set(wire.Header.__struct_fields__)


def test_every_setting_of_the_link_is_explained():
    missing = [name for name in LinkConfig.model_fields if not re.search(rf"\b{name}\b", PAGE)]
    assert missing == []


def test_every_cause_is_explained():
    causes = {*handshakes.REFUSALS.values(), "garbage"}
    assert set(publish.REMEDIES) == causes
    assert causes | {"unwatched"} <= words(section("Who could do what"))


def test_the_files_are_called_what_the_page_calls_them(tmp_path):
    make_keys(tmp_path / "keys", ["server"])
    for name in ("trainer/servers/server.public", "server"):
        assert f"keys/{name}" in PAGE or name in PAGE
        assert (tmp_path / "keys" / name).exists()
    assert (tmp_path / "keys/server/trainer.public").exists() and "`trainer.public`" in PAGE
