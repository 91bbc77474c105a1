import pytest

from sd_mini.config import Config, command, read
from sd_mini.errors import UserError


class Inner(Config):
    depth: int = 2
    rate: float = 0.1


class Outer(Config):
    inner: Inner = Inner()
    name: str = "a"


def test_file_then_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner: {depth: 3, rate: 1e-4}\nname: b\n")
    config = read(Outer, file, ["--inner.depth", "5", "--name=c"])
    assert config == Outer(inner=Inner(depth=5, rate=1e-4), name="c")
    assert read(Outer, None, []) == Outer()


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes("\ufeffname: b\r\n".encode())
    assert read(Outer, file).name == "b"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"c\.yaml: is not UTF-8 \(byte 0xe9 at position 9\)"):
        read(Outer, file)


def test_yaml_round_trip(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(Outer(inner=Inner(depth=7)).to_yaml())
    assert read(Outer, file).inner.depth == 7


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("inner: {depht: 3}", [], "inner.depht: unknown field; did you mean 'depth'? fields here: depth, rate"),
        ("inner: {depth: deep}", [], "inner.depth: got 'deep'"),
        ("inner: 3", [], "inner: got 3"),
        ("- a", [], "expected fields with values, got a list"),
        ("a: [", [], "not readable as YAML"),
        ("", ["--inner.depth"], "--inner.depth: expected a value"),
        ("", ["inner.depth", "3"], "expected --field value"),
        ("", ["--name.x", "3", "--name", "[1]"], "name: got [1]"),
        ("name: b", ["--name.x", "3"], "which has no inner fields"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, overrides, says):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read(Outer, file, overrides)
    assert says in str(error.value)


def test_missing_file_names_those_there(tmp_path):
    (tmp_path / "shapes.yaml").write_text("")
    with pytest.raises(ValueError, match=r"no such file; in that folder: .*shapes\.yaml"):
        read(Outer, tmp_path / "shape.yaml")


def test_frozen():
    with pytest.raises(ValueError):
        Outer().name = "b"


def test_command_reports_one_line_and_exits_2(capsys):
    def main(argv):
        raise UserError("two\nlines")

    assert command(main, []) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert command(lambda argv: None, []) == 0


def test_a_fault_of_ours_keeps_its_traceback():
    """A ValueError that is no UserError is numpy's, torch's or ours: not a user's mistake, so not one line."""
    with pytest.raises(ValueError, match="could not convert"):
        command(lambda argv: float("x"), [])


@pytest.mark.parametrize("value", ["2024-06-31", "{a", "'"])
def test_a_value_that_yaml_cannot_read_is_one_line(tmp_path, value):
    with pytest.raises(UserError, match=r"^--name: the value"):
        read(Config, None, ["--name", value])
    (tmp_path / "a.yaml").write_text(f"name: {value}\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        read(Config, tmp_path / "a.yaml")
