"""Bits, indices, groups, packed bytes and files: the same codes in every form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from qlip_core import VisualTokens, bsq
from qlip_core.errors import CheckpointError, TokenFileError
from qlip_core.tensorfile import MAX_HEADER, write_tensors


@st.composite
def coded(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    h, w = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    length = draw(st.integers(1, 62))
    shape = (draw(st.integers(0, 3)), h * w, length)
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1))), (h, w)


@given(coded())
@settings(deadline=None)
def test_every_form_gives_the_bits_back(case: tuple[np.ndarray, tuple[int, int]]) -> None:
    bits, grid = case
    length = bits.shape[2]
    tokens = VisualTokens.from_bits(bits, grid)
    np.testing.assert_array_equal(tokens.bits, bits)
    assert VisualTokens.from_indices(tokens.indices(), length, grid) == tokens
    for size in (s for s in range(1, length + 1) if length % s == 0):
        assert VisualTokens.from_groups(tokens.groups(size), size, grid) == tokens
    # Against Python's own integers, which are exact at any size.
    for row, index in zip(bits.reshape(-1, length), tokens.indices().reshape(-1)):
        assert int(index) == int("".join(map(str, row)), 2)


@given(case=coded(), data=st.data())
@settings(deadline=None, max_examples=30)
def test_files_give_the_tokens_back(
    case: tuple[np.ndarray, tuple[int, int]], data: st.DataObject, tmp_path_factory
) -> None:
    bits, grid = case
    path = tmp_path_factory.mktemp("tokens") / "t.qlip"
    names = data.draw(st.lists(st.text(), min_size=len(bits), max_size=len(bits)))
    plain = VisualTokens.from_bits(bits, grid)
    try:
        json.dumps(names).encode()
    except UnicodeEncodeError:
        return
    tokens = VisualTokens(plain.packed, plain.length, grid, "abc", tuple(names))
    tokens.save(path)
    back = VisualTokens.load(path)
    assert back == tokens
    assert (back.model, back.names) == ("abc", tuple(names))


def test_bits_by_hand() -> None:
    bits = np.array([[[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]])
    tokens = VisualTokens.from_bits(bits, (1, 3))
    assert tokens.indices().tolist() == [[11, 1, 15]]
    assert tokens.groups(2).tolist() == [[[2, 3], [0, 1], [3, 3]]]
    assert tokens.packed.tolist() == [[0b10110001, 0b11110000]]


def test_any_sequence_of_numbers_picks_images() -> None:
    tokens = VisualTokens.from_bits(np.eye(4, dtype=np.uint8).reshape(2, 2, 4), (1, 2))
    for key in ([1, 0], (1, 0), np.array([1, 0])):
        assert tokens[key] == tokens[1] + tokens[0]
    assert len(tokens[[]]) == 0
    assert tokens[np.array(1)] == tokens[np.int64(-1)] == tokens[[False, True]] == tokens[1]
    for key in (True, np.array(True), None, "a", 1.0, [[0, 1]], [None]):
        with pytest.raises(TypeError, match="images are picked by an integer"):
            tokens[key]  # type: ignore[index]
    for key in (2, -3, np.array(2), [0, 2], [True]):
        with pytest.raises(IndexError):
            tokens[key]
    with pytest.raises(TypeError, match="unsupported operand"):
        tokens + 1  # type: ignore[operator]


def test_padding_bits_do_not_count(tmp_path: Path) -> None:
    """A writer that left something in them wrote the same codes."""
    tokens = VisualTokens.from_bits(np.ones((1, 5, 3), np.uint8), (1, 5))
    tokens.save(tmp_path / "a.qlip")
    with safe_open(tmp_path / "a.qlip", "np") as file:
        packed, metadata = file.get_tensor("bits"), file.metadata()
    assert packed.tolist() == [[255, 254]]
    save_file({"bits": packed | 1}, tmp_path / "b.qlip", metadata)
    assert VisualTokens.load(tmp_path / "b.qlip") == tokens


def test_indices_of_28_bits_are_exact() -> None:
    index = 2**28 - 7  # a float32 rounds it to 2^28 - 16 or 2^28
    tokens = VisualTokens.from_indices(np.array([[index]]), 28, (1, 1))
    assert tokens.indices().item() == index
    assert tokens.groups(14).tolist() == [[[2**14 - 1, 2**14 - 7]]]
    top = 2**62 - 1
    assert VisualTokens.from_indices(np.array([[top]]), 62, (1, 1)).indices().item() == top


def test_zero_and_nan_are_zero_bits() -> None:
    u = np.array([0.0, -0.0, np.nan, 1e-38, -1e-38], np.float32)
    assert bsq.quantize(u).tolist() == [0, 0, 0, 1, 0]


def test_file_layout_is_open_to_any_tool(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (3, 6, 28))
    tokens = VisualTokens.from_bits(bits, (2, 3))
    tokens.save(tmp_path / "t.qlip")
    with safe_open(tmp_path / "t.qlip", "np") as file:
        assert file.metadata() == {
            "format": "qlip-tokens",
            "version": "1",
            "length": "28",
            "grid": "2x3",
            "model": "",
            "names": "[]",
        }
        packed = file.get_tensor("bits")
    assert packed.shape == (3, 21) and packed.dtype == np.uint8
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1), bits.reshape(3, -1))
    assert [p.name for p in tmp_path.iterdir()] == ["t.qlip"]


def test_names_take_few_bytes_and_any_name_goes(tmp_path: Path) -> None:
    names = ("ä" * 1000, 'a "b" \\ \n \u2028', "\udcff.png", "猫")
    tokens = VisualTokens(np.zeros((4, 1), np.uint8), 1, (1, 1), names=names)
    tokens.save(tmp_path / "a.qlip")
    assert VisualTokens.load(tmp_path / "a.qlip").names == names
    with safe_open(tmp_path / "a.qlip", "np") as file:
        assert json.loads(file.metadata()["names"]) == list(names)
    assert (tmp_path / "a.qlip").stat().st_size < 2500


def test_names_that_no_reader_would_take_are_not_written(tmp_path: Path) -> None:
    count = 100_000
    tokens = VisualTokens(np.zeros((count, 1), np.uint8), 1, (1, 1), names=("n" * 1000,) * count)
    with pytest.raises(TokenFileError, match=r"names of 100,000 images take 100\.\d MB.*fewer"):
        tokens.save(tmp_path / "a.qlip")
    with pytest.raises(CheckpointError, match=r"b: not written: its header would have 100,000,\d+"):
        write_tensors(tmp_path / "b", {}, metadata={"x": "x" * MAX_HEADER})
    assert not list(tmp_path.iterdir())
    # To the last byte what the safetensors package opens.
    room = MAX_HEADER - len('{"__metadata__":{"x":""}}')
    write_tensors(tmp_path / "c", {}, metadata={"x": "x" * room})
    with safe_open(tmp_path / "c", "np") as file:
        assert len(file.metadata()["x"]) == room
    (tmp_path / "c").unlink()  # or it would stay on the disk with the last runs' folders


def test_indexing_and_concatenation_keep_names() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (4, 2, 5))
    plain = VisualTokens.from_bits(bits, (1, 2))
    tokens = VisualTokens(plain.packed, 5, (1, 2), "m", ("a", "b", "c", "d"))
    assert len(tokens) == 4 and tokens[-1].names == ("d",)
    np.testing.assert_array_equal(tokens[1:3].bits, bits[1:3])
    again = VisualTokens.concatenate([tokens[2], tokens[[0, 3]]])
    assert again.names == ("c", "a", "d") and again.model == "m"
    assert [t.names[0] for t in tokens] == ["a", "b", "c", "d"]
    other = VisualTokens(plain.packed, 5, (1, 2), "other")
    with pytest.raises(ValueError, match="different tokenizers"):
        VisualTokens.concatenate([tokens, other])
    with pytest.raises(ValueError, match="cannot join"):
        VisualTokens.concatenate([tokens, VisualTokens.from_bits(bits, (2, 1))])
    with pytest.raises(IndexError):
        tokens[4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisualTokens.from_bits(np.full((1, 2, 3), 2), (1, 2)), "bits must be 0 or 1"),
        (lambda: VisualTokens.from_bits(np.zeros((1, 2, 3)), (1, 2)), "got float64"),
        (lambda: VisualTokens.from_bits(np.zeros((1, 3, 3), int), (1, 2)), r"expected \[B, 2, L\]"),
        (
            lambda: VisualTokens.from_bits(np.zeros((1, 6, 3), int), (2, 3, 1)),  # type: ignore[arg-type]
            r"grid \(=\(2, 3, 1\)\) must be two numbers",
        ),
        (lambda: VisualTokens.from_indices(np.array([[16]]), 4, (1, 1)), "outside 0 to 2\\^4"),
        (lambda: VisualTokens.from_indices(np.array([[-1]]), 4, (1, 1)), "outside 0 to 2\\^4"),
        (lambda: VisualTokens.from_indices(np.array([[0.5]]), 4, (1, 1)), "must be integers"),
        (lambda: VisualTokens.from_indices(np.array([[1]]), 63, (1, 1)), "1 to 62"),
        (
            lambda: VisualTokens.from_bits(np.zeros((1, 1, 6), int), (1, 1)).groups(4),
            "group of 4 bits does not divide the code of 6",
        ),
    ],
)
def test_codes_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


GOOD = {"format": "qlip-tokens", "version": "1", "length": "4", "grid": "1x2", "model": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pt"}, "but not a token file"),
        ({"version": "2"}, "token file version '2', this qlip reads 1"),
        ({"length": "five"}, r"header is damaged \(length is 'five'\)"),
        ({"length": "5"}, "header is damaged"),
        ({"length": " 4 "}, "length is ' 4 '"),
        ({"length": "0_4"}, "length is '0_4'"),
        ({"length": "\u0664"}, "header is damaged"),
        ({"length": None}, r"header is damaged \(no length\)"),
        ({"grid": "2"}, r"header is damaged \(grid is '2'\)"),
        ({"names": '"a"'}, "names is not a list of strings"),
        ({"names": '["only one"]'}, "1 names for 2 images"),
    ],
)
def test_wrong_token_files(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "t.qlip"
    meta = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    save_file({"bits": np.zeros((2, 1), np.uint8)}, path, meta)
    with pytest.raises(TokenFileError, match=message):
        VisualTokens.load(path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    tokens = VisualTokens.from_bits(np.ones((1, 1, 4), int), (1, 1))
    with pytest.raises(FileNotFoundError, match="no such folder") as caught:
        tokens.save(tmp_path / "absent" / "t.qlip")
    assert caught.value.filename == str(tmp_path / "absent")


def test_token_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.qlip"
    with pytest.raises(TokenFileError, match="no such token file"):
        VisualTokens.load(path)
    VisualTokens.from_bits(np.ones((9, 4, 28), int), (2, 2)).save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(TokenFileError, match=r"cut short|bytes long|damaged"):
            VisualTokens.load(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(TokenFileError, match="not a token file"):
        VisualTokens.load(path)
    path.write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(TokenFileError, match="pickle"):
        VisualTokens.load(path)
