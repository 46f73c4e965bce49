"""Latency: interleaved repeats of several models in one process, median and spread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.graph.state import eval_mode
from secateur.types import MeasureError, Measurement

SAMPLE_SECONDS = 0.004  # one sample times as many calls as fill this, so that the clock's grain does not matter


def latency(
    models: Mapping[str, nn.Module], inputs: torch.Tensor, *, repeats: int = 30, warmup: int = 3
) -> dict[str, Measurement]:
    """Return the milliseconds per call of each model on ``inputs``, eval mode, no gradients.

    After ``warmup`` samples per model, ``repeats`` rounds visit the models in turn (forward in even, backward
    in odd rounds), so that a slow moment of the machine hits all of them.  The value is the median over
    rounds, the spread the distance between the quartiles.  Raises ``MeasureError`` without models or repeats.
    """
    times = _rounds(models, inputs, repeats, warmup)
    name, how = f"latency batch {len(inputs)}", _how(inputs, repeats)
    return {key: _measurement(name, values, "ms", inputs.device, how) for key, values in times.items()}


def compare(
    dense: nn.Module, pruned: nn.Module, inputs: torch.Tensor, *, repeats: int = 30, warmup: int = 3
) -> tuple[Measurement, Measurement, Measurement]:
    """Return the latency of both models, and the speed-up: median over rounds of dense time / pruned time."""
    times = _rounds({"dense": dense, "pruned": pruned}, inputs, repeats, warmup)
    how, size = _how(inputs, repeats), len(inputs)
    slow, fast = (_measurement(f"latency batch {size}", t, "ms", inputs.device, how) for t in times.values())
    quotients = times["dense"] / times["pruned"]
    gain = _measurement(f"speed-up batch {size}", quotients, "times", inputs.device, f"dense / pruned, {how}")
    return slow, fast, gain


def race(
    models: Mapping[str, Callable[[torch.Tensor], Any]],
    inputs: torch.Tensor,
    dense: Collection[str],
    *,
    repeats: int = 30,
    warmup: int = 3,
) -> tuple[dict[str, Measurement], dict[str, Measurement]]:
    """Return the latency of each model or callable, and how many times faster it is than the fastest of ``dense``.

    Measured like ``latency``; the fastest is the one of the smallest median, the gain the median over rounds of its
    time / the other's.
    """
    times, how = _rounds(models, inputs, repeats, warmup), _how(inputs, repeats)
    fastest = min(dense, key=lambda name: float(np.median(times[name])))
    size, device, told = len(inputs), inputs.device, f"{fastest} / this, {how}"
    taken = {key: _measurement(f"latency batch {size}", t, "ms", device, how) for key, t in times.items()}
    gains = {key: times[fastest] / t for key, t in times.items()}
    return taken, {key: _measurement(f"speed-up batch {size}", g, "times", device, told) for key, g in gains.items()}


def _rounds(
    models: Mapping[str, Callable[..., Any]], inputs: torch.Tensor, repeats: int, warmup: int
) -> dict[str, np.ndarray]:
    """Return the milliseconds per call of each model in each round."""
    if not models or repeats < 1:
        raise MeasureError(f"latency needs models and repeats >= 1; got {len(models)} models, {repeats}.")
    names = list(models)
    times = {name: np.empty(repeats) for name in names}
    calls = {name: _calls(models[name], inputs, warmup) for name in names}
    for number in range(repeats):
        for name in names if number % 2 == 0 else names[::-1]:
            times[name][number] = _timed(models[name], inputs, calls[name])
    return times


def _how(inputs: torch.Tensor, repeats: int) -> str:
    threads = f", CPU threads: {torch.get_num_threads()}" if inputs.device.type == "cpu" else ""
    return f"median of {repeats} interleaved rounds, batch {len(inputs)}{threads}; spread is the quartile range"


def _measurement(name: str, values: np.ndarray, unit: str, device: torch.device, how: str) -> Measurement:
    low, high = np.percentile(values, [25, 75])
    return Measurement(name, float(np.median(values)), unit, len(values), float(high - low), describe(device), how)


def describe(device: torch.device) -> str:
    """Return the name of a device: ``cpu``, or what CUDA calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _synchronize(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _calls(model: Callable[..., Any], inputs: torch.Tensor, warmup: int) -> int:
    """Warm the model up and return how many calls fill one sample."""
    seconds = min(_timed(model, inputs, 1) for _ in range(max(1, warmup))) / 1e3
    return max(1, min(1000, round(SAMPLE_SECONDS / max(seconds, 1e-9))))


def _timed(model: Callable[..., Any], inputs: torch.Tensor, calls: int) -> float:
    """Return the milliseconds per call of ``calls`` calls."""
    wait = _synchronize(inputs.device)
    mode = eval_mode(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with mode, torch.no_grad():
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            model(inputs)
        wait()
        return (time.perf_counter() - begin) * 1e3 / calls
