"""The model card: README.md with the front matter that the Hugging Face Hub reads."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastidc.config import PRESETS, ModelConfig
from fastidc.share.template import template

CARD_FILE = "README.md"
UNKNOWN = "unknown"
METRICS = {"BLEU-4": "bleu", "METEOR": "meteor", "ROUGE-L": "rouge", "CIDEr": "cider"}  # ours -> the Hub's type
RECALL = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"text_to_pair": "sentence to pair", "pair_to_text": "pair to sentence"}
FORMS = {  # all that a run knows of its data: `fastidc render` writes CLEVR-Change's files too
    "clevr": "data in the form of CLEVR-Change",
    "spot": "data in the form of Spot-the-Diff",
    "ier": "data in the form of Image-Editing-Request",
    "birds": "data in the form of Birds-to-Words",
    "table": "a table of image pairs",
    "folder": "a folder of image pairs",
}
# Identifiers of the Hub that people mean when they write a licence; any other text becomes "other" with that name.
LICENCES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-2.0",
    "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "unlicense", UNKNOWN,
)  # fmt: skip


def card(
    name: str,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    no_change: Any,
    licence: str | None,
    dataset: str | None = None,
) -> str:
    """The text of ``README.md`` for a model called ``name``.

    facts: what a run's config.json says, without paths. metrics: its metrics.json, or None. no_change: a `NoChange`, or None. licence: None is
    "unknown". dataset: what the data are called, by default the form in which they were read. Depends on nothing else, so the same run has the same card.
    """
    run, recipe = (value if isinstance(value := facts.get(key), dict) else {} for key in ("run", "recipe"))
    stage = facts.get("stage") or ("finetune" if config.captioner_layers else "adapt")
    form = (metrics or {}).get("dataset") or run.get("dataset")
    test = (metrics or {}).get("splits", {}).get("test") or {}
    captions, retrieval = _captions(test), _retrieval(test)
    chosen = PRESETS.get(facts.get("preset"))
    return template("card.md.j2").render(
        name=name,
        licence=_licence(licence),
        unknown=licence is None or licence.strip().lower() == UNKNOWN,
        stage=stage,
        captioner=bool(config.captioner_layers),
        dataset=dataset or FORMS.get(form, form),
        dataset_id=re.sub(r"[^a-z0-9/_.]+", "-", dataset.lower()).strip("-") if dataset else None,
        config=config,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) / 1e6,
        preset=facts.get("preset"),
        about=chosen.about if chosen else None,
        recipe={key: value for key, value in recipe.items() if value is not None and value != ""},
        run=run,
        captions=captions,
        retrieval=retrieval,
        results=_results(captions, retrieval),
        metric_types=sorted({row["type"] for row in _results(captions, retrieval)}),
        meteor_reason=(test.get("overall") or {}).get("METEOR_reason") if captions else None,
        legacy=_retrieval(((metrics or {}).get("legacy_ties") or {}).get("test") or {}),
        selected=_selected(metrics),
        no_change=no_change,
    )


def _selected(metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    selected = (metrics or {}).get("selected")
    return selected if isinstance(selected, dict) and {"epoch", "criterion", "split"} <= selected.keys() else None


def _licence(licence: str | None) -> dict[str, str]:
    text = UNKNOWN if licence is None else " ".join(licence.split())
    if text.lower() in LICENCES:
        return {"license": text.lower()}
    return {"license": "other", "license_name": text}


def _captions(test: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the score table: name, pairs, and each metric times 100 (None where there is none)."""
    rows = []
    types = test.get("types") if isinstance(test.get("types"), dict) else {}
    blocks = {"overall": test.get("overall"), "change pairs": test.get("change"), "no-change pairs": test.get("no_change")}
    for name, block in (blocks | {f"type: {kind}": types[kind] for kind in sorted(types)}).items():
        if isinstance(block, dict):
            scores = {metric: 100 * value if isinstance(value := block.get(metric), (int, float)) else None for metric in METRICS}
            rows.append({"name": name, "pairs": block.get("pairs"), "scores": scores})
    return rows


def _retrieval(test: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for direction, name in DIRECTIONS.items():
        if isinstance(values := test.get(direction), dict):
            found.append(
                {"name": name, "scores": {metric: values[metric] for metric in RECALL if isinstance(values.get(metric), (int, float))}}
            )
    return found


def _results(captions: list[dict[str, Any]], retrieval: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the front matter's model-index says: the overall and the change row, and each direction's recall."""
    found = []
    for row in captions:
        if row["name"] in ("overall", "change pairs"):
            of = "" if row["name"] == "overall" else f" ({row['name']})"
            scores = row["scores"].items()
            found += [
                {"type": METRICS[metric], "name": f"{metric}{of}", "value": round(value, 2)}
                for metric, value in scores
                if value is not None
            ]
    for row in retrieval:
        recalls = ((metric, value) for metric, value in row["scores"].items() if metric.startswith("R@"))
        found += [{"type": "recall", "name": f"{metric} ({row['name']})", "value": round(value, 2)} for metric, value in recalls]
    return found
