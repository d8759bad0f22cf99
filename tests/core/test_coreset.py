"""Core sets and their file: round trips, the format to the letter, and damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coreinfer.core.coreset import FORMAT, CoreSet
from coreinfer.errors import UserError

# A file is only overwritten, so one folder serves every example.
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def example() -> CoreSet:
    return CoreSet(
        layers={0: indices(0, 2, 7), 2: indices(1)},
        num_neurons=(8, 8, 8),
        model="a-model",
        model_fingerprint="0123456789abcdef",
        selector={"name": "stability", "alpha": 0.4, "dense_layers": [1], "budgets": {"2": 0.1}},
    )


def assert_same(a: CoreSet, b: CoreSet) -> None:
    assert a.layers.keys() == b.layers.keys()
    for layer, index in a.layers.items():
        assert torch.equal(index, b.layers[layer])
        assert b.layers[layer].dtype == torch.int32
    assert (a.num_neurons, a.model, a.model_fingerprint) == (
        b.num_neurons,
        b.model,
        b.model_fingerprint,
    )
    assert dict(a.selector) == dict(b.selector)


@st.composite
def core_sets(draw: st.DrawFn) -> CoreSet:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    layers = {
        layer: indices(*sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
        for layer, size in enumerate(sizes)
        if draw(st.booleans())
    }
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    selector = draw(st.dictionaries(text, st.one_of(text, st.integers(), st.booleans())))
    return CoreSet(layers, tuple(sizes), draw(text), draw(text), selector)


@in_one_folder
@given(core_set=core_sets())
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, core_set: CoreSet) -> None:
    core_set.save(tmp_path / "set.safetensors")
    assert_same(core_set, CoreSet.load(tmp_path / "set.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["set.safetensors"]


def test_the_file_format_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    example().save(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata == {
        "format": "coreinfer.coreset/1",
        "model": "a-model",
        "model_fingerprint": "0123456789abcdef",
        "num_layers": "3",
        "num_neurons": "8",
        "selector": json.dumps(example().selector),
    }
    assert set(tensors) == {"layers.0", "layers.2"}
    assert all(tensor.dtype.name == "int32" for tensor in tensors.values())
    assert tensors["layers.0"].tolist() == [0, 2, 7]


def test_layers_of_different_sizes_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "set"
    CoreSet({1: indices(11)}, (4, 12)).save(path)
    with safe_open(path, framework="np") as file:
        assert file.metadata()["num_neurons"] == "[4, 12]"
    assert CoreSet.load(path).num_neurons == (4, 12)


def test_layers_may_share_one_tensor(tmp_path: Path) -> None:
    shared = indices(0, 1, 2, 3)
    twice = CoreSet({0: shared, 1: shared, 2: shared[1:3]}, (4, 4, 4))
    twice.save(tmp_path / "set")
    assert_same(twice, CoreSet.load(tmp_path / "set"))


def test_saving_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.write_text("something else")
    example().save(path)
    assert_same(example(), CoreSet.load(path))


def test_a_set_without_a_sparse_layer_is_a_set(tmp_path: Path) -> None:
    dense = CoreSet({}, (4, 4))
    dense.save(tmp_path / "set")
    assert_same(dense, CoreSet.load(tmp_path / "set"))
    assert dense.density == 1.0


def test_density_is_kept_over_all() -> None:
    core_set = example()
    assert [core_set.kept(layer) for layer in range(3)] == [3, 8, 1]
    assert core_set.density == (3 + 8 + 1) / 24


def test_another_model_is_refused_by_name() -> None:
    example().require_model("0123456789abcdef", "whatever it is called")
    with pytest.raises(UserError, match=r"made for 'a-model' \(0123456789ab\), not for 'other'"):
        example().require_model("fedcba9876543210", "other")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({0: indices(0, 8)}, r"layer 0: neuron 8 is outside the layer's 0 to 7"),
        ({0: indices(-1, 3)}, r"layer 0: neuron -1 is outside the layer's 0 to 7"),
        ({1: indices(2, 2)}, r"layer 1: indices must be sorted and without duplicates"),
        ({1: indices(3, 2)}, r"layer 1: indices must be sorted and without duplicates"),
        ({1: indices()}, r"layer 1: the core set is empty"),
        ({1: torch.tensor([1, 2])}, r"layer 1: expected a 1-D int32 tensor, got torch.int64 \(2,"),
        ({1: indices(1, 2).view(1, 2)}, r"layer 1: expected a 1-D int32 .* \(1, 2\)"),
        ({1: torch.tensor([1.0])}, r"layer 1: expected a 1-D int32 tensor, got torch.float32"),
        ({2: indices(1)}, r"layer 2, the model has 0 to 1"),
        ({-1: indices(1)}, r"layer -1, the model has 0 to 1"),
    ],
)
def test_indices_that_are_no_core_set_are_refused(
    tmp_path: Path, layers: dict[int, Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        CoreSet(layers, (8, 8))
    # and in a file, by the file's name
    good = {"num_layers": "2", "num_neurons": "8"}
    write(tmp_path / "set", {f"layers.{layer}": t for layer, t in layers.items()}, **good)
    with pytest.raises(UserError, match=rf"set': .*{message}"):
        CoreSet.load(tmp_path / "set")


@pytest.mark.parametrize("sizes", [(), (0,), (8, -1)])
def test_a_model_without_neurons_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="every layer must have a neuron"):
        CoreSet({}, sizes)


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    plain = {"format": FORMAT, "model": "m", "model_fingerprint": "f", "selector": "{}"}
    plain |= {"num_layers": "1", "num_neurons": "8"} | metadata
    save_file(tensors, path, metadata={key: value for key, value in plain.items() if value != "-"})


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "-"},
        {"format": "coreinfer.coreset/2"},
        {"format": "pt"},
        {"model": "-"},
        {"model_fingerprint": "-"},
        {"selector": "-"},
        {"selector": "[]"},
        {"selector": "{"},
        {"selector": "[" * 100_000},
        {"num_layers": "-"},
        {"num_layers": "0"},
        {"num_layers": "-3"},
        {"num_layers": "many"},
        {"num_layers": "1.0"},
        {"num_layers": "1000000000000"},
        {"num_neurons": "-"},
        {"num_neurons": "0"},
        {"num_neurons": "-8"},
        {"num_neurons": "true"},
        {"num_neurons": "8.5"},
        {"num_neurons": "NaN"},
        {"num_neurons": '"8"'},
        {"num_neurons": "{}"},
        {"num_neurons": "[8, 8]"},
        {"num_neurons": '["8"]'},
        {"num_neurons": "[true]"},
    ],
)
def test_metadata_that_is_not_the_format_is_refused(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    write(tmp_path / "good", {"layers.0": indices(1)})
    assert CoreSet.load(tmp_path / "good").kept(0) == 1
    write(tmp_path / "set", {"layers.0": indices(1)}, **metadata)
    with pytest.raises(UserError, match=r"set'") as refusal:
        CoreSet.load(tmp_path / "set")
    assert "\n" not in str(refusal.value)
    assert "Error(" not in str(refusal.value)


@pytest.mark.parametrize("name", ["0", "layer.0", "layers.x", "layers.00", "layers. 0", "layers."])
def test_a_tensor_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "set", {name: indices(1)})
    with pytest.raises(UserError, match="damaged"):
        CoreSet.load(tmp_path / "set")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.with_name("elsewhere").touch(),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no core set at all, but a text of some length"),
        lambda path: save_file({}, path),
        lambda path: torch.save({"layers.0": indices(1)}, path),
    ],
)
def test_what_is_no_core_set_is_refused(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(UserError, match=r"thing'"):
        CoreSet.load(path)


def test_a_folder_in_place_of_a_core_set_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder, expected a core-set file"):
        CoreSet.load(tmp_path)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot access .*missing"):
        example().save(tmp_path / "missing" / "set")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder'"):
        example().save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@in_one_folder
@given(data=st.data())
def test_damaged_bytes_give_a_core_set_or_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "set"
    example().save(path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    loads_or_refuses(path)


@in_one_folder
@given(data=st.data())
def test_damaged_headers_give_a_core_set_or_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    """Damage that safetensors itself may not see: the header stays valid in length."""
    path = tmp_path / "set"
    example().save(path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    damaged[8 + data.draw(st.integers(0, header - 1))] = data.draw(st.integers(32, 126))
    path.write_bytes(damaged)
    loads_or_refuses(path)


@in_one_folder
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set").write_bytes(content)
    with pytest.raises(UserError, match="set'"):
        CoreSet.load(tmp_path / "set")


def loads_or_refuses(path: Path) -> None:
    with suppress(UserError):
        assert 0 < CoreSet.load(path).density <= 1
