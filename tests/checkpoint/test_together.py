import pytest

from megatrain.checkpoint.together import CheckpointError, ContentError, require_same, together
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import simulate


def caught(ctx, error_of):
    """The error a rank sees when `error_of(rank)` is raised where it is not None."""
    try:
        with together(ctx):
            error = error_of(ctx.world.rank)
            if error is not None:
                raise error
    except Exception as seen:
        return type(seen), str(seen)
    return None


def test_an_error_on_one_rank_is_the_same_error_on_all():
    seen = simulate(4, caught, lambda rank: ContentError("too wide: é") if rank == 2 else None)
    assert seen == [(ContentError, "rank 2: too wide: é")] * 4


def test_the_lowest_failing_rank_speaks():
    seen = simulate(4, caught, lambda rank: OSError(28, "No space left") if rank in (1, 3) else None)
    assert seen == [(CheckpointError, "rank 1: OSError: [Errno 28] No space left")] * 4


def test_nothing_is_raised_when_nothing_fails():
    assert simulate(3, caught, lambda rank: None) == [None] * 3


def test_one_process_keeps_the_cause():
    with pytest.raises(CheckpointError, match=r"^KeyError: 'x'$") as caught_here, together(ParallelContext.single()):
        raise KeyError("x")
    assert isinstance(caught_here.value.__cause__, KeyError)


def test_what_differs_is_told_on_every_rank_with_the_ranks_that_differ():
    def attempt(ctx, texts):
        with pytest.raises(ContentError) as error:
            require_same("ckpt", texts[ctx.world.rank], ctx)
        return str(error.value)

    end = "Copy the one that is meant to the same path on every node, or give a path on a file system that all nodes share."
    assert (
        simulate(4, attempt, ["config\na", "config\nb", "config\na", "config\nc"])
        == [f"ranks have other weights under ckpt than rank 0: [1, 3]. On rank 0 it is a; on rank 1, b. {end}"] * 4
    )
    assert simulate(2, attempt, ["a\nb", "a"])[0].endswith(f"[1]. On rank 0 it is b; on rank 1, nothing. {end}")
    assert simulate(2, lambda ctx: require_same("ckpt", "a", ctx)) == [None] * 2
