"""Training of several networks at once on a GPU: each operation is done for all of them in one batched kernel.

Networks this small leave most of a GPU idle while it waits for the next kernel to be launched. `torch.func.vmap` over
stacked weights launches the kernels of many networks as one.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.lr_scheduler import ReduceLROnPlateau

from utils.recipes import make_optimizer, make_scheduler, set_learning_rate
from utils.seeds import DROPOUT, seed_for
from utils.training import (
    FoldData,
    Segment,
    Training,
    TrainingState,
    batches_of,
    forward,
    initial_state,
    predict,
    refuse_divergence,
    restore,
)


def train_together(
    training: Training,
    states: Sequence[TrainingState],
    data: Sequence[FoldData],
    until: int,
    done: Callable[[int, int], None] | None = None,
) -> list[Segment]:
    """Advance networks as `utils.training.train` does each, up to rounding and the draws of dropout.

    One optimiser steps the stacked weights, so that the networks must be at the same epoch, take as many batches an epoch
    and, under a plateau schedule, belong to the same fold (see `groups_of`).

    Args:
        training: what is common to all networks.
        states: to start from; left as they are.
        data: of each state's fold, on the device.
        until: epochs done at the end.
        done: called after every epoch with the fold and the epochs done.

    Returns:
        A segment for each state, with an even share of the seconds.

    Raises:
        InputError: a training loss is not finite, or the networks do not predict one number a sample.
    """
    started = time.perf_counter()
    networks = [restore(training, state)[0] for state in states]
    parameters, buffers = stack_module_state(networks)
    optimizer = make_optimizer(training.recipe, [one for one in parameters.values() if one.requires_grad])
    scheduler = make_scheduler(training.recipe, optimizer, training.epochs)
    if states[0].schedule:
        scheduler.load_state_dict(states[0].schedule)
    if states[0].optimizer:
        optimizer.load_state_dict(_stack_optimizers([state.optimizer for state in states]))
    records: list[list[dict[str, float]]] = [[] for _ in states]
    for epoch in range(states[0].epoch, until):
        scheduler = set_learning_rate(
            training.recipe, optimizer, scheduler, epoch, training.warmup_epochs, training.epochs, states[0].validation_loss
        )
        losses = run_epoch_together(training, networks[0], parameters, buffers, optimizer, states, data, epoch).tolist()
        for state, loss, own in zip(states, losses, records, strict=True):
            if not math.isfinite(loss):
                refuse_divergence(state.fold, "training", epoch + 1)
            own.append({"epoch": epoch + 1, "loss_train": loss, "lr": float(optimizer.param_groups[0]["lr"])})
            if done is not None:
                done(state.fold, epoch + 1)
        if epoch >= training.warmup_epochs and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
    schedule = scheduler.state_dict() if until > training.warmup_epochs else {}
    segments = []
    for index, (state, network, fold) in enumerate(zip(states, networks, data, strict=True)):
        network.load_state_dict({name: tensor[index] for name, tensor in {**parameters, **buffers}.items()}, strict=False)
        validation = predict(network, fold.validation_x, training) if training.is_validated(until) else None
        own_optimizer = _unstack_optimizer(optimizer.state_dict(), index)
        after = state._replace(epoch=until, network=network.state_dict(), optimizer=own_optimizer, schedule=schedule)
        segments.append(Segment(after, records[index], validation, (time.perf_counter() - started) / len(states)))
    return segments


def run_epoch_together(
    training: Training,
    network: nn.Module,
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    states: Sequence[TrainingState],
    data: Sequence[FoldData],
    epoch: int,
) -> Tensor:
    """One pass of each network over its training rows; their mean losses (network,)."""

    def predictions(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return forward(lambda batch: functional_call(network, (parameters, buffers), (batch,)), x, training.precision)

    batched = vmap(predictions, randomness="different")
    batches = [batches_of(training, fold, state.fold, epoch) for state, fold in zip(states, data, strict=True)]
    losses = torch.zeros(len(batches[0]), len(states), device=training.device)
    network.train()
    with torch.random.fork_rng(devices=[training.device] if training.device.type == "cuda" else []):
        torch.manual_seed(seed_for(training.seed, DROPOUT, states[0].fold, states[0].member, epoch))
        for step in range(len(batches[0])):
            optimizer.zero_grad()
            # Folds differ in the size of the last batch. Batch norm must see real rows only, so that none is padded.
            sizes = [len(own[step]) for own in batches]
            for size in sorted(set(sizes)):
                members = [index for index, own in enumerate(sizes) if own == size]
                x = torch.stack([data[index].train_x[batches[index][step]] for index in members])
                y = torch.stack([data[index].train_y[batches[index][step]] for index in members])
                chosen = slice(None) if len(members) == len(sizes) else torch.tensor(members, device=training.device)
                state = {name: tensor[chosen] for name, tensor in buffers.items()}
                predicted = batched({name: tensor[chosen] for name, tensor in parameters.items()}, state, x)
                loss = (predicted - y).abs().mean(1)
                loss.sum().backward()
                losses[step, chosen] = loss.detach().float()
                for name, tensor in state.items():
                    buffers[name][chosen] = tensor
            optimizer.step()
    return losses.mean(0)


def groups_of(
    training: Training, states: Sequence[TrainingState], data: Mapping[int, FoldData]
) -> list[list[TrainingState]]:
    """The networks that `train_together` can advance in one go."""
    groups: dict[tuple[int, ...], list[TrainingState]] = {}
    for state in states:
        batches = len(batches_of(training, data[state.fold], state.fold, state.epoch))
        own = (state.fold,) if training.recipe.schedule == "plateau" else ()
        groups.setdefault((state.epoch, batches, *own), []).append(state)
    return list(groups.values())


def _stack_optimizers(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of optimisers of one network each, that of the stacked weights. `step` is the same in all."""
    first = states[0]
    stacked = {
        index: {
            name: value if name == "step" else torch.stack([state["state"][index][name] for state in states])
            for name, value in values.items()
        }
        for index, values in first["state"].items()
    }
    return {"param_groups": first["param_groups"], "state": stacked}


def _unstack_optimizer(stacked: dict[str, Any], network: int) -> dict[str, Any]:
    """The optimiser of one of the networks."""
    own = {
        index: {name: (value if name == "step" else value[network]).clone() for name, value in values.items()}
        for index, values in stacked["state"].items()
    }
    return {"param_groups": stacked["param_groups"], "state": own}


def reason_against(training: Training, data: FoldData) -> str:
    """Why PyTorch cannot batch the layers of this architecture over networks, as it says; empty where it can."""
    states = [initial_state(training, 1, member) for member in (0, 1)]
    rows = min(training.batch_size, len(data.train_y))
    few = FoldData(*(tensor[:rows] for tensor in data))
    try:
        train_together(training, states, [few, few], 1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
