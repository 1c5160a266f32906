"""How many operators a training step dispatches: ours, the official code re-expressed (A) and the idiomatic baseline (B).

    python -m bench.count [--device cuda]

Convention, which is performance.md's (section 0, fact 1: the official backward passes come out at its very numbers, 881 and 2,644):

* What reaches PyTorch's dispatcher below autograd counts, one operator each. Shapes are those of ViT-B/32, tensors have no data.
* Views (anything that returns its input's memory without writing it), ``detach``, bare allocations (``empty*``) and bookkeeping
  (``profiler::``, ``prim::``) do not count: they launch nothing. Copies, casts and fills do.
* ``F.scaled_dot_product_attention`` counts once forward and once backward, whatever serves it; its result and its gradients are taken
  to lie in memory as its inputs do. The packed copy that nn.MultiheadAttention makes before it is an operator of its own.
* Without data, dropout is three operators and the global clip works tensor by tensor; on CUDA dropout is one, and the clip
  works on lists of tensors: the table's last column.
* fastidc counts as its kernels, which serve on a GPU, an operator each call; but its optimiser counts as torch's, which its own kernels
  (four launches) replace there, and gradients arrive in fp32, where on a GPU they stay in bf16.
* The second step counts: the first also makes the optimiser's state. Batches are made ready before.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.arguments import Parser, answered
from bench.peers import idiomatic, official_style, ours
from bench.peers.stepper import PAIRS_A_STAGE, Stage
from fastidc.config import ModelConfig
from fastidc.data.loaders import PairBatch
from fastidc.ops import _dispatch
from fastidc.packed import PackedText
from fastidc.train.graphs import mapped

PEERS = {"ours": ours, "A": official_style, "B": idiomatic}
STAGES: tuple[Stage, ...] = ("adapt", "finetune")
# performance.md, section 0, fact 1: dispatched by the official modules themselves. How the optimiser's came about is not written down; they
# are 22 operators a tensor with the clip, which is what one group gives in which every tensor decays. The groups of the official scripts
# spare biases and the captioner's norms, two operators less for each.
OFFICIAL = {"adapt": (514, 881, 6608), "finetune": (1887, 2644, 6270)}
_NOT_LAUNCHED = ("aten::_unsafe_view", "aten::detach", "aten::empty", "aten::new_empty", "profiler::", "prim::")


@dataclass(frozen=True)
class Counts:
    """Operators of one training step. A step has one backward pass; what follows it is the optimiser's."""

    forward: int
    backward: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.optimizer


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.phase, self.phases = "forward", {name: Counter() for name in ("forward", "backward", "optimizer")}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not name.startswith(_NOT_LAUNCHED):
            self.phases[self.phase][name] += 1
        return func(*args, **(kwargs or {}))


_LIBRARY = torch.library.Library("fastidc_bench", "DEF")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_LIBRARY.define("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("attention", lambda q, k, v: torch.empty_like(q), "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", lambda g, *qkv: tuple(torch.empty_like(x) for x in qkv), "CompositeExplicitAutograd")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.ops.fastidc_bench.attention(q, k, v)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return torch.ops.fastidc_bench.attention_backward(grad, *ctx.saved_tensors)


def _one_operator(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # as autocast treats the function that this stands for
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return _Attention.apply(q, k, v)


@contextmanager
def _phases(recorder: _Recorder) -> Iterator[None]:
    """Lets the recorder know where ``Tensor.backward`` begins and ends."""
    backward = Tensor.backward

    def marked(self, *args, **kwargs):
        recorder.phase = "backward"
        backward(self, *args, **kwargs)
        recorder.phase = "optimizer"

    with mock.patch.object(Tensor, "backward", marked):
        yield


def operators(step: Callable[[], object]) -> dict[str, Counter]:
    """phase -> how often each operator was dispatched while ``step`` ran."""
    recorder = _Recorder()
    with _phases(recorder), mock.patch.object(F, "scaled_dot_product_attention", _one_operator), recorder:
        step()
    return recorder.phases


def count(step: Callable[[], object]) -> Counts:
    """Operators of one training step, which ``step`` makes; it must not wait for a value where tensors have none."""
    return Counts(**{phase: counter.total() for phase, counter in operators(step).items()})


def random_batch(config: ModelConfig, stage: Stage, batch: int, device: torch.device | str, words: int = 32) -> PairBatch:
    """A CLEVR-Change batch of the right shapes: (before, after) with a caption, or (before, after, distractor) with one for each pair."""
    pairs, size = PAIRS_A_STAGE[stage], config.image_size
    images = torch.randint(0, 256, (batch, pairs + 1, size, size, 3), dtype=torch.uint8, device=device)
    names = [str(i) for i in range(batch)]
    if stage == "adapt":
        return PairBatch(images, names, text=PackedText.of([[1] * words] * batch).to(device))
    inputs, targets = (torch.randint(1, config.vocab_size, (batch, pairs, 1, words), device=device) for _ in range(2))
    return PairBatch(images, names, input_ids=inputs, target_ids=targets)


_KERNELS = {
    **dict.fromkeys(("attention", "layer_norm", "quick_gelu", "info_nce", "linear_cross_entropy"), "triton"),
    "patches": "cuda",
}


@contextmanager
def kernels() -> Iterator[None]:
    """fastidc's ops as they are dispatched on a GPU; without data nothing of them runs."""
    _dispatch.forget()
    with ExitStack() as stack:
        for name, backend in _KERNELS.items():
            backends = _dispatch.OPS[name].backends
            anywhere = replace(backends[backend], unsupported=lambda spec: [])
            stack.enter_context(mock.patch.dict(backends, {backend: anywhere}))
        stack.enter_context(mock.patch.dict(os.environ, FASTIDC_BACKEND=",".join(f"{name}={kernel}" for name, kernel in _KERNELS.items())))
        yield
    _dispatch.forget()


def without_data(prepare: Callable[[], object]) -> object:
    """What ``prepare`` gives, which is made of numbers: captions are packed by what is in them. Where tensors have no data it loses them then."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    with unset_fake_temporarily():
        ready = prepare()
    return ready if mode is None else mapped(lambda x: mode.from_tensor(x, static_shapes=True), ready)


def _foreach_everywhere(tensors, device) -> bool:
    return True


def _with_foreach_clip(stepper, gradients: dict) -> int:
    """Operators of an optimiser's step whose global clip works on lists of tensors."""
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    with mock.patch("torch.nn.utils.clip_grad._has_foreach_support", _foreach_everywhere):
        return sum(counter.total() for counter in operators(stepper.optimizer_step).values())


def measure(
    peer: str, stage: Stage, *, config: ModelConfig | None = None, batch: int = 4, device: str = "cpu", **options
) -> tuple[Counts, int]:
    """The second step of ``peer`` ("ours", "A" or "B") and its optimiser's operators with the foreach clip; ``options`` go to its ``build``.

    On "cpu" no tensor has data: A, which knows neither autocast nor fused optimisers, then runs on meta tensors, which is quicker and
    dispatches the same.
    """
    config = config or ModelConfig()
    with ExitStack() as stack:
        if device == "cpu" and peer == "A":
            device = "meta"
        elif device == "cpu":
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))
        if device == "cpu" and peer == "ours":
            stack.enter_context(kernels())
        stepper = PEERS[peer].build(config, None, stage, device, **options)
        if peer == "A":
            stepper.reads_loss = device == "cuda"
        ready = without_data(lambda: stepper.prepare(random_batch(config, stage, batch, device)))
        stepper.forward_backward(ready)
        gradients = {p: p.grad for p in stepper.model.parameters() if p.grad is not None}
        stepper.optimizer_step()
        clipped = _with_foreach_clip(stepper, gradients)
        return count(lambda: stepper.step(ready)), clipped


def main(argv: Sequence[str] | None = None) -> int:
    return answered("bench.count", lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.count", description="Operators that a ViT-B/32 training step dispatches.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cpu: without data; cuda: for real")
    device = parser.parse_args(argv).device
    for stage in STAGES:
        print(f"{stage:<28}{'forward':>9}{'backward':>9}{'optimizer':>10}{'total':>8}{'optimizer, foreach clip':>25}")
        forward, backward, optimizer = OFFICIAL[stage]
        print(f"  {'official, counted before':<26}{forward:>9}{backward:>9}{optimizer:>10}{forward + backward + optimizer:>8}")
        for peer in PEERS:
            c, clipped = measure(peer, stage, device=device)
            print(f"  {peer:<26}{c.forward:>9}{c.backward:>9}{c.optimizer:>10}{c.total:>8}{clipped:>25}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
