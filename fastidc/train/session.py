"""Everything that one stage of training needs, put together once for both command lines."""

import copy
from collections.abc import Sequence

import torch
from tqdm import tqdm

from fastidc.config import Recipe
from fastidc.data.images import Pixels
from fastidc.data.loaders import PairLoader
from fastidc.data.records import PairRecord
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import Tokenizer
from fastidc.train import shards
from fastidc.train.compiled import compile_captioner
from fastidc.train.distributed import World
from fastidc.train.engine import Trainer, keep_freed_memory
from fastidc.train.fp8 import enable_fp8
from fastidc.train.judge import Judge
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer, Stage
from fastidc.train.policy import Choice, policy
from fastidc.train.precision import Precision
from fastidc.train.shadows import shadows_for


class Session:
    """A model on its device in its dtypes, the batches it reads, its optimiser, and its judge. Writes nothing.

    fsdp: every process holds a part of the model and of its optimiser's state. compiling, graph, fp8: see
    `fastidc.train.policy`. beams, length_penalty: how captions are decoded, see `fastidc.model.CLIP4IDC.generate_from_tokens`.
    """

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        model: CLIP4IDC,
        records: Sequence[PairRecord],
        images: Pixels,
        world: World,
        device: torch.device,
        precision: Precision,
        workers: int,
        evaluation_batch: int = 64,
        fsdp: bool = False,
        compiling: Choice = "auto",
        graph: Choice = "auto",
        fp8: bool = False,
        beams: int = 1,
        length_penalty: float = 0.0,
    ):
        self.stage, self.recipe, self.world, self.device, self.precision = stage, recipe, world, device, precision
        how = {"compiling": compiling, "graph": graph, "fp8": fp8}
        self.policy = policy(stage, device.type, precision.name, recipe, world.size, fsdp, **how)
        self.model = model.to(device)
        precision.prepare(self.model)
        self.whole = self.model  # what is evaluated and saved: see `gather`
        if fsdp:
            shards.check(recipe, precision.name, world)
            self.whole = copy.deepcopy(self.model)
            shards.shard(self.model, world, device)
        if self.policy.compile.active:
            compile_captioner(self.model)
        if self.policy.shadows.active:
            self.model.shadows, _ = shadows_for(self.model, stage, recipe, precision, world)
        self.tokenizer = Tokenizer.of(model.config)
        pinned = device.type == "cuda"
        self.loader = PairLoader(stage, records, self.tokenizer, images, recipe, workers, world.rank, world.size, pinned)
        self.total_steps = recipe.steps or self.loader.steps * recipe.epochs
        # The official schedule counts an epoch's batches that do not fill a step; with one batch a step the two numbers are the same.
        planned = recipe.steps or (self.loader.batches + recipe.accumulate - 1) / recipe.accumulate * recipe.epochs
        self.optimizer = Optimizer(self.model, stage, recipe, planned, precision.scaler())
        self.fp8_products = self._enable_fp8() if self.policy.fp8.active else 0
        self.trainer = Trainer(
            self.model,
            objectives(stage, recipe, world),
            self.optimizer,
            world,
            device,
            precision,
            recipe.micro_batch,
            graphs=self.policy.graph.active,
            reduce_dtype=torch.bfloat16 if self.policy.buckets.active else None,
            instead=None if graph == "on" else self._tell,
        )
        self.judge = Judge(stage, self.whole, self.tokenizer, images, recipe, world, precision, evaluation_batch, beams, length_penalty)
        self.pairs_a_step = recipe.batch_size * (len(records[0].images) - 1 if stage == "finetune" else 1)
        if device.type == "cpu":
            keep_freed_memory()

    def _enable_fp8(self) -> int:
        products = enable_fp8(self.model)  # after the optimiser has marked what trains
        if not products:
            raise FastidcError("--fp8: no product of this model is large enough to gain from it; leave it out.")
        return products

    def _tell(self, sentence: str) -> None:
        if self.world.is_main:
            tqdm.write(sentence)

    def gather(self) -> CLIP4IDC:
        """The model with the weights of now, as one process alone would have it; every process calls. Where each holds a part of it
        (`fastidc.train.shards`) it is a copy of its own."""
        if self.whole is not self.model:
            shards.copy_whole(self.model, self.whole)
        return self.whole
