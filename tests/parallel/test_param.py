"""Specs say which rank holds which slice: every element somewhere, owned once, whatever the layout."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import megatrain
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Init, Parameter, ParamSpec, Split, initialise


def axes(size: int) -> list[Axis]:
    return [Axis("tp", size, rank, tuple(range(size))) for rank in range(size)]


def holders(spec: ParamSpec, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many ranks hold, and how many own, each element."""
    held, owned = torch.zeros(spec.shape, dtype=torch.int64), torch.zeros(spec.shape, dtype=torch.int64)
    for axis in axes(size):
        here = spec.slices(size, axis.rank)
        held[here] += 1
        owned[here] += spec.owned(replace(ParallelContext.single(), tp=axis))
    return held, owned


@given(rows=st.one_of(st.integers(1, 40), st.integers(200, 600)), size=st.integers(1, 8))
def test_a_padded_dim_covers_every_row_once(rows, size):
    spec = ParamSpec("p", (rows, 3), Split(0, rows, pad=True))
    held, owned = holders(spec, size)
    assert (held == 1).all() and (owned == 1).all()
    most, (there, columns) = -(-rows // size), spec.local_shape(size)
    assert columns == 3 and (there == most or (there % 128 == 0 and 0 < there - most <= most / 32))


@given(units=st.integers(1, 8), width=st.integers(1, 3), size=st.sampled_from([1, 2, 4, 8]), dim=st.integers(0, 1))
def test_units_are_dealt_out_or_replicated(units, width, size, dim):
    shape = [2, 2]
    shape[dim] = units * width
    spec = ParamSpec("p", tuple(shape), Split(dim, units))
    if (size <= units and units % size) or (size > units and size % units):
        with pytest.raises(ValueError, match=rf"{units} units .* {size} ranks"):
            spec.slices(size, 0)
        return
    held, owned = holders(spec, size)
    assert (held == spec.copies(Axis("tp", size))).all() and (owned == 1).all()
    assert spec.local_shape(size)[dim] * size == units * width * spec.copies(Axis("tp", size))


def test_a_whole_parameter_is_owned_by_the_first_rank():
    held, owned = holders(ParamSpec("p", (5,)), 4)
    assert (held == 4).all() and (owned == 1).all()


@pytest.mark.parametrize("split", [None, Split(0, 10, pad=True), Split(1, 2), Split(1, 4)])
@pytest.mark.parametrize("size", [2, 4])
def test_initial_weights_are_slices_of_one_logical_tensor(split, size):
    spec = ParamSpec("layers.0.some.weight", (10, 8), split, init=Init("normal", 0.5))
    whole = Parameter(torch.zeros(10, 8), ParamSpec(spec.name, spec.shape, init=spec.init))
    initialise(whole, Axis("tp"), 7)
    assert 0.3 < whole.std() < 0.7
    for axis in axes(size):
        local = Parameter(torch.full(spec.local_shape(size), 9.0), spec)
        initialise(local, axis, 7)
        here = spec.slices(size, axis.rank)
        inside = tuple(slice(0, s.stop - s.start) for s in here)
        assert torch.equal(local[inside], whole[here])
        local.data[inside] = 0
        assert (local == 0).all(), "padding must be zero"


def test_another_name_or_seed_gives_other_weights():
    def drawn(name, seed):
        parameter = Parameter(torch.zeros(4, 4), ParamSpec(name, (4, 4)))
        initialise(parameter, Axis("tp"), seed)
        return parameter.detach()

    assert not torch.equal(drawn("a", 1), drawn("b", 1)) and not torch.equal(drawn("a", 1), drawn("a", 2))


def test_a_parameter_outside_a_run_has_nowhere_to_accumulate():
    with pytest.raises(ValueError, match=r"a\.b has no main_grad"):
        _ = Parameter(torch.zeros(1), ParamSpec("a.b", (1,))).accumulated


@given(units=st.integers(1, 12), width=st.integers(1, 4), size=st.integers(1, 12))
def test_neighbours_hold_neighbouring_slices(units, width, size):
    split = Split(0, units)
    parts = size // split.copies(size)
    if units % parts or size % parts:
        return
    slices = [split.slice(units * width, size, rank) for rank in range(size)]
    assert slices == sorted(slices) and slices[0][0] == 0 and slices[-1][1] == units * width
    for rank, (start, end) in enumerate(slices):
        assert end - start == split.local(units * width, size) and start % width == 0, "units are never cut"
        assert slices.index((start, end)) == rank - rank % split.copies(size), "copies are neighbours"


def test_a_dim_that_is_no_multiple_of_its_units_is_refused():
    with pytest.raises(ValueError, match="3 units of a dim of 10 cannot be dealt out over 1 ranks of axis tp"):
        Split(0, 3).slice(10, 1, 0)


def test_more_ranks_than_rows_leaves_the_last_with_padding_alone():
    spec = ParamSpec("vocab", (3, 2), Split(0, 3, pad=True), init=Init("normal", 1.0))
    assert [spec.slices(4, rank)[0] for rank in range(4)] == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 3)]
    empty = Parameter(torch.ones(spec.local_shape(4)), spec)
    initialise(empty, axes(4)[3], 1)
    assert empty.shape == (1, 2) and (empty == 0).all()


def test_narrow_weights_are_rounded_wide_ones():
    def drawn(dtype):
        parameter = Parameter(torch.zeros(64, 8, dtype=dtype), ParamSpec("p", (64, 8)))
        initialise(parameter, Axis("tp"), 1)
        return parameter.detach()

    assert torch.equal(drawn(torch.float32).bfloat16(), drawn(torch.bfloat16))
    assert torch.equal(drawn(torch.float32).double(), drawn(torch.float64))


def test_constants_fill_the_slice_and_not_the_padding():
    spec = ParamSpec("bias", (5,), Split(0, 5, pad=True), init=Init("constant", 2.0))
    last = Parameter(torch.full((3,), 9.0), spec)
    initialise(last, axes(2)[1], 1)
    assert last.tolist() == [2, 2, 0] and spec.numel == 5


@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_parameter_needs_no_gradient(trainable):
    assert Parameter(torch.zeros(2), ParamSpec("p", (2,), trainable=trainable)).requires_grad is trainable


def told_by_name(source):
    """Lines that ask what a parameter is by its name: a method of strings on it, or a comparison with a literal."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked = [node.func.value] if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else []
        if isinstance(node, ast.Compare) and any(isinstance(n, ast.Constant) for n in (node.left, *node.comparators)):
            asked += [node.left, *node.comparators]
        if any(re.fullmatch(r"(.*\.)?spec\.name(\[.*\])?", ast.unparse(expression)) for expression in asked):
            found.append(node.lineno)
    return found


def compared_with_a_name(source):
    """Lines that compare anything with the logical name of a parameter, alone or among others."""
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    texts = [(node.lineno, n.value) for node in compared for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return [line for line, text in texts if re.match(r"(embedding|layers|head)\.|final_norm", str(text))]


def test_nobody_tells_a_parameter_by_its_name():
    """`ParamSpec.part` says it; tables of Hugging Face's names alone translate names, and read no spec's for that."""
    wrong = 'a = p.spec.name.endswith("bias")\nb = "norm" in spec.name\nc = spec.name == "embedding.tokens"\nd = spec.name == other.name\n'
    assert told_by_name(wrong) == [1, 2, 3]
    package = Path(megatrain.__file__).parent
    assert {path.name: lines for path in package.rglob("*.py") if (lines := told_by_name(path.read_text()))} == {}
    assert compared_with_a_name('a = name in ("embedding.positions", "x")\nb = {"head.weight": 1}\nc = n == "final_norm"') == [
        1,
        3,
    ]
    others = [path for path in package.rglob("*.py") if path.parent.name != "huggingface"]
    assert {path.name: lines for path in others if (lines := compared_with_a_name(path.read_text()))} == {}
