"""The numbers of a run that a checkpoint keeps, where they lie: masters, or parameters without masters, and the optimizer's states."""

from __future__ import annotations

from megatrain.optim.optimizer import Optimizer
from megatrain.parallel.portion import ElementRange, Elements, Partition, Portion, TensorElements


def portions(optimizer: Optimizer) -> dict[str, dict[str, Portion]]:
    """This rank's elements of weights and optimizer states, by kind and name, for saving and loading.

    Call `Optimizer.refresh` after changing them.
    """
    flat = optimizer.flat
    trained = {local: index for index, local in enumerate(flat.trained)}
    found: dict[str, dict[str, Portion]] = {kind: {} for kind in ("weights", *optimizer.kinds)}
    for local in flat.buckets:
        kinds: dict[str, Elements] = {"weights": TensorElements(local.own_weights)}
        if local in trained:
            states = optimizer.states[trained[local]].items()
            kinds = {"weights": optimizer.masters[trained[local]], **{kind: TensorElements(state) for kind, state in states}}
        bucket = local.bucket
        starts = dict(zip(bucket.parameters, bucket.starts, strict=True))
        for parameter, first, at, count in bucket.ranges(local.own.start, local.own.stop):
            partition = Partition(starts[parameter], bucket.part)
            for kind, elements in kinds.items():
                portion = Portion(parameter.spec, first, count, ElementRange(elements, at), partition)
                found[kind][parameter.spec.name] = portion
    order = [p.spec.name for unit in flat.units for p in unit.parameters]
    return {kind: {name: named[name] for name in order if name in named} for kind, named in found.items()}
