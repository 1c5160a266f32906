"""A search in fixed tensors, cut into parts between which the host need not wait; on CUDA each part is a graph."""

import os
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastidc.generate.step import Decoder, Next

STEPS = 8  # words a part decodes
KEPT = 8  # plans of a captioner, the least recently used one goes


def bucket(pairs: int) -> int:
    """The number of pairs that a batch of ``pairs`` is filled up to: the next power of two, from 64 on the next multiple of 64."""
    return 1 << (pairs - 1).bit_length() if pairs <= 64 else -(-pairs // 64) * 64


class Plan:
    """A search over ``tokens`` [N, M, E] that batches of up to N pairs are copied into.

    Parts run one after the other: the start, then `STEPS` words each. After each part the answer to whether all captions have ended
    travels to the host, which reads it while the next part runs: it never makes the device wait, and one part at most is run in vain,
    which changes nothing, because what has ended stays as it is.
    """

    def __init__(self, search, decoder: Decoder, tokens: Tensor, size: int, following: Next):
        self.search = search
        self.tokens = tokens.new_zeros(size, *tokens.shape[1:])
        self.live = torch.zeros(1, dtype=torch.long, device=tokens.device)
        ranges = [range(start, min(start + STEPS, search.max_length)) for start in range(0, search.max_length, STEPS)]

        def words(positions: range) -> Callable[[], None]:
            def run() -> None:
                for position in positions:
                    search.step(decoder, position, following)

            return run

        parts = [lambda: search.start(decoder, self.tokens, self.live), *(words(positions) for positions in ranges)]
        on_cuda = tokens.device.type == "cuda"
        self.parts = self._captured(parts) if on_cuda else parts
        self.flags = torch.zeros(len(parts), dtype=torch.bool, pin_memory=on_cuda)
        self.events = [torch.cuda.Event() for _ in parts] if on_cuda else None

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, M, E], B <= N -> the search's result, [B, max_length] each"""
        self.tokens[: len(tokens)] = tokens
        self.live.fill_(len(tokens))
        for i, part in enumerate(self.parts):
            part()
            if self.search.stop_early:
                self.flags[i].copy_(self.search.done, non_blocking=True)
                if self.events is not None:
                    self.events[i].record()
                if i and self._ended(i - 1):
                    break
        ids, log_probs = self.search.result()
        return ids[: len(tokens)], log_probs[: len(tokens)]

    def _ended(self, part: int) -> bool:
        if self.events is not None:
            self.events[part].synchronize()
        return bool(self.flags[part])

    def _captured(self, parts: list[Callable[[], None]]) -> list[Callable[[], None]]:
        """CUDA graphs of ``parts`` in one pool of memory. They hold addresses: those of the weights, which may change in value but not in
        place, and those of the tensors that the search made while it was captured."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels compile and libraries allocate before anything is captured
            for part in parts:
                part()
        torch.cuda.current_stream().wait_stream(aside)
        # casts that autocast remembers from outside would be read at an address that is soon another's, and those made in a graph be
        # remembered outside
        torch.clear_autocast_cache()
        pool, graphs = torch.cuda.graph_pool_handle(), []
        for part in parts:
            graphs.append(torch.cuda.CUDAGraph())
            # other threads may allocate meanwhile, as the reader of the next batch does
            with torch.cuda.graph(graphs[-1], pool=pool, capture_error_mode="thread_local"):
                part()
        torch.clear_autocast_cache()
        return [graph.replay for graph in graphs]


_PLANS: WeakKeyDictionary = WeakKeyDictionary()  # captioner -> (addresses of weights, {key: Plan})


def plan_for(search, decoder: Decoder, tokens: Tensor, following: Next, settings: tuple) -> Plan:
    """The plan that serves ``tokens``, captured once and kept on CUDA. ``settings`` tell searches of one kind apart.

    It is made anew where weights lie elsewhere than they did, or where anything else differs that a graph has inside: device, dtypes,
    bucket, autocast, the products' precision, the backends asked for.
    """
    size = bucket(len(tokens))
    if tokens.device.type != "cuda":
        return Plan(search, decoder, tokens, size, following)
    weights = tuple((x.data_ptr(), x.dtype, x.shape) for x in decoder.tensors())
    held, plans = _PLANS.get(decoder.captioner, (None, None))
    if held != weights:
        plans = OrderedDict()
        _PLANS[decoder.captioner] = (weights, plans)
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    products = (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), os.environ.get("FASTIDC_BACKEND"))
    key = (tokens.device, tokens.dtype, tokens.shape[1:], size, following, autocast, products, decoder[3:], *settings)
    if key not in plans:
        plans[key] = Plan(search, decoder, tokens, size, following)
        if len(plans) > KEPT:
            plans.popitem(last=False)
    plans.move_to_end(key)
    return plans[key]
