"""A training step of the linear weights of a decoder layer: gradients are stored, freed in hooks, or never made.

    python -m bench.no_gradient                        # T = 64 to 16,384 tokens, at LLaMA's shapes
    python -m bench.no_gradient --device cuda --tokens 256 4096

It runs the seven linear layers of one decoder layer one after another, as in the model. Attention and norms are left
out, because they are the same for all contenders. The time is that of forward, backward and step together, and
contenders take turns. The host's time stands beside the device's: with few tokens a GPU may be done with a layer before
the host has launched its 2 to 6 kernels. The peak is of memory above weights and state: the device's allocator counts
it, and on a CPU the tensors that are alive.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_triton import APOLLOAdamW, attach_layerwise

from .clock import RunFailed, interleaved, median_ratio, quartiles, rounded, wait
from .contenders import MINI
from .results_file import Results, Row, default_device
from .whole_step import reason, release

TOKENS = (64, 256, 1024, 4096, 16384)
# Hidden and intermediate sizes of LLaMA-60M and 7B.
SIZES = {"60M": (512, 1376), "7B": (4096, 11008)}
BASELINE = "APOLLO-Mini"
CONTENDERS = (
    *("AdamW", "AdamW, gradients freed in hooks"),
    *(f"{method}{how}" for method in (BASELINE, "APOLLO") for how in ("", ", layer-wise", ", no gradient, exact")),
    *(f"{method}, no gradient, sketch" for method in (BASELINE, "APOLLO")),
)


class Layer(nn.Module):
    """The linear layers of a LLaMA decoder layer: q, k, v and o, gate, up and down."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.Linear(hidden, hidden, bias=False) for _ in range(4)])
        self.gate, self.up = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, o = self.attention
        x = x + o(q(x) + k(x) + v(x))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Contender:
    """A layer with an optimizer. A call of it is one whole step."""

    def __init__(self, name: str, size: str, tokens: int, dtype: torch.dtype, device: str) -> None:
        hidden, intermediate = SIZES[size]
        torch.manual_seed(0)
        with torch.device(device):
            self._layer = Layer(hidden, intermediate).to(dtype)
            self._x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
        self._step = self._optimized(name, hidden)

    def _optimized(self, name: str, hidden: int) -> Callable[[], object]:
        parameters = list(self._layer.parameters())
        if name == "AdamW":
            return torch.optim.AdamW(parameters, lr=1e-5, fused=True).step
        if name.startswith("AdamW"):
            # As in PyTorch's tutorial: each parameter has an optimizer, which its hook steps.
            optimizers = {p: torch.optim.AdamW([p], lr=1e-5, fused=True) for p in parameters}

            def update(parameter: Tensor) -> None:
                optimizers[parameter].step()
                optimizers[parameter].zero_grad()

            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(update)
            return lambda: None
        group = MINI if name.startswith(BASELINE) else {"rank": hidden // 4}
        optimizer = APOLLOAdamW([{"params": parameters} | group], lr=1e-5)
        if "no gradient" in name:
            norm = name.rpartition(", ")[2]
            self._handle = attach_layerwise(self._layer, optimizer, gradients="none", limiter_norm=norm)
        elif "layer-wise" in name:
            self._handle = attach_layerwise(self._layer, optimizer)
        return optimizer.step

    def __call__(self) -> None:
        y = self._layer(self._x)
        y.backward(torch.ones_like(y) / len(y))
        self._step()
        for tensor in (self._x, *self._layer.parameters()):
            tensor.grad = None


class Living(TorchDispatchMode):
    """Follows the tensors that are made inside a ``with``. ``peak``: the most bytes that are alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self._alive += storage.nbytes()
                    weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self._alive)
        return result

    def _free(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The peak of one step above what was allocated before. Not for the first step, which makes the state."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Living() as living:
        step()
    return living.peak


def rows(options: argparse.Namespace, dtype: torch.dtype, results: Results) -> Iterator[tuple[str, Row]]:
    """The rows that ``results`` lacks. All contenders of one size and one number of tokens are measured together."""
    for size in options.sizes:
        for tokens in options.tokens:
            case = f"{size} {tokens}"
            about = {"size": size, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
            if all(f"{case}: {name}" in results for name in CONTENDERS):
                continue
            steps: dict[str, Contender] = {}
            peaks: dict[str, int] = {}
            try:
                for name in CONTENDERS:
                    steps[name] = Contender(name, size, tokens, dtype, options.device)
                    steps[name]()
                    peaks[name] = peak_bytes(steps[name], options.device)
                times, host = interleaved(steps, options.rounds, options.device)
            except (RunFailed, RuntimeError) as error:
                problem = reason(error.error if isinstance(error, RunFailed) else error)
                for name in CONTENDERS:
                    yield f"{case}: {name}", about | {"contender": name, "skipped": problem}
                continue
            finally:
                steps.clear()
                release(options.device)
            for name in CONTENDERS:
                yield (
                    f"{case}: {name}",
                    about
                    | {
                        "contender": name,
                        "ms": [rounded(1e3 * seconds) for seconds in quartiles(times[name])],
                        "host_ms": rounded(1e3 * host[name]),
                        "times AdamW": rounded(median_ratio(times[name], times["AdamW"])),
                        "peak_bytes": peaks[name],
                    },
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--sizes", nargs="*", choices=SIZES, help="(default: 7B; on a CPU 60M)")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS), metavar="T", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--name", default="no_gradient", help="name of the results file (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options: Any = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    options.sizes = options.sizes or (["7B"] if on_gpu else ["60M"])
    dtype = torch.bfloat16 if on_gpu else torch.float32
    about = {"rounds": options.rounds} | ({} if on_gpu else {"threads": torch.get_num_threads()})
    results = Results(options.name, options.device, fresh=options.fresh, settings=about)
    for identity, row in rows(options, dtype, results):
        results.add(identity, **row)
        figure = (
            row.get("skipped")
            or f"{row['ms'][1]:10.2f} ms  host {row['host_ms']:10.2f}  peak {row['peak_bytes'] / 1e6:8.1f} MB"
        )
        print(f"{identity:48s} {figure}", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
